/** Numbers for people. Decimal units, as in `--memory 600MB` and in the output of `swarmd status`. */

const PREFIXES = ["", "k", "M", "G", "T", "P"];

/** `scaled(1234567, "B")` -> `1.2 MB`; three significant figures at most. */
export function scaled(value: number, unit: string): string {
  let rest = value;
  let power = 0;
  while (Math.abs(rest) >= 999.5 && power < PREFIXES.length - 1) {
    rest /= 1000;
    power += 1;
  }
  const digits = power === 0 || Math.abs(rest) >= 99.5 ? 0 : 1;
  return `${rest.toFixed(digits)} ${PREFIXES[power] ?? ""}${unit}`;
}

export const formatBytes = (bytes: number): string => scaled(bytes, "B");
export const formatBandwidth = (bytesPerSecond: number): string => scaled(bytesPerSecond, "B/s");
export const formatCompute = (flops: number): string => scaled(flops, "FLOP/s");

/** Seconds as `0.31 s`, `12 s`, `4 min`, `3 h`, `2 d`. */
export function formatSeconds(seconds: number): string {
  const value = Math.max(0, seconds);
  if (value < 9.95) return `${value.toFixed(value < 1 ? 2 : 1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 90 * 60) return `${Math.round(value / 60)} min`;
  if (value < 36 * 3600) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} d`;
}

/** How long ago, for a badge that need not tick every tenth of a second. */
export function formatAgo(seconds: number): string {
  return seconds < 1 ? "just now" : `${formatSeconds(Math.floor(seconds)).replace(".0", "")} ago`;
}

export function formatMilliseconds(ms: number): string {
  return ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`;
}

export function formatRate(perSecond: number): string {
  return perSecond < 99.5 ? perSecond.toFixed(1) : perSecond.toFixed(0);
}

export function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** The half-open range [start, end) as people count: `layer 4`, `layers 0–16`. */
export function formatLayers(start: number, end: number): string {
  return end - start === 1 ? `layer ${start}` : `layers ${start}–${end - 1}`;
}

/** A node id or swarm tag, short enough to read aloud. */
export const shortId = (id: string): string => id.slice(0, 8);

/** done/total in 0..1, safe for a total of zero. */
export function fraction(done: number, total: number): number {
  return total > 0 ? Math.min(1, Math.max(0, done / total)) : 0;
}
