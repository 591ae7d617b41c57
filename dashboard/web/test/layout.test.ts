import assert from "node:assert/strict";
import { test } from "node:test";
import { flowLayout, type Box } from "../src/lib/layout.ts";

const apart = (a: Box, b: Box): boolean =>
  a.x + a.width <= b.x || b.x + b.width <= a.x || a.y + a.height <= b.y || b.y + b.height <= a.y;

test("at any width cards lie inside, apart from each other, each beside its successor", () => {
  for (const count of [1, 2, 3, 5, 8, 13]) {
    for (const width of [280, 360, 640, 904, 1200]) {
      const { cards, links, height } = flowLayout(count, width);
      assert.equal(cards.length, count);
      assert.equal(links.length, count - 1);
      cards.forEach((card, index) => {
        const name = `card ${index} of ${count} at ${width}`;
        assert.ok(card.x >= 0 && card.x + card.width <= width + 0.01, name);
        assert.ok(card.y >= 0 && card.y + card.height <= height, name);
        for (const other of cards.slice(index + 1)) assert.ok(apart(card, other), name);
        const next = cards[index + 1];
        if (next) assert.ok((card.x === next.x) !== (card.y === next.y), `${name} and its successor share a row or a column`);
      });
    }
  }
});

test("links lead from edge to edge in the direction of the flow", () => {
  const wide = flowLayout(2, 904);
  const [first, second] = wide.cards as [Box, Box];
  assert.equal(wide.links[0], `M${first.width + first.x} 92H${second.x - 7}`);
  const narrow = flowLayout(2, 320);
  assert.equal(narrow.links[0], `M${30 + 290 / 2} 184V${184 + 44 - 7}`);
});

test("token ids come back to the driver, unless there is only one stage", () => {
  assert.equal(flowLayout(1, 904).back, null);
  const { back, cards } = flowLayout(3, 904);
  assert.match(back ?? "", new RegExp(`^M${(cards[2] as Box).x + (cards[2] as Box).width / 2} 184V.*H23$`));
  assert.deepEqual(flowLayout(0, 904).cards, []);
});
