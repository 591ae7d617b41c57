/** Where the stages of a pipeline stand, and the lines between them. Pure geometry in CSS pixels, origin at the top left. */

export interface Box {
  x: number;
  y: number;
  width: number;
  height: number;
}

export interface FlowLayout {
  width: number;
  height: number;
  cards: Box[];
  /** SVG path data, card i to card i + 1: activations. */
  links: string[];
  /** SVG path data, last card back to the first: token ids. Null for a single stage, which keeps them. */
  back: string | null;
}

export const CARD_HEIGHT = 184;
const MIN_CARD = 236;
/** A lone stage need not be as wide as the whole panel. */
const MAX_LONE_CARD = 460;
const GAP = 44;
const GUTTER = 30;
const CORNER = 14;

/**
 * Lays `count` cards out in rows of as many as fit in `width`. Rows alternate in direction, so that each card stands next to
 * its successor and no line crosses a card. The way back runs below the last card and up a gutter at the left.
 */
export function flowLayout(count: number, width: number, cardHeight: number = CARD_HEIGHT): FlowLayout {
  if (count === 0) return { width, height: 0, cards: [], links: [], back: null };
  const gutter = count > 1 ? GUTTER : 0;
  const inner = Math.max(1, width - gutter);
  const columns = Math.max(1, Math.min(count, Math.floor((inner + GAP) / (MIN_CARD + GAP))));
  const cardWidth = Math.min(count === 1 ? MAX_LONE_CARD : inner, (inner - GAP * (columns - 1)) / columns);
  const cards = Array.from({ length: count }, (_, index): Box => {
    const row = Math.floor(index / columns);
    const place = row % 2 === 0 ? index % columns : columns - 1 - (index % columns);
    return {
      x: gutter + place * (cardWidth + GAP),
      y: row * (cardHeight + GAP),
      width: cardWidth,
      height: cardHeight,
    };
  });
  const rows = Math.ceil(count / columns);
  const height = rows * cardHeight + (rows - 1) * GAP + (count > 1 ? GUTTER : 0);
  const links = cards.slice(1).map((to, index) => linkPath(cards[index] as Box, to));
  return { width, height, cards, links, back: count > 1 ? backPath(cards) : null };
}

/** A straight line between neighbours, stopping short of the card so that the arrow head has room. */
function linkPath(from: Box, to: Box): string {
  const reach = 7;
  if (from.y !== to.y) {
    const x = from.x + from.width / 2;
    return `M${x} ${from.y + from.height}V${to.y - reach}`;
  }
  const y = from.y + from.height / 2;
  return to.x > from.x ? `M${from.x + from.width} ${y}H${to.x - reach}` : `M${from.x} ${y}H${to.x + to.width + reach}`;
}

function backPath(cards: Box[]): string {
  const first = cards[0] as Box;
  const last = cards[cards.length - 1] as Box;
  const x = 6;
  const startX = last.x + last.width / 2;
  const floor = last.y + last.height + GUTTER - 12;
  const endY = first.y + first.height / 2;
  return [
    `M${startX} ${last.y + last.height}`,
    `V${floor - CORNER}`,
    `q0 ${CORNER} ${-CORNER} ${CORNER}`,
    `H${x + CORNER}`,
    `q${-CORNER} 0 ${-CORNER} ${-CORNER}`,
    `V${endY + CORNER}`,
    `q0 ${-CORNER} ${CORNER} ${-CORNER}`,
    `H${first.x - 7}`,
  ].join("");
}
