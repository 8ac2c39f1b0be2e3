/**
 * A model that runs in this browser, in a worker: takes the place of the page's module of the same name.
 *
 * See that one for what `connect` promises.
 */
import { BackendError } from "./backend_error.js";

/** @returns {Promise<object>} A Backend, once the model is loaded. `report` is told how far that is. */
export async function connect({ report }) {
  const worker = new Worker("model_worker.js", { type: "module" });
  const { promise: loaded, resolve, reject } = Promise.withResolvers();
  const gone = () => new BackendError("gone", "The browser could not start the worker that runs the model.");
  worker.addEventListener("error", () => reject(gone()));
  worker.addEventListener("message", ({ data }) => {
    if (data.kind === "loading") report(data.text, data.share);
    else if (data.kind === "loaded") resolve(data.model);
    else if (data.kind === "failed" && data.number === undefined) reject(asError(data.error));
  });
  const model = await loaded;
  let count = 0;
  return { ...model, answer: (request, signal) => answer(worker, (count += 1), request, signal) };
}

async function* answer(worker, number, request, signal) {
  const messages = [];
  let wake = () => {};
  const arrived = ({ data }) => {
    if (data.number === number) messages.push(data);
    wake();
  };
  const stop = () => {
    worker.postMessage({ kind: "stop", number });
    wake();
  };
  worker.addEventListener("message", arrived);
  signal.addEventListener("abort", stop);
  try {
    worker.postMessage({ kind: "answer", number, request });
    for (;;) {
      signal.throwIfAborted();
      const message = messages.shift();
      if (message === undefined) await new Promise((resolve) => (wake = resolve));
      else if (message.kind === "failed") throw asError(message.error);
      else if (message.kind === "ended") return;
      else yield message.piece;
    }
  } finally {
    worker.removeEventListener("message", arrived);
    signal.removeEventListener("abort", stop);
  }
}

function asError({ kind, message }) {
  return new BackendError(kind, message);
}
