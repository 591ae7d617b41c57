/** Requests to the node that served this page, with the API key where one is needed. */
import { messageOf } from "../lib/errors.ts";

const KEY_NAME = "swarmd-api-key";

/** The node answered, and refused. */
export class ApiError extends Error {
  readonly status: number;

  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}

/** The node did not answer at all. */
export class Unreachable extends Error {}

/** Kept for this tab only; where the browser forbids storage, until the page is left. */
let key: string | null = readKey();

export function hasApiKey(): boolean {
  return key !== null;
}

export function setApiKey(value: string): void {
  key = value;
  try {
    sessionStorage.setItem(KEY_NAME, value);
  } catch {
    // Storage is forbidden: the variable serves.
  }
}

function readKey(): string | null {
  try {
    return sessionStorage.getItem(KEY_NAME);
  } catch {
    return null;
  }
}

/** The response of `path`; throws ApiError for a status that is not 2xx, Unreachable, or the AbortError of `init.signal`. */
export async function request(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new Unreachable("The node does not answer.");
  }
  if (response.ok) return response;
  const body: unknown = await response.json().catch(() => null);
  throw new ApiError(response.status, messageOf(body, `The node answered with status ${response.status}.`));
}
