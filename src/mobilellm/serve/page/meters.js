/** Speed, context and memory below the text field. */

const WINDOW_MS = 2000;
const POINTS = 30;

export class Meters {
  #arrivals = [];
  #rates = [];
  #rate = document.getElementById("rate");
  #rateText = document.getElementById("rate-text");
  #line = document.querySelector("#spark polyline");
  #context = document.getElementById("context");
  #memory = document.getElementById("memory");

  begin() {
    this.#arrivals = [];
    this.#rates = [];
    this.#draw();
  }

  /** A piece of text has come: about one token. */
  arrived(now = performance.now()) {
    this.#arrivals.push(now);
    while (this.#arrivals[0] < now - WINDOW_MS) this.#arrivals.shift();
    if (this.#arrivals.length < 3) return;
    const rate = ((this.#arrivals.length - 1) * 1000) / (now - this.#arrivals[0] || 1);
    this.#rates.push(rate);
    if (this.#rates.length > POINTS * 4) this.#rates.shift();
    this.#show(`${readable(rate)} tok/s`);
    this.#draw();
  }

  /** What the model's own clock says, once the answer is there. */
  finished({ usage, timings }, contextLength) {
    if (timings?.tokens_per_second > 0) this.#show(`${readable(timings.tokens_per_second)} tok/s`);
    if (usage && contextLength) {
      this.#context.hidden = false;
      const used = usage.total_tokens ?? usage.prompt_tokens + usage.completion_tokens;
      this.#context.textContent = `${used.toLocaleString("en")} of ${contextLength.toLocaleString("en")} tokens`;
    }
    this.memory(timings?.memory_bytes);
  }

  /** Bytes the model's process holds; nothing where it is not known. */
  memory(bytes) {
    if (!(bytes > 0)) return;
    this.#memory.hidden = false;
    this.#memory.textContent = inBytes(bytes);
  }

  forgetContext() {
    this.#context.hidden = true;
  }

  #show(text) {
    this.#rate.hidden = false;
    this.#rateText.textContent = text;
  }

  #draw() {
    const rates = this.#rates.slice(-POINTS);
    const top = Math.max(...rates, 1e-9);
    const points = rates.map((rate, index) => `${(index * 60) / (POINTS - 1)},${(15 - (13 * rate) / top).toFixed(1)}`);
    this.#line.setAttribute("points", rates.length > 2 ? points.join(" ") : "");
  }
}

/** A number of bytes as people write it. */
export function inBytes(bytes) {
  const [unit, name] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([size]) => bytes >= size) ?? [1, "B"];
  return `${readable(bytes / unit)} ${name}`;
}

/** Three digits at most, the way a person says a measure. */
export function readable(number) {
  return number >= 100 ? Math.round(number).toLocaleString("en") : number.toPrecision(number >= 10 ? 3 : 2);
}
