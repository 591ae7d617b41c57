import type { FeedState } from "../lib/feed.ts";
import { idleNodes, isAlone } from "../lib/swarm.ts";
import type { Swarm } from "../types.ts";
import { AddMachine } from "./AddMachine.tsx";
import { InstancePanel } from "./InstancePanel.tsx";
import { NodeCard } from "./NodeCard.tsx";
import { Progress } from "./Progress.tsx";

/** Instances with their pipelines, models on their way, and the nodes beside. */
export function Picture({ feed, swarm }: { feed: FeedState; swarm: Swarm }) {
  const idle = idleNodes(swarm);
  const alone = isAlone(swarm);
  return (
    <>
      {swarm.instances.map((instance) => (
        <InstancePanel key={instance.id} instance={instance} swarm={swarm} feed={feed} />
      ))}
      {swarm.instances.length === 0 && (
        <p class="panel note">
          No model is being served. <code>swarmd run MODEL</code> starts one; <code>swarmd models</code> lists what there is.
        </p>
      )}
      {Object.values(feed.transfers).map((transfer) => (
        <div class="panel" key={transfer.model}>
          <Progress label={`${transfer.model}: ${transfer.phase}`} progress={transfer} />
        </div>
      ))}
      {idle.length > 0 && (
        <section aria-labelledby="idle-title">
          <h2 id="idle-title" class="section-title">
            {swarm.instances.length > 0 ? "Without a stage" : "Nodes"}
          </h2>
          <ul class="idle">
            {idle.map((node) => (
              <NodeCard key={node.id} node={node} swarm={swarm} feed={feed} />
            ))}
          </ul>
        </section>
      )}
      <AddMachine alone={alone} />
    </>
  );
}
