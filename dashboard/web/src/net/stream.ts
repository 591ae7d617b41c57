import { SseParser, type SseEvent } from "../lib/sse.ts";
import { Unreachable } from "./client.ts";

/** Nothing was heard for a while, though nobody closed the connection. */
export class Silence extends Error {}

/**
 * The events of a response, as they arrive. `idleMs`: with no byte for so long, throws Silence, since a machine that sleeps
 * or loses its network closes nothing. Throws Unreachable when the stream breaks; leaving early cancels it.
 */
export async function* events(response: Response, idleMs = Infinity): AsyncGenerator<SseEvent> {
  if (!response.body) return;
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = new SseParser();
  try {
    for (;;) {
      const { done, value } = await within(read(reader), idleMs, Silence);
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    // Cancelling a stream that has failed already is refused; there is nothing more to do about it.
    reader.cancel().catch(() => undefined);
  }
}

/** `work`, or an error of type `Late` when it takes longer than `ms`. */
export async function within<T>(work: Promise<T>, ms: number, Late: new (message: string) => Error): Promise<T> {
  if (ms === Infinity) return work;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Late("The node does not answer.")), ms);
  });
  return Promise.race([work, late]).finally(() => clearTimeout(timer));
}

async function read(reader: ReadableStreamDefaultReader<Uint8Array<ArrayBuffer>>) {
  try {
    return await reader.read();
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Unreachable("The connection to the node was lost.");
  }
}
