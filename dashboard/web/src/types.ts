/**
 * The JSON of `GET /api/swarm` and of the events of `GET /api/events`, field for field.
 * Bytes are bytes, memory_bandwidth is bytes/s, compute is FLOP/s, last_seen_s is seconds before the state was sent.
 */

export type DeviceKind = "cpu" | "cuda" | "metal" | "mlx";
export type NodeState = "alive" | "suspect" | "gone";
export type InstanceState = "planning" | "loading" | "ready" | "waiting" | "failed";

export interface Device {
  /** As stages name it: `cpu`, `cuda:0`, `metal`, `mlx-cpu`. */
  id: string;
  kind: DeviceKind;
  name: string;
  memory_total: number;
  memory_free: number;
  /** What the swarm may use of the device; equals memory_total when the user set no cap. */
  memory_limit: number;
  memory_bandwidth: number;
  compute: number;
}

export interface SwarmNode {
  id: string;
  name: string;
  state: NodeState;
  self: boolean;
  addresses: string[];
  version: string;
  devices: Device[];
  last_seen_s: number;
  rtt_ms: number | null;
}

/** Layers [start, end) of the model on one device of one node. */
export interface Stage {
  node: string;
  device: string;
  start: number;
  end: number;
  bytes: number;
}

export interface ByteCount {
  done_bytes: number;
  total_bytes: number;
}

export interface Load {
  running: number;
  waiting: number;
  kv_tokens_used: number;
  kv_tokens: number;
}

export interface Instance {
  id: string;
  model: string;
  state: InstanceState;
  reason: string;
  epoch: number;
  owner: string;
  stages: Stage[];
  explanation: string[];
  progress: ByteCount | null;
  load: Load;
}

export interface StoredModel {
  name: string;
  size: number;
  local: boolean;
}

export interface Swarm {
  self: string;
  swarm: string;
  version: string;
  nodes: SwarmNode[];
  instances: Instance[];
  models: StoredModel[];
}

/** Event `progress`: bytes of a model on their way to this node. */
export interface Transfer extends ByteCount {
  model: string;
  phase: string;
}
