/** What the page knows of the swarm: a pure reducer over the feed's events and the state of the connection. */
import type { Swarm, Transfer } from "../types.ts";
import { assignColours } from "./colours.ts";

export type Connection =
  | { phase: "connecting" }
  | { phase: "live" }
  | { phase: "unreachable"; since: number; reason: string }
  | { phase: "unauthorized" };

export interface FeedState {
  connection: Connection;
  swarm: Swarm | null;
  /** When `swarm` arrived, in ms; ages in it are relative to this. */
  receivedAt: number;
  /** Colour index per node id, kept while the node is in the picture. */
  colours: Readonly<Record<string, number>>;
  /** Bytes on their way to this node, per model. */
  transfers: Readonly<Record<string, Transfer>>;
}

export type FeedAction =
  | { type: "swarm"; swarm: Swarm; now: number }
  | { type: "progress"; transfer: Transfer }
  | { type: "connecting" }
  | { type: "lost"; reason: string; now: number }
  | { type: "unauthorized" };

export const initialFeed: FeedState = {
  connection: { phase: "connecting" },
  swarm: null,
  receivedAt: 0,
  colours: {},
  transfers: {},
};

export function feedReducer(state: FeedState, action: FeedAction): FeedState {
  switch (action.type) {
    case "swarm":
      return {
        connection: { phase: "live" },
        swarm: action.swarm,
        receivedAt: action.now,
        colours: assignColours(state.colours, action.swarm),
        transfers: unfinished(state.transfers, action.swarm),
      };
    case "progress":
      return { ...state, transfers: withTransfer(state.transfers, action.transfer) };
    case "connecting":
      // Only a refusal is over: an unreachable node stays so until it answers.
      return state.connection.phase === "unauthorized" ? { ...state, connection: { phase: "connecting" } } : state;
    case "lost":
      // A later failure keeps the moment of the first: the banner says how long the node has been away.
      return {
        ...state,
        connection: {
          phase: "unreachable",
          since: state.connection.phase === "unreachable" ? state.connection.since : action.now,
          reason: action.reason,
        },
        transfers: {},
      };
    case "unauthorized":
      return { ...state, connection: { phase: "unauthorized" }, transfers: {} };
  }
}

function withTransfer(transfers: FeedState["transfers"], transfer: Transfer): FeedState["transfers"] {
  const { [transfer.model]: _previous, ...others } = transfers;
  return transfer.done_bytes < transfer.total_bytes ? { ...others, [transfer.model]: transfer } : others;
}

/** A model that is served, or that failed, is no longer on its way, whatever the last progress event said. */
function unfinished(transfers: FeedState["transfers"], swarm: Swarm): FeedState["transfers"] {
  const settled = new Set(
    swarm.instances.filter((i) => i.state === "ready" || i.state === "failed").map((i) => i.model),
  );
  return Object.fromEntries(Object.entries(transfers).filter(([model]) => !settled.has(model)));
}
