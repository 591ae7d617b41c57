import { colourClass } from "../lib/colours.ts";
import type { FeedState } from "../lib/feed.ts";
import { idleDevices, memoryUse, reasonsFor } from "../lib/swarm.ts";
import type { Swarm, SwarmNode } from "../types.ts";
import { DeviceFigures, Memory } from "./Memory.tsx";
import { NodeTitle } from "./NodeTitle.tsx";

interface Props {
  node: SwarmNode;
  swarm: Swarm;
  feed: FeedState;
}

/** What of a node holds no stage: what it could carry, and what the plan says about leaving it out. */
export function NodeCard({ node, swarm, feed }: Props) {
  const reasons = reasonsFor(swarm, node);
  return (
    <li class={`card node ${colourClass(feed.colours, node.id)}${node.state === "gone" ? " node-absent" : ""}`}>
      <NodeTitle node={node} receivedAt={feed.receivedAt} />
      {reasons.map((reason, index) => (
        <p key={index} class="node-reason">
          {reason}
        </p>
      ))}
      {idleDevices(swarm, node).map((device) => (
        <div key={device.id} class="device">
          <p class="device-name" title={device.name}>
            <span class="tag">{device.id}</span> {device.name !== device.id && device.name}
          </p>
          <Memory use={memoryUse(swarm, node, device, null)} />
          <DeviceFigures device={device} />
        </div>
      ))}
      {node.addresses.length > 0 && <p class="addresses">{node.addresses.join("  ")}</p>}
      {node.version !== swarm.version && <p class="node-reason">runs version {node.version}</p>}
    </li>
  );
}
