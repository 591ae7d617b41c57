import assert from "node:assert/strict";
import { test } from "node:test";
import { SseParser } from "../src/lib/sse.ts";

const STREAM = [
  ": a comment\n\n",
  "event: swarm\ndata: {\"a\":1}\n\n",
  "data: first\r\ndata: second\r\n\r\n",
  "data:no space\rdata\r\revent: empty\n\n",
  "id: 7\nunknown: x\ndata: äöü\n\n",
].join("");

const EVENTS = [
  { event: "swarm", data: '{"a":1}' },
  { event: "message", data: "first\nsecond" },
  { event: "message", data: "no space\n" },
  { event: "message", data: "äöü" },
];

test("events are the same however the bytes were cut on the way", () => {
  assert.deepEqual(new SseParser().push(STREAM), EVENTS);
  for (let size = 1; size < 20; size += 1) {
    const parser = new SseParser();
    const events = [];
    for (let at = 0; at < STREAM.length; at += size) events.push(...parser.push(STREAM.slice(at, at + size)));
    assert.deepEqual(events, EVENTS, `pieces of ${size}`);
  }
});

test("an event that has not ended is not given", () => {
  assert.deepEqual(new SseParser().push("data: half"), []);
  assert.deepEqual(new SseParser().push("data: half\n"), []);
});

test("a stream that never ends an event is refused before it fills the memory", () => {
  const line = `data: ${"x".repeat(1024 * 1024)}\n`;
  const parser = new SseParser();
  assert.throws(() => {
    for (let count = 0; count < 9; count += 1) parser.push(line);
  }, RangeError);
});
