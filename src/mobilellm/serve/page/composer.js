/** The text field: what is typed in it, what it is for, and whether it may be sent. */

const byId = (id) => document.getElementById(id);

export class Composer {
  #field = byId("prompt");
  #send;
  #talk = null;
  #isChat = false;
  #edited = null; // number of the turn that the text is to replace

  /** @param {(text: string, from?: number) => void} send Given the text, and the turn that it replaces. */
  constructor(send) {
    this.#send = send;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#sent();
    });
    this.#field.addEventListener("input", () => this.update());
    this.#field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#sent();
    });
  }

  /** From now on it is for this talk. What was typed stays. */
  begin(talk, isChat) {
    this.#talk = talk;
    this.#isChat = isChat;
    this.#edited = null;
  }

  /** Put a turn's text in it, to be sent in the turn's place. */
  edit(number) {
    this.#edited = number;
    this.#field.value = this.#talk.conversation.turns[number].content;
    this.#field.focus();
    this.update();
  }

  stopEditing() {
    if (this.#edited === null) return;
    this.#edited = null;
    this.#field.value = "";
    this.update();
  }

  /** What was sent and refused is here again, before what has been typed since. */
  takeBack(text, from) {
    this.#edited = from ?? null;
    this.#field.value = [text, this.#field.value].filter((each) => each !== "").join("\n");
    this.focus();
    this.update();
  }

  /** Where there is a keyboard: a phone would open its own. */
  focus() {
    if (matchMedia("(hover: hover)").matches) this.#field.focus();
  }

  /** The text has changed, or what it is for. */
  update() {
    const field = this.#field;
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight, 240)}px`;
    byId("send").disabled = !this.#maySend();
    byId("prompt-label").textContent = this.#isChat ? "Message" : "Text";
    const goesOn = this.#talk !== null && !this.#talk.isEmpty;
    field.placeholder = this.#isChat ? "Write a message" : goesOn ? "Write on, or let it go on" : "Begin a text";
    const editing = "Editing: all after it will be replaced · Esc leaves it";
    const hint = this.#edited === null ? "Enter sends · Shift+Enter for a new line" : editing;
    byId("prompt-hint").textContent = this.#talk?.isAnswering ? "Esc stops" : hint;
  }

  #sent() {
    if (this.#talk === null || this.#talk.isAnswering || !this.#maySend()) return;
    const text = this.#isChat ? this.#field.value.trim() : this.#field.value;
    const from = this.#edited ?? undefined;
    this.#edited = null;
    this.#field.value = "";
    this.#send(text, from);
  }

  /** A chat needs a message; a text may also go on by itself. */
  #maySend() {
    if (this.#talk === null) return false;
    return this.#field.value.trim() !== "" || (!this.#isChat && !this.#talk.isEmpty && this.#edited === null);
  }
}
