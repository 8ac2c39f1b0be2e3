/** The line above the text field that says what went wrong, or what can be taken back. */

export class Notice {
  #box = document.getElementById("notice");
  #text = document.getElementById("notice-text");
  #button = document.getElementById("notice-action");
  #action = null;
  #timer;

  constructor() {
    this.#button.addEventListener("click", () => this.#act());
    document.getElementById("notice-close").addEventListener("click", () => this.hide());
  }

  /**
   * @param {string} text
   * @param {{label: string, run: () => void, afterSeconds?: number}} [action] What a button beside it does;
   *   with `afterSeconds` it is done by itself after that time.
   */
  show(text, action) {
    this.hide();
    this.#text.textContent = text;
    this.#button.hidden = !action;
    this.#button.textContent = action?.label ?? "";
    this.#action = action?.run ?? null;
    this.#box.hidden = false;
    if (action?.afterSeconds) {
      const seconds = Math.ceil(action.afterSeconds);
      this.#text.textContent = `${text} Trying again in ${seconds} s.`;
      this.#timer = setTimeout(() => this.#act(), seconds * 1000);
    }
  }

  hide() {
    clearTimeout(this.#timer);
    this.#box.hidden = true;
    this.#action = null;
  }

  #act() {
    const run = this.#action;
    this.hide();
    run?.();
  }
}
