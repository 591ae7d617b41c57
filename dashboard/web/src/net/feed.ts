import type { FeedAction } from "../lib/feed.ts";
import type { Swarm, Transfer } from "../types.ts";
import { ApiError, request } from "./client.ts";
import { events, Silence, within } from "./stream.ts";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;
const ANSWER_MS = 10_000;
/** Each connection begins with the whole state, so connecting anew after a silence costs little and proves the node alive. */
const IDLE_MS = 30_000;

type Dispatch = (action: FeedAction) => void;

/**
 * Follows `/api/events` until `signal` aborts, connecting anew by itself with growing pauses. EventSource would do the same
 * but cannot send an API key. Returns after an `unauthorized` action: only a new key can help then.
 */
export async function followFeed(dispatch: Dispatch, signal: AbortSignal): Promise<void> {
  let pause = FIRST_PAUSE_MS;
  const heard: Dispatch = (action) => {
    pause = FIRST_PAUSE_MS;
    dispatch(action);
  };
  while (!signal.aborted) {
    const error = await connection(heard, signal);
    if (signal.aborted) return;
    if (error instanceof ApiError && error.status === 401) return dispatch({ type: "unauthorized" });
    if (error instanceof Silence) continue;
    dispatch({ type: "lost", reason: error.message, now: Date.now() });
    await sleep(pause, signal);
    pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
  }
}

/** One connection from beginning to end; why it ended. */
async function connection(dispatch: Dispatch, signal: AbortSignal): Promise<Error> {
  const attempt = new AbortController();
  const headers = { Accept: "text/event-stream" };
  const both = AbortSignal.any([signal, attempt.signal]);
  try {
    const response = await within(request("/api/events", { signal: both, headers }), ANSWER_MS, Error);
    for await (const { event, data } of events(response, IDLE_MS)) {
      const action = readEvent(event, data);
      if (action) dispatch(action);
    }
    return new Error("The node closed the connection.");
  } catch (error) {
    return error instanceof Error ? error : new Error(String(error));
  } finally {
    attempt.abort();
  }
}

/** Throws for data that is not JSON. Events of other names are for later versions of the page. */
function readEvent(event: string, data: string): FeedAction | null {
  try {
    if (event === "swarm") return { type: "swarm", swarm: JSON.parse(data) as Swarm, now: Date.now() };
    if (event === "progress") return { type: "progress", transfer: JSON.parse(data) as Transfer };
    return null;
  } catch {
    throw new Error("The node sent something that this page cannot read.");
  }
}

function sleep(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
