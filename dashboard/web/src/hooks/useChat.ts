import { useCallback, useEffect, useReducer, useRef } from "preact/hooks";
import { chatReducer, conversation, emptyChat, isStreaming, type ChatAction, type ChatState } from "../lib/chat.ts";
import type { CompletionPart } from "../lib/completions.ts";
import { complete } from "../net/chat.ts";
import { ApiError } from "../net/client.ts";

export interface Chat {
  state: ChatState;
  streaming: boolean;
  ask: (question: string, model: string) => void;
  retry: (model: string) => void;
  stop: () => void;
  clear: () => void;
}

/** The conversation and the one answer that may be under way. `onUnauthorized` is called when the API wants a key. */
export function useChat(onUnauthorized: () => void): Chat {
  const [state, dispatch] = useReducer(chatReducer, emptyChat);
  const running = useRef<AbortController | null>(null);
  const stop = useCallback(() => {
    running.current?.abort();
    dispatch({ type: "stop" });
  }, []);
  useEffect(() => stop, [stop]);

  const run = (action: ChatAction & { type: "ask" | "retry" }): void => {
    if (running.current && !running.current.signal.aborted) return;
    const controller = new AbortController();
    running.current = controller;
    const messages = conversation(chatReducer(state, action));
    dispatch(action);
    void answer(action.model, messages, controller.signal, dispatch, onUnauthorized).finally(() => controller.abort());
  };

  return {
    state,
    streaming: isStreaming(state),
    ask: (question, model) => run({ type: "ask", question, model, now: performance.now() }),
    retry: (model) => run({ type: "retry", model, now: performance.now() }),
    stop,
    clear: () => {
      stop();
      dispatch({ type: "clear" });
    },
  };
}

async function answer(
  model: string,
  messages: Parameters<typeof complete>[1],
  signal: AbortSignal,
  dispatch: (action: ChatAction) => void,
  onUnauthorized: () => void,
): Promise<void> {
  // Parts of an answer that was stopped must not reach the next one.
  const send = (action: ChatAction): void => {
    if (!signal.aborted) dispatch(action);
  };
  try {
    for await (const part of complete(model, messages, signal)) send(actionFor(part));
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) onUnauthorized();
    send({ type: "fail", message: error instanceof Error ? error.message : String(error) });
  }
}

function actionFor(part: CompletionPart): ChatAction {
  switch (part.type) {
    case "text":
      return { type: "delta", text: part.text, now: performance.now() };
    case "usage":
      return part;
    case "finish":
      return part;
    case "error":
      return { type: "fail", message: part.message };
    case "end":
      return { type: "end" };
  }
}
