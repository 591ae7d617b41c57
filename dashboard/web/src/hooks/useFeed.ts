import { useEffect, useReducer } from "preact/hooks";
import { feedReducer, initialFeed, type FeedState } from "../lib/feed.ts";
import { followFeed } from "../net/feed.ts";

/** The live state of the swarm. A change of `attempt` connects anew at once: another API key, or a person who won't wait. */
export function useFeed(attempt: number): FeedState {
  const [state, dispatch] = useReducer(feedReducer, initialFeed);
  useEffect(() => {
    const controller = new AbortController();
    dispatch({ type: "connecting" });
    void followFeed(dispatch, controller.signal);
    return () => controller.abort();
  }, [attempt]);
  return state;
}
