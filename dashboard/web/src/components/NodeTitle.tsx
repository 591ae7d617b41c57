import { useNow } from "../hooks/useNow.ts";
import { formatAgo, formatMilliseconds, shortId } from "../lib/format.ts";
import type { NodeState, SwarmNode } from "../types.ts";

const WORDS: Record<NodeState, string> = { alive: "alive", suspect: "suspected", gone: "gone" };

/** Name, state and place of a node. For one that is silent, how long it has been. */
export function NodeTitle({ node, receivedAt }: { node: SwarmNode; receivedAt: number }) {
  const silent = node.state !== "alive";
  const now = useNow(silent);
  const age = node.last_seen_s + Math.max(0, now - receivedAt) / 1000;
  const detail = silent ? `seen ${formatAgo(age)}` : node.rtt_ms === null ? "" : formatMilliseconds(node.rtt_ms);
  return (
    <div class="node-title">
      <h3 class="node-name" title={`${node.name} · ${shortId(node.id)} · ${node.addresses.join(", ")}`}>
        {node.name || shortId(node.id)}
      </h3>
      {node.self && <span class="tag">this node</span>}
      <span class={`node-state node-${node.state}`}>
        <span class="dot" aria-hidden="true" />
        {WORDS[node.state]}
        {detail && <span title={silent ? undefined : "Round trip between this node and that one"}>· {detail}</span>}
      </span>
    </div>
  );
}
