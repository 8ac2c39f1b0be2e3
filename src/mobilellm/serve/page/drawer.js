/**
 * A panel at the side: beside the page where there is room, over it on a small screen.
 *
 * Over the page it holds the keyboard: the rest is inert until Escape, its button or a touch elsewhere.
 */

const NARROW = matchMedia("(max-width: 56rem)");

export class Drawer {
  #panel;
  #toggle;

  /** @param {boolean} isOpen Whether it is open at first, where there is room. */
  constructor(panel, toggle, isOpen) {
    this.#panel = panel;
    this.#toggle = toggle;
    toggle.addEventListener("click", () => this.set(panel.hidden));
    panel.querySelector(".close").addEventListener("click", () => this.set(false));
    panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.set(false);
    });
    document.querySelector("main").addEventListener("pointerdown", () => {
      if (NARROW.matches && !panel.hidden) this.set(false);
    });
    NARROW.addEventListener("change", () => this.#place(isOpen && !NARROW.matches));
    this.#place(isOpen && !NARROW.matches);
  }

  set(isOpen) {
    this.#place(isOpen);
    const fields = [...this.#panel.querySelectorAll("button:not(.close), input, textarea")];
    const first = fields.find((field) => field.checkVisibility());
    (isOpen ? first : this.#toggle).focus();
  }

  /** Close it where it covers the page, after something was chosen in it. */
  makeRoom() {
    if (NARROW.matches) this.#place(false);
  }

  #place(isOpen) {
    this.#panel.hidden = !isOpen;
    this.#toggle.setAttribute("aria-expanded", String(isOpen));
    const isCovered = NARROW.matches && document.querySelector(".drawer:not([hidden])") !== null;
    document.body.classList.toggle("covered", isCovered);
    for (const part of document.querySelectorAll("main > *, .skip")) part.inert = isCovered;
  }
}
