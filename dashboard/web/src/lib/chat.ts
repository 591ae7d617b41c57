/** The conversation as a pure reducer; times are milliseconds of one clock, passed in. */

export type AnswerState = "streaming" | "done" | "stopped" | "failed";

export interface Timing {
  startedAt: number;
  firstAt: number | null;
  lastAt: number | null;
  /** Pieces of text received: the count of tokens until the server says it exactly. */
  pieces: number;
  tokens: number | null;
}

export interface Answer {
  model: string;
  text: string;
  state: AnswerState;
  error: string;
  /** The server's finish_reason: "length" means that the answer was cut at a limit. */
  finish: string;
  timing: Timing;
}

export interface Turn {
  id: number;
  question: string;
  answer: Answer;
}

export interface ChatState {
  turns: readonly Turn[];
  nextId: number;
}

export type ChatAction =
  | { type: "ask"; question: string; model: string; now: number }
  | { type: "retry"; model: string; now: number }
  | { type: "delta"; text: string; now: number }
  | { type: "usage"; tokens: number }
  | { type: "finish"; reason: string }
  | { type: "end" }
  | { type: "stop" }
  | { type: "fail"; message: string }
  | { type: "clear" };

export interface ChatMessage {
  role: "user" | "assistant";
  content: string;
}

export const emptyChat: ChatState = { turns: [], nextId: 1 };

export function chatReducer(state: ChatState, action: ChatAction): ChatState {
  switch (action.type) {
    case "ask": {
      const turn = { id: state.nextId, question: action.question, answer: newAnswer(action.model, action.now) };
      return { turns: [...state.turns, turn], nextId: state.nextId + 1 };
    }
    case "retry":
      return withLast(state, () => newAnswer(action.model, action.now));
    case "delta":
      return whileStreaming(state, (answer) => addText(answer, action.text, action.now));
    case "usage":
      return whileStreaming(state, (answer) => ({ ...answer, timing: { ...answer.timing, tokens: action.tokens } }));
    case "finish":
      return whileStreaming(state, (answer) => ({ ...answer, finish: action.reason }));
    case "end":
      return whileStreaming(state, (answer) => ({ ...answer, state: "done" }));
    case "stop":
      return whileStreaming(state, (answer) => ({ ...answer, state: "stopped" }));
    case "fail":
      return whileStreaming(state, (answer) => ({ ...answer, state: "failed", error: action.message }));
    case "clear":
      return { ...emptyChat, nextId: state.nextId };
  }
}

export function isStreaming(state: ChatState): boolean {
  return state.turns.at(-1)?.answer.state === "streaming";
}

/**
 * What is sent for the last question. Turns that gave no text are left out whole, because many chat templates refuse two
 * questions in a row; the last question is always there.
 */
export function conversation(state: ChatState): ChatMessage[] {
  return state.turns.flatMap((turn, index): ChatMessage[] => {
    const question: ChatMessage = { role: "user", content: turn.question };
    if (index === state.turns.length - 1) return [question];
    return turn.answer.text ? [question, { role: "assistant", content: turn.answer.text }] : [];
  });
}

export interface AnswerStats {
  /** Seconds from sending to the first text; null while there is none. */
  timeToFirst: number | null;
  tokens: number;
  /** Tokens after the first, over the time they took; null until there are two. */
  tokensPerSecond: number | null;
}

export function answerStats(timing: Timing): AnswerStats {
  const { startedAt, firstAt, lastAt } = timing;
  const tokens = timing.tokens ?? timing.pieces;
  const seconds = firstAt !== null && lastAt !== null ? (lastAt - firstAt) / 1000 : 0;
  return {
    timeToFirst: firstAt === null ? null : (firstAt - startedAt) / 1000,
    tokens,
    tokensPerSecond: seconds > 0 && tokens > 1 ? (tokens - 1) / seconds : null,
  };
}

function newAnswer(model: string, now: number): Answer {
  const timing = { startedAt: now, firstAt: null, lastAt: null, pieces: 0, tokens: null };
  return { model, text: "", state: "streaming", error: "", finish: "", timing };
}

function addText(answer: Answer, text: string, now: number): Answer {
  const { timing } = answer;
  return {
    ...answer,
    text: answer.text + text,
    timing: { ...timing, firstAt: timing.firstAt ?? now, lastAt: now, pieces: timing.pieces + 1 },
  };
}

function withLast(state: ChatState, change: (answer: Answer) => Answer): ChatState {
  const last = state.turns.at(-1);
  if (!last) return state;
  return { ...state, turns: [...state.turns.slice(0, -1), { ...last, answer: change(last.answer) }] };
}

/** An event that arrives after the answer has ended (stopped, failed) changes nothing. */
function whileStreaming(state: ChatState, change: (answer: Answer) => Answer): ChatState {
  return isStreaming(state) ? withLast(state, change) : state;
}
