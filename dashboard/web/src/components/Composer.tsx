import { useEffect, useRef } from "preact/hooks";
import type { Chat } from "../hooks/useChat.ts";

interface Props {
  draft: string;
  onDraft: (text: string) => void;
  chat: Chat;
  ready: boolean;
  onAsk: (question: string) => void;
}

/** Where the next question is written. Enter sends, Shift+Enter breaks the line; while an answer runs, the button stops it. */
export function Composer({ draft, onDraft, chat, ready, onAsk }: Props) {
  const area = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    const box = area.current;
    if (!box) return;
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight}px`;
  }, [draft]);

  const possible = ready && !chat.streaming && draft.trim() !== "";
  const send = (): void => {
    if (possible) onAsk(draft.trim());
  };
  const onKeyDown = (event: KeyboardEvent): void => {
    // While an input method composes a character, Enter chooses it and must not send.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  };
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      <label class="hidden" for="question">
        Message
      </label>
      <textarea
        id="question"
        ref={area}
        rows={1}
        value={draft}
        placeholder="Message"
        aria-describedby="composer-help"
        onInput={(event) => onDraft(event.currentTarget.value)}
        onKeyDown={onKeyDown}
      />
      {chat.streaming ? (
        <button key="stop" type="button" class="button button-stop" onClick={chat.stop}>
          Stop
        </button>
      ) : (
        <button key="send" type="submit" class="button button-primary" disabled={!possible}>
          Send
        </button>
      )}
      <p id="composer-help" class="composer-help">
        Enter sends, Shift+Enter starts a new line
      </p>
    </form>
  );
}
