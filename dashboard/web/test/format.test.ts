import assert from "node:assert/strict";
import { test } from "node:test";
import { formatAgo, formatBytes, formatLayers, formatSeconds, fraction, scaled } from "../src/lib/format.ts";

test("bytes read as in `swarmd status`: decimal units, three figures", () => {
  const cases: [number, string][] = [
    [0, "0 B"],
    [999, "999 B"],
    [1000, "1.0 kB"],
    [1_234_567, "1.2 MB"],
    [99_400_000, "99.4 MB"],
    [600_000_000, "600 MB"],
    [999_600_000, "1.0 GB"],
    [8_000_000_000, "8.0 GB"],
  ];
  for (const [bytes, words] of cases) assert.equal(formatBytes(bytes), words);
});

test("a unit beyond the last prefix stays at the last prefix", () => {
  assert.equal(scaled(5e18, "FLOP/s"), "5000 PFLOP/s");
});

test("seconds choose the unit a person would", () => {
  const words = [0.314, 3.26, 9.96, 61, 300, 7200, 200_000].map(formatSeconds);
  assert.deepEqual(words, ["0.31 s", "3.3 s", "10 s", "61 s", "5 min", "2 h", "2 d"]);
  assert.equal(formatAgo(0.4), "just now");
  assert.equal(formatAgo(4.7), "4 s ago");
});

test("layers are half-open in the plan and closed in words", () => {
  assert.equal(formatLayers(0, 20), "layers 0–19");
  assert.equal(formatLayers(29, 30), "layer 29");
});

test("a fraction stays within 0 and 1, whatever the counts say", () => {
  assert.deepEqual([fraction(1, 0), fraction(5, 4), fraction(-1, 4), fraction(1, 4)], [0, 1, 0, 0.25]);
});
