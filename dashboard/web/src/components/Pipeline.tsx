import { useWidth } from "../hooks/useWidth.ts";
import { colourClass } from "../lib/colours.ts";
import type { FeedState } from "../lib/feed.ts";
import { flowLayout } from "../lib/layout.ts";
import type { Instance, Swarm } from "../types.ts";
import { StageCard } from "./StageCard.tsx";

interface Props {
  instance: Instance;
  swarm: Swarm;
  feed: FeedState;
}

/** The chain of stages: cards in pipeline order, activations flowing forward, token ids coming back to the driver. */
export function Pipeline({ instance, swarm, feed }: Props) {
  const [element, width] = useWidth();
  const layout = flowLayout(instance.stages.length, width);
  const arrow = `arrow-${instance.id}`;
  const active = instance.state === "ready" && instance.load.running > 0;
  return (
    <div class={active ? "flow-active" : ""}>
      <div ref={element} class="flow" style={{ height: `${layout.height}px` }}>
        <svg class="flow-lines" width={layout.width} height={layout.height} aria-hidden="true">
          <marker id={arrow} viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">
            <path class="arrow" d="M0 0 8 4 0 8z" />
          </marker>
          {layout.back && <path class="line line-back" d={layout.back} marker-end={`url(#${arrow})`} />}
          {layout.links.map((path, index) => (
            <path key={index} class="line" d={path} marker-end={`url(#${arrow})`} />
          ))}
        </svg>
        <ol class="stages">
          {instance.stages.map((stage, index) => {
            const box = layout.cards[index];
            if (!box) return null;
            return (
              <li
                key={`${stage.node} ${stage.device}`}
                class={`card stage ${colourClass(feed.colours, stage.node)}`}
                style={{ left: `${box.x}px`, top: `${box.y}px`, width: `${box.width}px`, height: `${box.height}px` }}
              >
                <StageCard stage={stage} driver={index === 0} swarm={swarm} receivedAt={feed.receivedAt} />
              </li>
            );
          })}
        </ol>
      </div>
      {layout.back && <Legend />}
    </div>
  );
}

function Legend() {
  return (
    <p class="legend" aria-hidden="true">
      <svg width="30" height="8">
        <path class="line" d="M0 4H30" />
      </svg>
      activations
      <svg width="30" height="8">
        <path class="line line-back" d="M0 4H30" />
      </svg>
      token ids
    </p>
  );
}
