// The server's API: requests with the key, errors that people can read, streams as async iterators.

import { apiKey } from "./store.js";

/** What went wrong. status: HTTP's, 0 when there was no answer. key: the one that was sent. */
export class ApiError extends Error {
  constructor(status, message, key = "") {
    super(message);
    this.status = status;
    this.key = key;
  }

  /** Whether a key is to be asked for: not when another has been given meanwhile. */
  get wantsKey() {
    return this.status === 401 && this.key === apiKey();
  }
}

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = apiKey();
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new ApiError(response.status, await explain(response), key);
  return response;
}

/** The sentence to show for a refused request. */
async function explain(response) {
  const text = await response.text().catch(() => "");
  let message = "";
  try {
    const body = JSON.parse(text);
    message = body.error?.message ?? (typeof body.detail === "string" ? body.detail : "");
  } catch {
    message = text.length < 300 && !text.includes("<") ? text : "";
  }
  const wait = response.headers.get("Retry-After");
  message ||= `The server answered ${response.status} ${response.statusText}`.trim();
  return response.status === 429 && wait ? `${message} Try again in ${wait} s.` : message;
}

export async function getJson(path, timeout = 10_000) {
  const response = await request(path, { signal: AbortSignal.timeout(timeout) }).catch((error) => {
    throw error instanceof ApiError ? error : new ApiError(0, "The server does not answer in time.");
  });
  return response.json();
}

/** The objects of an event stream, until [DONE]. Leaving early hangs up. Throws ApiError; AbortError when `signal` says so. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, "The connection ended before the answer did.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.code | 0 || 500, event.error.message ?? "The server ended the answer.");
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError(0, "The connection was lost while the answer came.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
