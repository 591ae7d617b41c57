import { Command } from "./Command.tsx";

/** How the next machine joins: laid open for a lone node, folded once there are more. */
export function AddMachine({ alone }: { alone: boolean }) {
  if (alone) {
    return (
      <section class="panel add" aria-labelledby="add-title">
        <h2 id="add-title">Add the next machine</h2>
        <p>This node is alone. A second machine brings its memory, and larger models fit.</p>
        <Steps />
      </section>
    );
  }
  return (
    <details class="fold">
      <summary>Add another machine</summary>
      <Steps />
    </details>
  );
}

function Steps() {
  return (
    <ol class="steps">
      <li>
        <span>On this machine, show the join token:</span>
        <Command text="swarmd token" />
      </li>
      <li>
        <span>On the other machine, join with it:</span>
        <Command text="swarmd join TOKEN" />
      </li>
    </ol>
  );
}
