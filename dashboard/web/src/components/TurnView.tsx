import { answerStats, type Answer, type Turn } from "../lib/chat.ts";
import { formatRate, formatSeconds, plural } from "../lib/format.ts";

interface Props {
  turn: Turn;
  last: boolean;
  onRetry: () => void;
}

/** A question and its answer. Text stays text: it is never read as HTML. */
export function TurnView({ turn, last, onRetry }: Props) {
  const { answer } = turn;
  const streaming = answer.state === "streaming";
  return (
    <>
      <article class="message message-user" aria-label="You">
        {turn.question}
      </article>
      <article class="message message-model" aria-label={answer.model}>
        {answer.text && <div class={streaming ? "answer answer-open" : "answer"}>{answer.text}</div>}
        {streaming && !answer.text && <p class="thinking">Reading the prompt…</p>}
        {answer.state === "failed" && (
          <p class="error" role="alert">
            {answer.error}
          </p>
        )}
        {!streaming && <Ending answer={answer} />}
        {last && <Stats answer={answer} />}
        {last && (answer.state === "failed" || answer.state === "stopped") && (
          <button type="button" class="button" onClick={onRetry}>
            Try again
          </button>
        )}
      </article>
    </>
  );
}

function Ending({ answer }: { answer: Answer }) {
  if (answer.state === "stopped") return <p class="ending">Stopped.</p>;
  if (answer.finish === "length") return <p class="ending">Cut at the length limit.</p>;
  return answer.state === "done" && !answer.text ? <p class="ending">The model gave no text.</p> : null;
}

function Stats({ answer }: { answer: Answer }) {
  const { timeToFirst, tokens, tokensPerSecond } = answerStats(answer.timing);
  if (timeToFirst === null) return null;
  return (
    <p class="stats">
      {tokensPerSecond !== null && <span>{formatRate(tokensPerSecond)} tokens/s</span>}
      <span>first token {formatSeconds(timeToFirst)}</span>
      <span>{plural(tokens, "token")}</span>
    </p>
  );
}
