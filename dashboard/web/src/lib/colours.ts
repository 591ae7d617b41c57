import type { Swarm } from "../types.ts";

/** Number of `.colour-N` classes in styles/tokens.css. */
export const COLOURS = 8;

/**
 * Gives every node of the picture a colour index that stays its own while it is there. A newcomer takes the lowest index
 * that the fewest nodes have, so the first COLOURS nodes all differ; what a removed node had becomes free.
 */
export function assignColours(
  previous: Readonly<Record<string, number>>,
  swarm: Swarm,
): Readonly<Record<string, number>> {
  const ids = swarm.nodes.map((node) => node.id).sort();
  const uses = new Array<number>(COLOURS).fill(0);
  const colours: Record<string, number> = {};
  const take = (id: string, index: number): void => {
    colours[id] = index;
    uses[index] = (uses[index] ?? 0) + 1;
  };
  for (const id of ids) {
    const kept = previous[id];
    if (kept !== undefined) take(id, kept);
  }
  for (const id of ids) {
    if (colours[id] === undefined) take(id, uses.indexOf(Math.min(...uses)));
  }
  return colours;
}

/** The class that carries a node's colour as `--hue`. */
export function colourClass(colours: Readonly<Record<string, number>>, nodeId: string): string {
  const index = colours[nodeId];
  return index === undefined ? "colour-none" : `colour-${index}`;
}
