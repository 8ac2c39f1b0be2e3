/**
 * Runs the model: transformers.js reads its files and calls onnxruntime's WebAssembly; what is asked and
 * which token comes next are decided here, as the Python package does it.
 *
 * In:  {kind: "answer", number, request}, {kind: "stop", number}
 * Out: {kind: "loading", text, share}, {kind: "loaded", model}, {kind: "piece", number, piece},
 *      {kind: "ended", number}, {kind: "failed", number?, error: {kind, message}}
 */
import { Prompts } from "./prompts.js";
import { Sampler } from "./sampler.js";
import { TextStream, piecesOf } from "./text_stream.js";

const MODEL = "model";
const SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
]); // a function with two vector instructions
const PIECE = 64; // tokens of a prompt at once: between two pieces it can be stopped, and logits stay small

const stopped = new Set();
let queue = Promise.resolve();
let engine = null;

addEventListener("message", ({ data }) => {
  if (data.kind === "stop") stopped.add(data.number);
  else queue = queue.then(() => answered(data.number, data.request));
});

try {
  postMessage({ kind: "loaded", model: await load() });
} catch (error) {
  postMessage({ kind: "failed", error: { kind: "gone", message: error.message } });
}

async function load() {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(SIMD)) {
    throw new Error("This browser's WebAssembly has no vector instructions (SIMD). A newer browser has them.");
  }
  postMessage({ kind: "loading", text: "Starting the runtime …" });
  const { AutoModelForCausalLM, PreTrainedTokenizer, Tensor, env } = await import("./transformers.min.js");
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.useBrowserCache = false; // the browser keeps the files as their server says
  env.useWasmCache = false;
  env.localModelPath = new URL(".", self.location.href).href;
  env.backends.onnx.wasm.wasmPaths = {
    mjs: new URL("ort-wasm-simd-threaded.mjs", self.location.href).href,
    wasm: new URL("ort-wasm-simd-threaded.wasm", self.location.href).href,
  };
  const [card, tokenizer, config, special, template] = await Promise.all([
    file("card.json"), file("tokenizer.json"), file("tokenizer_config.json"), file("generation_config.json"),
    fetch(`${MODEL}/chat_template.jinja`).then((response) => (response.ok ? response.text() : null)),
  ]);
  const model = await AutoModelForCausalLM.from_pretrained(MODEL, {
    dtype: card.dtype,
    device: "wasm",
    progress_callback: loading,
  });
  // Special tokens are put in by their ids: as text, anybody could type them.
  const plain = new PreTrainedTokenizer({ ...tokenizer, added_tokens: [] }, config);
  engine = {
    model,
    Tensor,
    context: card.facts.context,
    eos: special.eos_token_id,
    prompts: new Prompts(plain, special, template),
    pieces: piecesOf(tokenizer.model.vocab),
    tokens: [],
    past: null,
  };
  return { name: card.name, isChat: template !== null, facts: { ...card.facts, threads: env.backends.onnx.wasm.numThreads } };
}

async function file(name) {
  const response = await fetch(`${MODEL}/${name}`);
  if (!response.ok) throw new Error(`${MODEL}/${name} is missing from this folder (${response.status}).`);
  return response.json();
}

function loading({ status, file, loaded, total }) {
  if (status !== "progress" || !file.includes(".onnx") || !total) return;
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  const text = `Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB`;
  postMessage({ kind: "loading", text, share: loaded / total });
}

async function answered(number, request) {
  try {
    for await (const piece of answer(number, request)) postMessage({ kind: "piece", number, piece });
    postMessage({ kind: "ended", number });
  } catch (error) {
    engine.past = null;
    const message = error instanceof RangeError ? error.message : `The model could not run: ${error.message ?? error}`;
    postMessage({ kind: "failed", number, error: { kind: "refused", message } });
  }
  stopped.delete(number);
}

/** The pieces of an answer, as a Backend gives them; none after it was stopped. */
async function* answer(number, request) {
  const { prompts, context, eos, pieces } = engine;
  const prompt = request.messages ? prompts.ofMessages(request.messages) : prompts.ofText(request.prompt);
  if (prompt.length >= context) {
    throw new RangeError(`This is ${prompt.length} tokens; the model reads ${context}. Begin a new conversation.`);
  }
  const most = Math.min(request.max_tokens ?? Infinity, context - prompt.length);
  const sampler = new Sampler(request);
  const stream = new TextStream(pieces, request.stop ?? [], prompt.length === 1);
  let logits = await read(prompt, number);
  let count = 0;
  let finish = "length";
  const start = performance.now();
  while (count < most && logits !== null) {
    const token = sampler.next(logits);
    count += 1;
    if (token === eos) finish = "stop";
    else yield { text: stream.push(token) };
    if (stream.isStopped) finish = "stop";
    if (finish === "stop" || count === most) break;
    logits = await read([...engine.tokens, token], number);
  }
  if (logits === null) return;
  const seconds = (performance.now() - start) / 1000;
  yield {
    text: stream.finish(),
    finish,
    usage: { prompt_tokens: prompt.length, completion_tokens: count, total_tokens: prompt.length + count },
    timings: { tokens_per_second: count > 1 ? (count - 1) / seconds : null },
  };
}

/** Logits after these tokens, or null once it was stopped. What is in the cache already is not read again. */
async function read(tokens, number) {
  const { model, Tensor } = engine;
  const isKnown = engine.past && engine.tokens.length < tokens.length && engine.tokens.every((id, place) => id === tokens[place]);
  if (!isKnown) Object.assign(engine, { tokens: [], past: null });
  let logits = null;
  while (engine.tokens.length < tokens.length) {
    await turn();
    if (stopped.has(number)) return null;
    const piece = tokens.slice(engine.tokens.length, engine.tokens.length + PIECE);
    const length = engine.tokens.length + piece.length;
    const outputs = await model({
      input_ids: new Tensor("int64", piece.map(BigInt), [1, piece.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]),
      past_key_values: engine.past,
    });
    const keys = Object.keys(outputs).filter((name) => name.startsWith("present."));
    engine.past = Object.fromEntries(keys.map((name) => [name.replace("present", "past_key_values"), outputs[name]]));
    engine.tokens.push(...piece);
    // Rows of the embedding beyond the vocabulary mean nothing.
    logits = outputs.logits.data.slice(-outputs.logits.dims.at(-1)).subarray(0, engine.pieces.length);
  }
  return logits;
}

const channel = new MessageChannel();

/** Let messages in: the runtime computes without a pause. */
function turn() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}
