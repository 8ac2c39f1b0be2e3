/** What was said, as elements: a conversation's messages, or one text that two are writing. */
import { iconButton } from "./icon_button.js";
import { MarkdownView } from "./markdown.js";
import { readable } from "./meters.js";

const ENDS = { length: "reached the most tokens", stopped: "stopped", lost: "cut off" };

export class Turns {
  #element = document.getElementById("turns");
  #scroll = document.getElementById("scroll");
  #shownLast = null;

  /** @param {{again: () => void, edit: (number: number) => void}} actions */
  constructor(actions) {
    this.#element.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button?.dataset.copies) copy(button);
      else if (button?.dataset.action === "again") actions.again();
      else if (button?.dataset.action === "edit") actions.edit(Number(button.dataset.number));
    });
  }

  /** Draw all turns anew. The last one may grow afterwards, by `grow`. */
  show(turns, isChat, name, isAnswering) {
    const articles = turns.map((turn, number) => {
      const isLast = number === turns.length - 1;
      return article(turn, number, { isLast, isChat, name, isAnswering });
    });
    this.#element.replaceChildren(...articles.map(({ element }) => element));
    this.#shownLast = articles.at(-1) ?? null;
    this.toEnd();
  }

  /** The last turn's text is now this. Whoever has scrolled back stays there. */
  grow(text) {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroll;
    const isAtEnd = scrollHeight - scrollTop - clientHeight < 80;
    this.#shownLast.show(text);
    if (isAtEnd) this.toEnd();
  }

  toEnd() {
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }
}

function article(turn, number, { isLast, isChat, name, isAnswering }) {
  const isAnswer = turn.role === "assistant";
  const element = document.createElement("article");
  element.className = `turn ${isAnswer ? "answer" : "mine"}`;
  element.setAttribute("aria-label", isAnswer ? (turn.model ?? name) : "You");
  const content = document.createElement("div");
  content.className = "content";
  const isMarkdown = isAnswer && isChat;
  const view = isMarkdown ? new MarkdownView(content) : null;
  const show = (text) => (view ? view.show(text) : (content.textContent = text));
  show(turn.content);
  element.append(content);
  const isGrowing = isLast && isAnswering && isAnswer;
  element.classList.toggle("growing", isGrowing);
  if (!isGrowing && (isChat || isLast)) element.append(foot(turn, number, isLast, isAnswer, isAnswering));
  return { element, show };
}

function foot(turn, number, isLast, isAnswer, isAnswering) {
  const element = document.createElement("div");
  element.className = "foot";
  element.append(iconButton("copy", "Copy", { copies: "turn" }));
  if (isAnswer && isLast) element.append(iconButton("again", "Another answer", { action: "again" }));
  if (!isAnswer && !isAnswering) element.append(iconButton("edit", "Edit and send again", { action: "edit", number }));
  if (isAnswer) {
    const said = [turn.tokens && `${turn.tokens} tokens`, turn.rate && `${readable(turn.rate)} tok/s`, ENDS[turn.finish]];
    const info = document.createElement("span");
    info.className = "info";
    info.textContent = said.filter(Boolean).join(" · ");
    element.append(info);
  }
  return element;
}

/** Copy what a button belongs to; a tick tells that it was done. */
async function copy(button) {
  const isCode = button.dataset.copies === "code";
  const source = isCode ? button.closest(".code").querySelector("code") : button.closest(".turn").querySelector(".content");
  try {
    await navigator.clipboard.writeText(isCode ? source.textContent : source.innerText);
    button.classList.add("done");
  } catch {
    getSelection().selectAllChildren(source); // no right to the clipboard: Ctrl+C is left to do
  }
  setTimeout(() => button.classList.remove("done"), 1500);
}
