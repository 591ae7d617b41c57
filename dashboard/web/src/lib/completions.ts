/** One `data:` line of a streamed /v1/chat/completions (OpenAI's format), read into what the chat does with it. Pure. */
import { messageOf } from "./errors.ts";

export type CompletionPart =
  | { type: "text"; text: string }
  | { type: "usage"; tokens: number }
  | { type: "finish"; reason: string }
  | { type: "error"; message: string }
  | { type: "end" };

interface Chunk {
  choices?: { delta?: { content?: string | null }; finish_reason?: string | null }[];
  usage?: { completion_tokens?: number } | null;
  error?: unknown;
}

/** Never throws: a line that is not the format's JSON is an error part, which ends the answer with a reason. */
export function readChunk(data: string): CompletionPart[] {
  if (data === "[DONE]") return [{ type: "end" }];
  const chunk = parse(data);
  if (!chunk) return [{ type: "error", message: "The node sent an event that this page cannot read." }];
  if (chunk.error !== undefined) return [{ type: "error", message: messageOf(chunk, "The answer failed.") }];
  const parts: CompletionPart[] = [];
  const choice = chunk.choices?.[0];
  if (choice?.delta?.content) parts.push({ type: "text", text: choice.delta.content });
  if (choice?.finish_reason) parts.push({ type: "finish", reason: choice.finish_reason });
  const tokens = chunk.usage?.completion_tokens;
  if (typeof tokens === "number") parts.push({ type: "usage", tokens });
  return parts;
}

function parse(data: string): Chunk | null {
  try {
    const value: unknown = JSON.parse(data);
    return typeof value === "object" && value !== null ? value : null;
  } catch {
    return null;
  }
}
