/** The list of kept conversations at the side. */
import { keptConversations, titleOf } from "./conversations.js";
import { iconButton } from "./icon_button.js";

export class ConversationList {
  #list = document.getElementById("list");

  /** @param {{open: (id: string) => void, remove: (id: string) => void}} actions */
  constructor(actions) {
    this.#list.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) actions[button.dataset.action](button.closest("li").dataset.id);
    });
  }

  show(current) {
    const items = keptConversations().map((conversation) => {
      const title = titleOf(conversation);
      const open = document.createElement("button");
      open.type = "button";
      open.className = "title";
      open.dataset.action = "open";
      open.textContent = title;
      if (conversation.id === current) open.setAttribute("aria-current", "true");
      const remove = iconButton("delete", `Delete “${title}”`, { action: "remove" });
      const item = document.createElement("li");
      item.dataset.id = conversation.id;
      item.append(open, remove);
      return item;
    });
    this.#list.replaceChildren(...items);
  }
}
