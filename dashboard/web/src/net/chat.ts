import type { ChatMessage } from "../lib/chat.ts";
import { readChunk, type CompletionPart } from "../lib/completions.ts";
import { request } from "./client.ts";
import { events } from "./stream.ts";

/** The API's default of 1 lets small models ramble; `swarmd run` uses the same as this. */
const TEMPERATURE = 0;

/** Names of the models that `/v1/models` offers. Throws as `request`. */
export async function listModels(signal: AbortSignal): Promise<string[]> {
  const response = await request("/v1/models", { signal });
  const body = (await response.json()) as { data?: { id: string }[] };
  return (body.data ?? []).map((model) => model.id);
}

/**
 * Streams one answer. Ends after an `end` or `error` part; a stream that stops before either gives an error part, so that a
 * half answer is never taken for a whole one. Throws as `request`.
 */
export async function* complete(
  model: string,
  messages: ChatMessage[],
  signal: AbortSignal,
): AsyncGenerator<CompletionPart> {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      model,
      messages,
      temperature: TEMPERATURE,
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  for await (const { data } of events(response)) {
    for (const part of readChunk(data)) {
      yield part;
      if (part.type === "end" || part.type === "error") return;
    }
  }
  yield { type: "error", message: "The answer was cut off: the connection ended before it was complete." };
}
