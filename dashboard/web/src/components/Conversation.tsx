import { useEffect, useRef } from "preact/hooks";
import type { Chat } from "../hooks/useChat.ts";
import { TurnView } from "./TurnView.tsx";

/** How near to the end, in pixels, still counts as reading along. */
const NEAR = 60;

/** All turns, scrolled along with the answer unless the reader has scrolled away from its end. */
export function Conversation({ chat, onRetry }: { chat: Chat; onRetry: () => void }) {
  const { turns } = chat.state;
  const log = useRef<HTMLDivElement>(null);
  const follow = useRef(true);
  useEffect(() => {
    follow.current = true;
  }, [turns.length]);
  useEffect(() => {
    const box = log.current;
    if (box && follow.current) box.scrollTop = box.scrollHeight;
  }, [turns]);
  const onScroll = (): void => {
    const box = log.current;
    if (box) follow.current = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR;
  };
  return (
    <div
      ref={log}
      class="log"
      role="log"
      aria-label="Conversation"
      aria-busy={chat.streaming}
      tabIndex={0}
      onScroll={onScroll}
    >
      {turns.map((turn, index) => (
        <TurnView key={turn.id} turn={turn} last={index === turns.length - 1} onRetry={onRetry} />
      ))}
    </div>
  );
}
