import assert from "node:assert/strict";
import { test } from "node:test";
import { deviceOf, idleDevices, idleNodes, isAlone, memoryUse, nodeName, reasonsFor, servingSignature } from "../src/lib/swarm.ts";
import { device, instance, node, stage, swarm } from "./states.ts";

test("memory adds up: own stage, other stages, other programs, all within the limit", () => {
  const a = node("a");
  const own = stage("a", 0, 5);
  const state = swarm([a], [instance([own]), instance([stage("a", 0, 3)], { id: "j" })]);
  const use = memoryUse(state, a, a.devices[0]!, own);
  assert.deepEqual(use, { limit: 1000, total: 1000, own: 50, others: 30, taken: 120, capped: false });
});

test("other programs count only where they leave less than the cap", () => {
  const capped = device({ memory_limit: 600, memory_free: 900 });
  const tight = device({ memory_limit: 600, memory_free: 100 });
  const read = (d: typeof capped) => memoryUse(swarm([node("a", { devices: [d] })]), node("a", { devices: [d] }), d, null);
  assert.equal(read(capped).taken, 0);
  assert.equal(read(capped).capped, true);
  assert.equal(read(tight).taken, 500);
});

test("a stage's device is found by its id", () => {
  const gpus = [device({ id: "cuda:0", kind: "cuda", name: "RTX A" }), device({ id: "cuda:1", kind: "cuda", name: "RTX B" }), device()];
  const machine = node("a", { devices: gpus });
  assert.equal(deviceOf(machine, "cuda:1")?.name, "RTX B");
  assert.equal(deviceOf(machine, "cuda"), undefined);
  assert.equal(deviceOf(machine, "cpu")?.kind, "cpu");
  assert.equal(deviceOf(machine, "metal"), undefined);
});

test("nodes without a stage are those of no instance, with what the plan says of them", () => {
  const nodes = [node("a"), node("b", { name: "nas" }), node("c0ffee0011", { name: "nas2" })];
  const explanation = ["nas is left out: too small", "nas2 is slow", "c0ffee00 has no memory", "all is well"];
  const state = swarm(nodes, [instance([stage("a", 0, 1)], { explanation })]);
  assert.deepEqual(idleNodes(state).map((n) => n.id), ["b", "c0ffee0011"]);
  assert.deepEqual(reasonsFor(state, nodes[1]!), ["nas is left out: too small"]);
  assert.deepEqual(reasonsFor(state, nodes[2]!), ["nas2 is slow", "c0ffee00 has no memory"]);
});

test("a node with stages is idle as far as a device of it is, and each device holds its own", () => {
  const gpu = device({ id: "cuda:0", kind: "cuda", name: "RTX" });
  const [a, b] = [node("a", { name: "attic", devices: [gpu, device()] }), node("b")];
  const stages = [stage("a", 0, 5, { device: "cuda:0" }), stage("b", 5, 6)];
  const explanation = ["attic (cuda:0): layers 0 to 4", "attic (cpu) is left out"];
  const state = swarm([a, b], [instance(stages, { explanation })]);
  assert.deepEqual(idleNodes(state).map((n) => n.id), ["a"]);
  assert.deepEqual(idleDevices(state, a).map((d) => d.id), ["cpu"]);
  assert.deepEqual(reasonsFor(state, a), ["attic (cpu) is left out"]);
  assert.equal(memoryUse(state, a, gpu, null).others, 50);
  assert.equal(memoryUse(state, a, device(), null).others, 0);
});

test("a name that several nodes have says nothing of any of them", () => {
  const nodes = [node("a", { name: "vm" }), node("b", { name: "vm" }), node("c0ffee0011", { name: "vm", state: "gone" })];
  const explanation = ["vm: layers 0 to 14", "c0ffee00 is gone"];
  const state = swarm(nodes, [instance([stage("a", 0, 15)], { explanation })]);
  assert.deepEqual(reasonsFor(state, nodes[2]!), ["c0ffee00 is gone"]);
  assert.deepEqual(reasonsFor(state, nodes[1]!), []);
});

test("a name with special characters is matched as it is written", () => {
  const odd = node("0011223344", { name: "a.b (c)" });
  const state = swarm([odd], [instance([], { explanation: ["a.b (c) is out", "axb (c) is in"] })]);
  assert.deepEqual(reasonsFor(state, odd), ["a.b (c) is out"]);
});

test("a node that is gone is no company, and one that left the list still has a name", () => {
  assert.equal(isAlone(swarm([node("a"), node("b", { state: "gone" })])), true);
  assert.equal(isAlone(swarm([node("a"), node("b", { state: "suspect" })])), false);
  assert.equal(nodeName(swarm([]), "0123456789abcdef"), "01234567");
});

test("the models are asked for again when one becomes ready, not when the load changes", () => {
  const loading = swarm([], [instance([], { state: "loading" })]);
  const ready = swarm([], [instance([])]);
  const busy = swarm([], [instance([], { load: { running: 3, waiting: 0, kv_tokens_used: 9, kv_tokens: 10 } })]);
  assert.notEqual(servingSignature(loading), servingSignature(ready));
  assert.equal(servingSignature(ready), servingSignature(busy));
});
