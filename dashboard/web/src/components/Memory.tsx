import { formatBandwidth, formatBytes, formatCompute, fraction } from "../lib/format.ts";
import type { MemoryUse } from "../lib/swarm.ts";
import type { Device } from "../types.ts";

/** What the swarm may use of a device, and how much of it is held: by this stage, other stages, other programs. */
export function Memory({ use }: { use: MemoryUse }) {
  const held = use.own + use.others;
  const words = use.capped
    ? `${formatBytes(held)} of ${formatBytes(use.limit)} · ${formatBytes(use.total)} in all`
    : `${formatBytes(held)} of ${formatBytes(use.limit)}`;
  const part = (bytes: number) => ({ width: `${fraction(bytes, use.limit) * 100}%` });
  return (
    <div class="memory">
      <div class="bar" role="img" aria-label={`Memory: ${words}; ${formatBytes(use.taken)} held by other programs`}>
        {use.own > 0 && <i class="bar-own" style={part(use.own)} />}
        {use.others > 0 && <i class="bar-others" style={part(use.others)} />}
        {use.taken > 0 && <i class="bar-taken" style={part(use.taken)} title="Held by other programs" />}
      </div>
      <p class="memory-words" title={use.capped ? "Held by stages, limit of this node, memory of the device" : undefined}>{words}</p>
    </div>
  );
}

/** The rates measured on the device, after its name if wanted; a rate that was not measured is left out. */
export function DeviceFigures({ device, named = false }: { device: Device; named?: boolean }) {
  const figures = [
    device.memory_bandwidth > 0 && formatBandwidth(device.memory_bandwidth),
    device.compute > 0 && formatCompute(device.compute),
  ].filter(Boolean);
  return figures.length > 0 || named ? (
    <p class="measured" title={named ? device.name : "Measured memory bandwidth and compute"}>
      {named && `${device.name}${figures.length > 0 ? " · " : ""}`}
      <span class="hidden">Measured: </span>
      {figures.join(" · ")}
    </p>
  ) : null;
}
