/** Conversations in this browser's local storage, one entry each, and as files. */

const PREFIX = "mobilellm.conversation.";

/**
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} created When it began, as ISO 8601.
 * @property {string} changed When it last changed.
 * @property {string} system The system prompt, "" for none.
 * @property {Turn[]} turns
 * @typedef {object} Turn
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {string} [model] What answered.
 * @property {string} [finish] Why the answer ended: stop, length, stopped (by the person), lost.
 * @property {number} [tokens] How many it took.
 * @property {number} [rate] Tokens a second.
 */

export function newConversation(system = "") {
  const now = new Date().toISOString();
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, created: now, changed: now, system, turns: [] };
}

/** The first words of a conversation. */
export function titleOf(conversation) {
  const text = conversation.turns.find((turn) => turn.content.trim())?.content.trim() ?? "New conversation";
  const line = text.split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

/** Every kept conversation, the last changed first. What cannot be read is passed over. */
export function keptConversations() {
  const found = Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .map((key) => read(localStorage.getItem(key)))
    .filter((conversation) => conversation !== null);
  return found.sort((one, other) => other.changed.localeCompare(one.changed));
}

/** Keep a conversation. Throws an Error in words where the browser has no room for it. */
export function keep(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
  } catch {
    throw new Error("This browser has no room left for conversations. Save or delete some.");
  }
}

export function forget(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

export function isConversationKey(key) {
  return key === null || key.startsWith(PREFIX); // null: everything was deleted
}

/** As `/v1/chat/completions` takes it, with what else is known of it. */
export function asJson(conversation) {
  const { id, system, turns, ...rest } = conversation;
  const first = system ? [{ role: "system", content: system }] : [];
  return `${JSON.stringify({ ...rest, messages: [...first, ...turns] }, null, 2)}\n`;
}

/** The text of a saved file as a new conversation. Throws an Error in words for anything else. */
export function fromJson(text) {
  let messages;
  try {
    messages = JSON.parse(text).messages;
  } catch {
    throw new Error("This file is not JSON.");
  }
  const isMessage = (each) => typeof each?.role === "string" && typeof each?.content === "string";
  if (!Array.isArray(messages) || !messages.every(isMessage)) {
    throw new Error("This file holds no conversation: a list of messages with role and content.");
  }
  const system = messages.filter(({ role }) => role === "system").map(({ content }) => content);
  const turns = messages.filter(({ role }) => role === "user" || role === "assistant").map(cleanTurn);
  return { ...newConversation(system.join("\n")), turns };
}

export function asMarkdown(conversation, isChat) {
  const { system, turns } = conversation;
  if (!isChat) return `${turns.map((turn) => turn.content).join("")}\n`;
  const parts = turns.map(({ role, content, model }) => `**${role === "user" ? "You" : (model ?? "Model")}**\n\n${content}\n`);
  return [`# ${titleOf(conversation)}\n`, ...(system ? [`> ${system.replaceAll("\n", "\n> ")}\n`] : []), ...parts].join("\n");
}

function read(text) {
  try {
    const { id, created, changed, system, turns } = JSON.parse(text);
    const texts = [id, created, changed, system];
    if (!texts.every((value) => typeof value === "string") || !Array.isArray(turns)) return null;
    return { id, created, changed, system, turns: turns.map(cleanTurn) };
  } catch {
    return null; // another program's, or damaged
  }
}

/** A turn with nothing in it but what belongs there. */
function cleanTurn({ role, content, model, finish, tokens, rate }) {
  const text = (value) => (typeof value === "string" ? value : undefined);
  const number = (value) => (Number.isFinite(value) ? value : undefined);
  return {
    role: role === "user" ? "user" : "assistant",
    content: text(content) ?? "",
    model: text(model),
    finish: text(finish),
    tokens: number(tokens),
    rate: number(rate),
  };
}
