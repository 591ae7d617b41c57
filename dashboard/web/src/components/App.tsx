import { useCallback, useState } from "preact/hooks";
import { useFeed } from "../hooks/useFeed.ts";
import { useModels } from "../hooks/useModels.ts";
import { servingSignature } from "../lib/swarm.ts";
import { hasApiKey, setApiKey } from "../net/client.ts";
import { ApiKeyDialog } from "./ApiKeyDialog.tsx";
import { ChatPanel } from "./ChatPanel.tsx";
import { ConnectionBanner } from "./ConnectionBanner.tsx";
import { Header } from "./Header.tsx";
import { Picture } from "./Picture.tsx";

/** The whole page: the picture of the swarm beside the chat. */
export function App() {
  const [attempt, setAttempt] = useState(0);
  const [chatNeedsKey, setChatNeedsKey] = useState(false);
  const feed = useFeed(attempt);
  const { connection, swarm } = feed;
  const models = useModels(`${attempt} ${servingSignature(swarm)}`);
  const again = useCallback(() => setAttempt((count) => count + 1), []);
  const onUnauthorized = useCallback(() => setChatNeedsKey(true), []);

  const saveKey = (key: string): void => {
    setChatNeedsKey(false);
    setApiKey(key);
    again();
  };
  const locked = connection.phase === "unauthorized" || chatNeedsKey;
  const away = connection.phase === "unreachable";

  return (
    <>
      <Header connection={connection} swarm={swarm} />
      {away && <ConnectionBanner since={connection.since} reason={connection.reason} onRetry={again} />}
      <main class="page">
        <section class={`picture${away ? " picture-stale" : ""}`} aria-label="The swarm">
          {swarm ? <Picture feed={feed} swarm={swarm} /> : <Waiting locked={locked} onAgain={again} />}
        </section>
        <ChatPanel models={models} serving={swarm?.instances ?? []} onUnauthorized={onUnauthorized} />
      </main>
      {locked && <ApiKeyDialog refused={hasApiKey()} onKey={saveKey} onDismiss={() => setChatNeedsKey(false)} />}
    </>
  );
}

function Waiting({ locked, onAgain }: { locked: boolean; onAgain: () => void }) {
  if (!locked) return <p class="note">Looking for the node…</p>;
  return (
    <p class="note">
      This node asks for its API key.{" "}
      <button type="button" class="button" onClick={onAgain}>
        Enter the key
      </button>
    </p>
  );
}
