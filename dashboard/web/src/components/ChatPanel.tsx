import { useState } from "preact/hooks";
import { useChat } from "../hooks/useChat.ts";
import type { Models } from "../hooks/useModels.ts";
import type { Instance } from "../types.ts";
import { Composer } from "./Composer.tsx";
import { Conversation } from "./Conversation.tsx";

interface Props {
  models: Models;
  serving: Instance[];
  onUnauthorized: () => void;
}

const EXAMPLES = ["What is the capital of France?", "Explain a pipeline in one sentence.", "Write a haiku about old laptops."];

/** The chat box. The conversation is kept while the page is open, whatever happens to the connection. */
export function ChatPanel({ models, serving, onUnauthorized }: Props) {
  const chat = useChat(onUnauthorized);
  const [draft, setDraft] = useState("");
  const { turns } = chat.state;
  const ready = models.chosen !== "";
  const ask = (question: string): void => {
    chat.ask(question, models.chosen);
    setDraft("");
  };
  return (
    <section id="chat" class="chat" aria-label="Chat">
      <header class="chat-header">
        <label class="model">
          <span class="hidden">Model</span>
          <select
            value={models.chosen}
            disabled={!ready}
            onChange={(event) => models.choose(event.currentTarget.value)}
          >
            {!ready && <option value="">No model yet</option>}
            {models.names.map((name) => (
              <option key={name} value={name}>
                {name}
              </option>
            ))}
          </select>
        </label>
        {turns.length > 0 && (
          <button type="button" class="button button-quiet" onClick={chat.clear}>
            New conversation
          </button>
        )}
      </header>
      {turns.length > 0 ? (
        <Conversation chat={chat} onRetry={() => chat.retry(models.chosen)} />
      ) : (
        <div class="chat-empty">
          <p class="chat-invitation">{ready ? "Ask the swarm something." : notReady(serving)}</p>
          {ready && (
            <ul class="examples">
              {EXAMPLES.map((example) => (
                <li key={example}>
                  <button type="button" class="button" onClick={() => ask(example)}>
                    {example}
                  </button>
                </li>
              ))}
            </ul>
          )}
        </div>
      )}
      <Composer draft={draft} onDraft={setDraft} chat={chat} ready={ready} onAsk={ask} />
    </section>
  );
}

function notReady(serving: Instance[]): string {
  return serving.some((instance) => instance.state === "planning" || instance.state === "loading")
    ? "The model is still loading; the chat opens when it is ready."
    : "The chat opens when a model is being served.";
}
