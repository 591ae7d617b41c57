import { colourClass } from "../lib/colours.ts";
import { formatLayers } from "../lib/format.ts";
import { layerCount, nodeName } from "../lib/swarm.ts";
import type { Instance, Swarm } from "../types.ts";

interface Props {
  instance: Instance;
  swarm: Swarm;
  colours: Readonly<Record<string, number>>;
}

/** All layers in one line, each stage as wide as its share. The stage cards below say the same in words. */
export function LayerStrip({ instance, swarm, colours }: Props) {
  const layers = layerCount(instance);
  return (
    <div class="strip" aria-hidden="true">
      {instance.stages.map((stage) => {
        const share = (stage.end - stage.start) / layers;
        const name = nodeName(swarm, stage.node);
        return (
          <div
            key={stage.start}
            class={`strip-part ${colourClass(colours, stage.node)}`}
            style={{ flexGrow: share * 1000 }}
            title={`${name}: ${formatLayers(stage.start, stage.end)}`}
          >
            <span>{stage.end - stage.start === 1 ? stage.start : `${stage.start}–${stage.end - 1}`}</span>
          </div>
        );
      })}
    </div>
  );
}
