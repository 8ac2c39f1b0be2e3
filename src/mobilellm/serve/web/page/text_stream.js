/** Token ids to text that can be shown, as `mobilellm/text_stream.py`: whole characters, nothing of a stop string. */
export class TextStream {
  isStopped = false;
  #pieces;
  #stops;
  #dropsSpace;
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #encoder = new TextEncoder();
  #held = "";

  /**
   * @param {string[]} pieces SentencePiece's piece of each id.
   * @param {string[]} stops Texts that end the answer.
   * @param {boolean} isFirst Whether the ids begin a text: then the space put in front of it is dropped.
   */
  constructor(pieces, stops, isFirst) {
    this.#pieces = pieces;
    this.#stops = stops;
    this.#dropsSpace = isFirst;
  }

  /** Text that can be shown after a token, often "". */
  push(id) {
    const piece = this.#pieces[id] ?? "";
    const byte = /^<0x([0-9A-F]{2})>$/.exec(piece);
    const bytes = byte ? Uint8Array.of(parseInt(byte[1], 16)) : this.#encoder.encode(piece.replaceAll("▁", " "));
    return this.#advance(this.#decoder.decode(bytes, { stream: true }));
  }

  /** What was held back; an unfinished character becomes U+FFFD. */
  finish() {
    const text = this.#advance(this.#decoder.decode()) + this.#held;
    this.#held = "";
    return this.isStopped ? "" : text;
  }

  #advance(text) {
    if (this.isStopped) return "";
    if (this.#dropsSpace && text) {
      text = text.replace(/^ /, "");
      this.#dropsSpace = false;
    }
    this.#held += text;
    const ends = this.#stops
      .map((stop) => ({ start: this.#held.indexOf(stop), length: stop.length }))
      .filter(({ start }) => start >= 0)
      .sort((one, other) => one.start + one.length - other.start - other.length || one.start - other.start);
    const shownLength = ends[0]?.start ?? this.#held.length - this.#lengthThatMayStop();
    const shown = this.#held.slice(0, shownLength);
    this.isStopped = ends.length > 0;
    this.#held = this.isStopped ? "" : this.#held.slice(shownLength);
    return shown;
  }

  /** Length of the longest end of the held text with which a stop string begins. */
  #lengthThatMayStop() {
    const longest = Math.max(0, ...this.#stops.map((stop) => stop.length - 1));
    for (let length = Math.min(longest, this.#held.length); length > 0; length -= 1) {
      const end = this.#held.slice(-length);
      if (this.#stops.some((stop) => stop.startsWith(end))) return length;
    }
    return 0;
  }
}

/** The piece of each id, of a vocabulary that gives the id of each piece. */
export function piecesOf(vocabulary) {
  const pieces = [];
  for (const [piece, id] of Object.entries(vocabulary)) pieces[id] = piece;
  return pieces;
}
