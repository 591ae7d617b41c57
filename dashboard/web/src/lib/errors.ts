/** The message of an error body, `{"error": {"message": ...}}` (OpenAI's shape) or `{"error": "..."}`; else the fallback. */
export function messageOf(body: unknown, fallback: string): string {
  if (typeof body !== "object" || body === null || !("error" in body)) return fallback;
  const { error } = body;
  if (typeof error === "string" && error) return error;
  if (typeof error === "object" && error !== null && "message" in error && typeof error.message === "string") {
    return error.message || fallback;
  }
  return fallback;
}
