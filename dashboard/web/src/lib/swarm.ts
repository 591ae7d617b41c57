/** Readings of the swarm's state that the picture needs. Pure. */
import type { Device, Instance, Stage, Swarm, SwarmNode } from "../types.ts";
import { shortId } from "./format.ts";

export interface MemoryUse {
  /** Scale of the bar: what the swarm may use of the device. */
  limit: number;
  total: number;
  /** Bytes of the stage that the bar belongs to, and of the swarm's other stages on the same device. */
  own: number;
  others: number;
  /** Part of the limit that other programs hold right now. */
  taken: number;
  capped: boolean;
}

export function nodeById(swarm: Swarm, id: string): SwarmNode | undefined {
  return swarm.nodes.find((node) => node.id === id);
}

/** Name, or the short id where the name is empty or the node has left the list. */
export function nodeName(swarm: Swarm, id: string): string {
  return nodeById(swarm, id)?.name || shortId(id);
}

/** The device that a stage names, if its node still has it. */
export function deviceOf(node: SwarmNode, stageDevice: string): Device | undefined {
  return node.devices.find((device) => device.id === stageDevice);
}

/** Bytes of all stages, of every instance, on one device of a node. */
export function stageBytes(swarm: Swarm, node: SwarmNode, device: Device): number {
  return swarm.instances
    .flatMap((instance) => instance.stages)
    .filter((stage) => stage.node === node.id && stage.device === device.id)
    .reduce((sum, stage) => sum + stage.bytes, 0);
}

export function memoryUse(swarm: Swarm, node: SwarmNode, device: Device, stage: Stage | null): MemoryUse {
  const total = device.memory_total;
  const limit = device.memory_limit > 0 ? Math.min(device.memory_limit, total) : total;
  const all = stageBytes(swarm, node, device);
  const own = stage ? Math.min(stage.bytes, all) : 0;
  const taken = Math.min(Math.max(0, limit - device.memory_free - all), Math.max(0, limit - all));
  return { limit, total, own, others: all - own, taken, capped: limit < total };
}

export function layerCount(instance: Instance): number {
  return instance.stages.reduce((most, stage) => Math.max(most, stage.end), 0);
}

/** Ids of the devices of a node that hold stages. */
function busyDevices(swarm: Swarm, node: SwarmNode): Set<string> {
  const stages = swarm.instances.flatMap((instance) => instance.stages);
  return new Set(stages.filter((stage) => stage.node === node.id).map((stage) => stage.device));
}

/** Devices of a node that hold no stage of any instance. */
export function idleDevices(swarm: Swarm, node: SwarmNode): Device[] {
  const busy = busyDevices(swarm, node);
  return node.devices.filter((device) => !busy.has(device.id));
}

/** Nodes of which a device, or all there is, holds no stage of any instance. */
export function idleNodes(swarm: Swarm): SwarmNode[] {
  return swarm.nodes.filter((node) => busyDevices(swarm, node).size === 0 || idleDevices(swarm, node).length > 0);
}

/**
 * The lines of the plans' explanations that speak of what is idle of this node: by its id or by its name (as a whole word,
 * and if no other node has it), and of a node that holds stages only those that name an idle device.
 */
export function reasonsFor(swarm: Swarm, node: SwarmNode): string[] {
  const unique = swarm.nodes.every((other) => other.id === node.id || other.name !== node.name);
  const lines = swarm.instances.flatMap((instance) => instance.explanation).filter((line) => mentions(line, node, unique));
  if (busyDevices(swarm, node).size === 0) return lines;
  const idle = idleDevices(swarm, node).map((device) => `(${device.id})`);
  return lines.filter((line) => idle.some((id) => line.includes(id)));
}

function mentions(line: string, node: SwarmNode, byName: boolean): boolean {
  if (line.includes(shortId(node.id))) return true;
  if (!node.name || !byName) return false;
  const literal = node.name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return new RegExp(`(^|[^\\w-])${literal}($|[^\\w-])`).test(line);
}

/** True when this node is the only member: the page then says how to add the next machine. */
export function isAlone(swarm: Swarm): boolean {
  return swarm.nodes.filter((node) => node.state !== "gone").length <= 1;
}

/** Changes exactly when the list of servable models may have: the chat then asks for it again. */
export function servingSignature(swarm: Swarm | null): string {
  if (!swarm) return "";
  const instances = swarm.instances.map((instance) => `${instance.model}=${instance.state}`);
  return [...instances, ...swarm.models.map((model) => model.name)].sort().join("\n");
}
