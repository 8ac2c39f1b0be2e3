/** What can go wrong with an answer, told apart by what a person can do about it. */
export class BackendError extends Error {
  /**
   * @param {"key" | "busy" | "refused" | "gone" | "lost"} kind key: it wants an API key. busy: try again
   *   later. refused: the request cannot be answered as it is. gone: nobody answers. lost: the answer ended
   *   too early.
   * @param {string} message One sentence for the person at the page.
   * @param {number} [retryAfter] Seconds after which trying again makes sense.
   */
  constructor(kind, message, retryAfter) {
    super(message);
    this.name = "BackendError";
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}
