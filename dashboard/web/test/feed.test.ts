import assert from "node:assert/strict";
import { test } from "node:test";
import { COLOURS } from "../src/lib/colours.ts";
import { feedReducer, initialFeed, type FeedAction, type FeedState } from "../src/lib/feed.ts";
import { instance, node, swarm } from "./states.ts";

const reduce = (actions: FeedAction[], from: FeedState = initialFeed): FeedState => actions.reduce(feedReducer, from);
const seen = (ids: string[], now = 0): FeedAction => ({ type: "swarm", swarm: swarm(ids.map((id) => node(id))), now });
const transfer = (done: number): FeedAction => ({
  type: "progress",
  transfer: { model: "m", phase: "download", done_bytes: done, total_bytes: 100 },
});

test("the first state makes the page live; a loss keeps what was shown", () => {
  const live = reduce([seen(["a"], 5)]);
  assert.deepEqual(live.connection, { phase: "live" });
  const lost = feedReducer(live, { type: "lost", reason: "gone", now: 9 });
  assert.equal(lost.swarm, live.swarm);
  assert.deepEqual(lost.connection, { phase: "unreachable", since: 9, reason: "gone" });
});

test("repeated failures keep the moment of the first, and only an answer ends them", () => {
  const state = reduce([
    { type: "lost", reason: "one", now: 1 },
    { type: "connecting" },
    { type: "lost", reason: "two", now: 7 },
  ]);
  assert.deepEqual(state.connection, { phase: "unreachable", since: 1, reason: "two" });
  assert.equal(feedReducer(state, seen(["a"])).connection.phase, "live");
});

test("a refusal for want of a key ends when another attempt begins", () => {
  const refused = reduce([{ type: "unauthorized" }]);
  assert.equal(refused.connection.phase, "unauthorized");
  assert.equal(feedReducer(refused, { type: "connecting" }).connection.phase, "connecting");
});

test("a transfer is shown until it is whole, its model is served, or the node is lost", () => {
  const half = reduce([seen(["a"]), transfer(50)]);
  assert.equal(half.transfers["m"]?.done_bytes, 50);
  assert.deepEqual(feedReducer(half, transfer(100)).transfers, {});
  assert.deepEqual(feedReducer(half, { type: "lost", reason: "", now: 0 }).transfers, {});
  const ready: FeedAction = { type: "swarm", swarm: swarm([node("a")], [instance([])]), now: 0 };
  assert.deepEqual(feedReducer(half, ready).transfers, {});
  const loading: FeedAction = { type: "swarm", swarm: swarm([], [instance([], { state: "loading" })]), now: 0 };
  assert.equal(feedReducer(half, loading).transfers["m"]?.done_bytes, 50);
});

test("a node keeps its colour while others come and go, and colours differ while they last", () => {
  const first = reduce([seen(["m", "z"])]);
  const later = feedReducer(first, seen(["a", "m", "q"]));
  assert.equal(later.colours["m"], first.colours["m"]);
  assert.deepEqual(Object.keys(later.colours).sort(), ["a", "m", "q"]);
  const many = Array.from({ length: COLOURS }, (_, index) => `n${index}`);
  assert.equal(new Set(Object.values(reduce([seen(many)]).colours)).size, COLOURS);
  const crowd = Array.from({ length: 2 * COLOURS }, (_, index) => `n${index}`);
  assert.equal(Math.max(...Object.values(reduce([seen(crowd)]).colours)), COLOURS - 1);
});
