/** How answers are sampled: the fields of the settings panel, remembered in this browser. */

const KEY = "mobilellm.settings";
const DEFAULTS = { temperature: 0.7, top_p: 0.95, max_tokens: 512, seed: "", stop_strings: "" };

export class Settings {
  #fields = Object.keys(DEFAULTS).map((name) => document.getElementById(name));

  constructor() {
    for (const field of this.#fields) field.addEventListener("input", () => this.#changed());
    document.getElementById("reset-settings").addEventListener("click", () => this.#show(DEFAULTS));
    let kept = null;
    try {
      kept = JSON.parse(localStorage.getItem(KEY));
    } catch {
      // Damaged: the defaults.
    }
    this.#show({ ...DEFAULTS, ...kept });
  }

  /** As a request has them. A field that holds no number is left to the server. */
  values() {
    const [temperature, topP, maxTokens, seed, stop] = this.#fields.map((field) => field.value);
    const stops = stop.split("\n").filter((line) => line !== "");
    return {
      temperature: Number(temperature),
      top_p: Number(topP),
      ...(maxTokens === "" ? {} : { max_tokens: Number(maxTokens) }),
      ...(seed === "" ? {} : { seed: Number(seed) }),
      ...(stops.length === 0 ? {} : { stop: stops.slice(0, 4) }),
    };
  }

  /** The first field that a request could not take, or null. */
  firstInvalid() {
    return this.#fields.find((field) => !field.checkValidity()) ?? null;
  }

  #show(values) {
    for (const field of this.#fields) field.value = String(values[field.id]);
    this.#changed();
  }

  #changed() {
    for (const field of this.#fields) {
      const shown = document.getElementById(`${field.id}-value`);
      if (shown) shown.textContent = Number(field.value).toFixed(2);
    }
    const values = Object.fromEntries(this.#fields.map((field) => [field.id, field.value]));
    try {
      localStorage.setItem(KEY, JSON.stringify(values));
    } catch {
      // No room: the settings hold for this visit.
    }
  }
}
