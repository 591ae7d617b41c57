import { formatBytes, fraction } from "../lib/format.ts";
import type { ByteCount } from "../types.ts";

/** Bytes done of bytes in all, as a bar and in words. */
export function Progress({ label, progress }: { label: string; progress: ByteCount }) {
  const share = fraction(progress.done_bytes, progress.total_bytes);
  return (
    <div class="progress">
      <div class="progress-words">
        <span>{label}</span>
        <span class="figures">
          {formatBytes(progress.done_bytes)} of {formatBytes(progress.total_bytes)}
        </span>
      </div>
      <progress aria-label={label} value={share} max={1} />
    </div>
  );
}
