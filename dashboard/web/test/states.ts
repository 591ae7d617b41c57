/** States of a swarm for the tests. */
import type { Device, Instance, Stage, Swarm, SwarmNode } from "../src/types.ts";

export function device(changes: Partial<Device> = {}): Device {
  const memory = { memory_total: 1000, memory_free: 800, memory_limit: 1000 };
  return { id: "cpu", kind: "cpu", name: "cpu", ...memory, memory_bandwidth: 1, compute: 1, ...changes };
}

export function node(id: string, changes: Partial<SwarmNode> = {}): SwarmNode {
  const place = { addresses: [], version: "1", last_seen_s: 0, rtt_ms: null };
  return { id, name: `name-${id}`, state: "alive", self: false, devices: [device()], ...place, ...changes };
}

export function stage(nodeId: string, start: number, end: number, changes: Partial<Stage> = {}): Stage {
  return { node: nodeId, device: "cpu", start, end, bytes: (end - start) * 10, ...changes };
}

export function instance(stages: Stage[], changes: Partial<Instance> = {}): Instance {
  const load = { running: 0, waiting: 0, kv_tokens_used: 0, kv_tokens: 100 };
  const plan = { reason: "", epoch: 1, owner: "a", explanation: [], progress: null };
  return { id: "i", model: "m", state: "ready", stages, load, ...plan, ...changes };
}

export function swarm(nodes: SwarmNode[], instances: Instance[] = []): Swarm {
  return { self: "a", swarm: "tag", version: "1", nodes, instances, models: [] };
}
