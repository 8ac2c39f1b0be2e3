/** The page: what a person does on one side, the model behind `backend.js` on the other. */
import { connect } from "./backend.js";
import { Composer } from "./composer.js";
import { ConversationList } from "./conversation_list.js";
import * as conversations from "./conversations.js";
import { Drawer } from "./drawer.js";
import { Meters } from "./meters.js";
import { showModelCard } from "./model_card.js";
import { Notice } from "./notice.js";
import { Settings } from "./settings.js";
import { Talk } from "./talk.js";
import { Turns } from "./turns.js";

const SUGGESTIONS = {
  chat: ["Why is the sky blue? Answer in two sentences.", "Write a short poem about the sea.", "Name three fruits."],
  text: ["Once upon a time", "The door opened, and", "It was a dark evening when the old man"],
};
const CURRENT = "mobilellm.current";
const byId = (id) => document.getElementById(id);

const settings = new Settings();
const meters = new Meters();
const notice = new Notice();
const sidebar = new Drawer(byId("conversations"), byId("show-conversations"), true);
new Drawer(byId("settings"), byId("show-settings"), false);
const turns = new Turns({
  again: () => run((talk) => talk.again(settings.values())),
  edit: (number) => composer.edit(number),
});
const composer = new Composer((text, from) =>
  run(
    () => talk.say(text, settings.values(), from),
    () => composer.takeBack(text, from),
  ),
);
const list = new ConversationList({ open, remove });

let backend = null;
let talk = null;

/** Find the model, and begin where this browser left off. */
async function start(key = sessionKey()) {
  byId("loading").hidden = false;
  report("Looking for the model …");
  try {
    backend = await connect({ key, report });
  } catch (error) {
    failed(error, () => start());
    return;
  } finally {
    byId("loading").hidden = true;
  }
  document.body.classList.add(backend.isChat ? "chat-mode" : "text-mode");
  document.title = backend.name;
  byId("model").textContent = backend.name;
  byId("system-field").hidden = !backend.isChat;
  showModelCard(backend);
  meters.memory(backend.facts.memory_bytes);
  const kept = conversations.keptConversations();
  begin(kept.find(({ id }) => id === localStorage.getItem(CURRENT)) ?? conversations.newConversation());
}

/** Make a conversation the one on the page. */
function begin(conversation) {
  talk?.stop();
  const last = conversation.turns.at(-1);
  if (last?.role === "assistant" && !last.finish) last.finish = "lost"; // the page was left in the middle
  const begun = new Talk(backend, conversation, {
    changed: () => begun === talk && changed(),
    grew: (text) => begun === talk && turns.grow(text),
    arrived: (piece) => begun === talk && arrived(piece),
    returned: (text, from) => begun === talk && composer.takeBack(text, from),
    failed: (error, isBack) =>
      begun === talk && failed(error, isBack ? undefined : () => run(() => begun.again(settings.values()))),
  });
  talk = begun;
  composer.begin(talk, backend.isChat);
  localStorage.setItem(CURRENT, conversation.id);
  byId("system").value = conversation.system;
  meters.forgetContext();
  notice.hide();
  changed();
  turns.toEnd();
  composer.focus();
}

/** Have the model write, unless a setting is none: then `refused` is called. */
async function run(action, refused = () => {}) {
  if (!talk || talk.isAnswering) return;
  const invalid = settings.firstInvalid();
  if (invalid) {
    refused();
    notice.show(`${invalid.labels[0].firstChild.textContent.trim()}: ${invalid.validationMessage}`);
    return;
  }
  notice.hide();
  meters.begin();
  announce("The model is writing.");
  await action(talk);
}

function changed() {
  const { conversation, isAnswering } = talk;
  turns.show(conversation.turns, backend.isChat, backend.name, isAnswering);
  list.show(conversation.id);
  welcome(conversation.turns.length === 0);
  byId("send").hidden = isAnswering;
  byId("stop").hidden = !isAnswering;
  if (!isAnswering && document.activeElement === document.body) composer.focus(); // the stop button has gone
  composer.update();
}

function arrived(piece) {
  if (piece.text) meters.arrived();
  if (piece.usage || piece.timings) meters.finished(piece, backend.facts.context);
  if (piece.finish) announce(`Done: ${talk.conversation.turns.at(-1).content.split(/\s+/).length} words.`);
}

function failed(error, again) {
  if (error.kind === "key") {
    askForKey(error);
    return;
  }
  const after = error.kind === "busy" ? { afterSeconds: error.retryAfter } : {};
  notice.show(error.message, again && error.kind ? { label: "Try again", run: again, ...after } : undefined);
}

function welcome(isShown) {
  byId("welcome").hidden = !isShown;
  if (!isShown) return;
  const { isChat, name } = backend;
  byId("welcome-title").textContent = name;
  byId("welcome-text").textContent = isChat
    ? "A model on this machine. What you write stays here."
    : "A base model: it has learnt to go on with a text, not to answer. Begin one, and it writes on.";
  const buttons = SUGGESTIONS[isChat ? "chat" : "text"].map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => run(() => talk.say(text, settings.values())));
    return button;
  });
  byId("suggestions").replaceChildren(...buttons);
}

function open(id) {
  const found = conversations.keptConversations().find((conversation) => conversation.id === id);
  if (found && id !== talk.conversation.id) begin(found);
  sidebar.makeRoom();
}

function remove(id) {
  const found = conversations.keptConversations().find((conversation) => conversation.id === id);
  if (!found) return;
  forgotten([found], `Deleted “${conversations.titleOf(found)}”.`);
}

/** Delete conversations, with a way back. */
function forgotten(gone, text) {
  const isCurrent = gone.some(({ id }) => id === talk.conversation.id);
  const current = talk.conversation;
  if (isCurrent) begin(conversations.newConversation(current.system));
  gone.forEach(conversations.forget);
  changed();
  notice.show(text, {
    label: "Undo",
    run: () => {
      gone.forEach(conversations.keep);
      if (isCurrent) begin(gone.find(({ id }) => id === current.id));
      else changed();
    },
  });
}

function download(textOf, type, ending) {
  if (!talk) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([textOf(talk.conversation, backend.isChat)], { type }));
  const title = conversations.titleOf(talk.conversation).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  link.download = `${title || "conversation"}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function openFile(file) {
  try {
    const conversation = conversations.fromJson(await file.text());
    conversations.keep(conversation);
    begin(conversation);
    sidebar.makeRoom();
  } catch (error) {
    notice.show(error.message);
  }
}

function askForKey(error) {
  byId("key-text").textContent = sessionKey()
    ? `That was not it: ${error.message}`
    : "It was started with an API key. The key is kept until this tab is closed.";
  byId("key").value = "";
  byId("key-dialog").showModal();
}

function sessionKey() {
  return sessionStorage.getItem("mobilellm.key") ?? undefined;
}

function report(text, share) {
  byId("loading-text").textContent = text;
  const bar = byId("loading-bar");
  if (share === undefined) bar.removeAttribute("value");
  else bar.value = share;
}

function announce(text) {
  byId("announcer").textContent = text;
}

function nextTheme() {
  const root = document.documentElement;
  const isDark = (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("mobilellm.theme", root.dataset.theme);
  announce(`${isDark ? "Light" : "Dark"} colours.`);
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("key-dialog").open) return;
  if (talk?.isAnswering) talk.stop();
  else composer.stopEditing();
});
byId("stop").addEventListener("click", () => talk.stop());
byId("theme").addEventListener("click", nextTheme);
byId("new").addEventListener("click", () => {
  if (talk) begin(conversations.newConversation(talk.conversation.system));
  sidebar.makeRoom();
});
byId("system").addEventListener("input", (event) => {
  if (talk) talk.conversation.system = event.target.value;
});
byId("system").addEventListener("change", () => talk?.keep());
byId("save-markdown").addEventListener("click", () => download(conversations.asMarkdown, "text/markdown", "md"));
byId("save-json").addEventListener("click", () => download(conversations.asJson, "application/json", "json"));
byId("open-file").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", (event) => {
  if (talk && event.target.files[0]) openFile(event.target.files[0]);
  event.target.value = "";
});
byId("delete-all").addEventListener("click", () => {
  const all = conversations.keptConversations();
  if (talk && all.length > 0) forgotten(all, `Deleted ${all.length} conversation${all.length === 1 ? "" : "s"}.`);
});
byId("key-form").addEventListener("submit", () => {
  sessionStorage.setItem("mobilellm.key", byId("key").value);
  start(byId("key").value);
});
addEventListener("pagehide", () => talk?.keep());
addEventListener("storage", (event) => {
  if (talk && conversations.isConversationKey(event.key)) list.show(talk.conversation.id);
});

start();
