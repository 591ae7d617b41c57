/** Server-Sent Events, incrementally: text in, whole events out (WHATWG HTML, 9.2.6; `id` and `retry` are not used here). */

export interface SseEvent {
  event: string;
  data: string;
}

/** More than any event of a node; a stream that never ends a line must not fill the tab's memory. */
const MAX_PENDING = 8 * 1024 * 1024;

export class SseParser {
  private pending = "";
  private event = "";
  private data: string[] = [];
  private pendingData = 0;

  /** Takes the next piece of decoded text, gives the events that it completes. Throws RangeError past MAX_PENDING. */
  push(text: string): SseEvent[] {
    this.pending += text;
    const events: SseEvent[] = [];
    for (;;) {
      const end = this.pending.search(/[\r\n]/);
      // A lone CR at the very end may be the first half of CRLF: wait for the next piece.
      if (end < 0 || (this.pending[end] === "\r" && end + 1 === this.pending.length)) break;
      const width = this.pending.startsWith("\r\n", end) ? 2 : 1;
      const line = this.pending.slice(0, end);
      this.pending = this.pending.slice(end + width);
      const event = this.takeLine(line);
      if (event) events.push(event);
    }
    if (this.pending.length + this.pendingData > MAX_PENDING) throw new RangeError("an event of the stream is too long");
    return events;
  }

  private takeLine(line: string): SseEvent | null {
    if (line === "") return this.dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this.event = value;
    if (field === "data") {
      this.data.push(value);
      this.pendingData += value.length;
    }
    return null;
  }

  private dispatch(): SseEvent | null {
    const event = this.data.length > 0 ? { event: this.event || "message", data: this.data.join("\n") } : null;
    this.event = "";
    this.data = [];
    this.pendingData = 0;
    return event;
  }
}
