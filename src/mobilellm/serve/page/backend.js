/**
 * The model behind `mobilellm serve`: the only module of the page that knows where answers come from.
 *
 * Whatever takes its place exports `connect`, with the same promises, and throws the same errors.
 */
import { BackendError } from "./backend_error.js";
import { events } from "./event_stream.js";

/**
 * Find the model that the server runs.
 *
 * @param {{key?: string, report?: (text: string, share: number) => void}} options `key`: the server's API
 *   key. `report` is told how far loading is; a server has done that already.
 * @returns {Promise<Backend>}
 * @typedef {object} Backend
 * @property {string} name What the model is called.
 * @property {boolean} isChat Whether it was trained to answer; otherwise it continues a text.
 * @property {object} facts What is known of it, by the names of `/v1/models`.
 * @property {(request: object, signal: AbortSignal) => AsyncGenerator<Piece>} answer `request` holds
 *   `messages` or `prompt`, and settings by OpenAI's names. Aborting `signal` ends it and frees its place.
 * @typedef {{text?: string, finish?: string, usage?: object, timings?: object}} Piece
 */
export async function connect({ key } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetched("v1/models", { headers });
  const model = (await response.json())?.data?.[0];
  if (!model) throw new BackendError("gone", "The server names no model.");
  const facts = model.mobilellm ?? {};
  return {
    name: model.id,
    isChat: Boolean(facts.is_chat),
    facts,
    answer: (request, signal) => answer({ model: model.id, ...request }, headers, signal),
  };
}

async function* answer(request, headers, signal) {
  const path = request.messages ? "v1/chat/completions" : "v1/completions";
  const response = await fetched(path, {
    method: "POST",
    headers: { ...headers, "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let isFinished = false;
  try {
    for await (const event of events(response.body)) {
      if (event.error) throw new BackendError("refused", event.error.message);
      const choice = event.choices?.[0];
      const finish = choice?.finish_reason ?? undefined;
      isFinished ||= finish !== undefined;
      const text = choice?.delta?.content ?? choice?.text ?? "";
      yield { text, finish, usage: event.usage ?? undefined, timings: event.timings ?? undefined };
    }
  } catch (error) {
    if (error instanceof BackendError || error.name === "AbortError") throw error;
    throw new BackendError("lost", "The connection was lost in the middle of the answer.");
  }
  if (!isFinished) throw new BackendError("lost", "The server ended the answer before it was finished.");
}

/** A response that is fine, or a BackendError that says in words what is wrong. */
async function fetched(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new BackendError("gone", "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? said?.detail ?? `The server answered ${response.status}.`;
  if (response.status === 401) throw new BackendError("key", message);
  if (response.status === 429 || response.status === 503) {
    const seconds = Number(response.headers.get("Retry-After")) || 1;
    throw new BackendError("busy", "The server is busy with other requests.", seconds);
  }
  throw new BackendError("refused", message);
}
