/** One conversation with the model: asking, stopping, asking again, and keeping what was said. */
import { forget, keep } from "./conversations.js";

const KEEP_EVERY_MS = 1000;

/**
 * Told by its owner what to show:
 *
 * changed(): turns came or went, or the answering began or ended.
 * grew(text): the text of the last turn.
 * arrived(piece): a piece of an answer, as the backend gives it.
 * failed(error, isBack): a BackendError, or that the browser has no room. isBack: a message was returned.
 * returned(text, from): a message that cannot be answered as it is, no longer part of the conversation; it was
 *   to take the place of turn `from`, where that is not undefined.
 */
export class Talk {
  #backend;
  #told;
  #stopper = null;

  constructor(backend, conversation, told) {
    this.#backend = backend;
    this.conversation = conversation;
    this.#told = told;
  }

  get isAnswering() {
    return this.#stopper !== null;
  }

  /** Whether there is anything to go on from. */
  get isEmpty() {
    return this.conversation.turns.every(({ content }) => content === "");
  }

  /** Say something, in place of turn `from` and all after it if given. Resolves when the answer has ended. */
  async say(text, settings, from = this.conversation.turns.length) {
    const { turns } = this.conversation;
    const replaced = turns.splice(from);
    if (text !== "") turns.push({ role: "user", content: this.#backend.isChat ? text : joined(turns, text) });
    const failure = await this.#answer(settings);
    const isBack = failure?.kind === "refused" && text !== "" && turns.length === from + 1;
    if (isBack) this.#giveBack(text, replaced);
    if (failure) this.#told.failed(failure, isBack);
  }

  /** Another answer to what was said last. The one that was there comes back if nothing takes its place. */
  async again(settings) {
    const { turns } = this.conversation;
    const before = turns.at(-1)?.role === "assistant" ? turns.pop() : null;
    const count = turns.length;
    const failure = await this.#answer(settings);
    const isUnanswered = turns.length === count;
    const isBack = failure?.kind === "refused" && isUnanswered && turns.at(-1)?.role === "user" && before === null;
    if (isBack) this.#giveBack(turns.at(-1).content, []);
    else if (isUnanswered && before !== null) {
      turns.push(before);
      this.keep();
      this.#told.changed();
    }
    if (failure) this.#told.failed(failure, isBack);
  }

  stop() {
    this.#stopper?.abort();
  }

  /** Write it to the browser's storage, and say so where that fails. */
  keep() {
    if (this.conversation.turns.length === 0) return;
    try {
      keep(this.conversation);
    } catch (error) {
      this.#told.failed(error);
    }
  }

  /** Whatever is said next would be refused with it: the last message goes back to who wrote it. */
  #giveBack(text, replaced) {
    const { turns } = this.conversation;
    turns.splice(turns.length - 1, 1, ...replaced);
    if (turns.length === 0) forget(this.conversation);
    this.keep();
    this.#told.changed();
    this.#told.returned(text, replaced.length > 0 ? turns.length - replaced.length : undefined);
  }

  /** Resolves to what went wrong, or null. */
  async #answer(settings) {
    const request = { ...this.#asked(), ...settings };
    const turn = { role: "assistant", content: "", model: this.#backend.name };
    this.conversation.turns.push(turn);
    this.conversation.changed = new Date().toISOString();
    this.#stopper = new AbortController();
    this.#told.changed();
    let failure = null;
    try {
      await this.#read(turn, request, this.#stopper.signal);
    } catch (error) {
      const isStopped = error.name === "AbortError";
      turn.finish = isStopped ? "stopped" : "lost";
      failure = isStopped ? null : error;
    }
    this.#stopper = null;
    if (turn.content === "" && turn.finish !== "stop" && turn.finish !== "length") this.conversation.turns.pop();
    this.keep();
    this.#told.changed();
    return failure;
  }

  async #read(turn, request, signal) {
    let kept = performance.now();
    for await (const piece of this.#backend.answer(request, signal)) {
      if (piece.text) {
        turn.content += piece.text;
        this.#told.grew(turn.content);
      }
      turn.finish = piece.finish ?? turn.finish;
      turn.tokens = piece.usage?.completion_tokens ?? turn.tokens;
      turn.rate = piece.timings?.tokens_per_second ?? turn.rate;
      this.#told.arrived(piece);
      if (performance.now() - kept > KEEP_EVERY_MS) {
        kept = performance.now();
        this.keep();
      }
    }
  }

  #asked() {
    const { system, turns } = this.conversation;
    if (!this.#backend.isChat) return { prompt: turns.map(({ content }) => content).join("") };
    const first = system.trim() ? [{ role: "system", content: system }] : [];
    return { messages: [...first, ...turns.map(({ role, content }) => ({ role, content }))] };
  }
}

/** Text as it is written on to turns: with a space between two words. */
function joined(turns, text) {
  const before = turns.map(({ content }) => content).join("");
  return /\S$/.test(before) && /^[\p{L}\p{N}]/u.test(text) ? ` ${text}` : text;
}
