import { formatBytes, formatLayers, plural, shortId } from "../lib/format.ts";
import { deviceOf, memoryUse, nodeById } from "../lib/swarm.ts";
import type { Stage, Swarm } from "../types.ts";
import { DeviceFigures, Memory } from "./Memory.tsx";
import { NodeTitle } from "./NodeTitle.tsx";

interface Props {
  stage: Stage;
  driver: boolean;
  swarm: Swarm;
  receivedAt: number;
}

/** One stage and the device that holds it. */
export function StageCard({ stage, driver, swarm, receivedAt }: Props) {
  const node = nodeById(swarm, stage.node);
  const device = node && deviceOf(node, stage.device);
  return (
    <>
      {node ? (
        <NodeTitle node={node} receivedAt={receivedAt} />
      ) : (
        <h3 class="node-name">{shortId(stage.node)} has left</h3>
      )}
      <p class="stage-layers">
        <span class="stage-range">{formatLayers(stage.start, stage.end)}</span>
        {driver && (
          <span class="tag tag-driver" title="The driver schedules this instance's sequences">
            driver
          </span>
        )}
      </p>
      <p class="facts">
        <span>{plural(stage.end - stage.start, "layer")}</span>
        <span>{formatBytes(stage.bytes)}</span>
        <span title={device?.name}>{stage.device}</span>
      </p>
      {node && device && (
        <>
          <Memory use={memoryUse(swarm, node, device, stage)} />
          <DeviceFigures device={device} named={device.kind !== "cpu"} />
        </>
      )}
    </>
  );
}
