import { useNow } from "../hooks/useNow.ts";
import { formatAgo } from "../lib/format.ts";

interface Props {
  since: number;
  reason: string;
  onRetry: () => void;
}

/** Says that what is shown may be out of date, since when, and that the page keeps trying. */
export function ConnectionBanner({ since, reason, onRetry }: Props) {
  const now = useNow(true);
  return (
    <div class="banner">
      <p>
        <strong>This node cannot be reached.</strong> {reason} Contact was lost {formatAgo((now - since) / 1000)}; the page
        keeps trying. Is <code>swarmd</code> still running?
      </p>
      <button type="button" class="button" onClick={onRetry}>
        Try now
      </button>
    </div>
  );
}
