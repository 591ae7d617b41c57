import type { Connection } from "../lib/feed.ts";
import { plural, shortId } from "../lib/format.ts";
import type { Swarm } from "../types.ts";

const WORDS: Record<Connection["phase"], string> = {
  connecting: "Connecting",
  live: "Live",
  unreachable: "Node unreachable",
  unauthorized: "API key needed",
};

export function Header({ connection, swarm }: { connection: Connection; swarm: Swarm | null }) {
  const present = swarm?.nodes.filter((node) => node.state !== "gone").length ?? 0;
  return (
    <header class="header">
      <h1 class="wordmark">
        <Mark />
        swarmd
      </h1>
      {swarm && (
        <p class="header-facts">
          <span>{plural(present, "node")}</span>
          <span class="wide-only">
            swarm <code title={swarm.swarm}>{shortId(swarm.swarm)}</code>
          </span>
          <span class="wide-only">version {swarm.version}</span>
        </p>
      )}
      <a class="button button-quiet narrow-only" href="#chat">
        Chat
      </a>
      <p class={`badge connection-${connection.phase}`} role="status">
        <span class="dot" aria-hidden="true" />
        {WORDS[connection.phase]}
      </p>
    </header>
  );
}

/** The favicon's three linked nodes. */
function Mark() {
  return (
    <svg class="mark" viewBox="0 0 32 32" aria-hidden="true">
      <path d="M9 10.5 21 9M10 12.5l5 9M22 12l-4.5 9.5" />
      <circle class="colour-0" cx="7" cy="11" r="4" />
      <circle class="colour-1" cx="24" cy="9" r="4" />
      <circle class="colour-2" cx="16" cy="24" r="4" />
    </svg>
  );
}
