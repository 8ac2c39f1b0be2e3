/** From logits to the next token: temperature, then top p, as `mobilellm/sampling.py` has them. */
export class Sampler {
  #temperature;
  #topP;
  #random;

  /** A request's settings by OpenAI's names. The same seed gives the same answer, in any browser. */
  constructor({ temperature = 1, top_p: topP = 1, seed = Math.floor(Math.random() * 2 ** 32) }) {
    this.#temperature = temperature;
    this.#topP = topP;
    this.#random = mulberry32(seed);
  }

  /** The next token's id for logits of the whole vocabulary. */
  next(logits) {
    let best = 0;
    for (let id = 1; id < logits.length; id += 1) if (logits[id] > logits[best]) best = id;
    return this.#temperature === 0 ? best : this.#drawn(logits, logits[best]);
  }

  #drawn(logits, largest) {
    const weights = Float64Array.from(logits, (logit) => Math.exp((logit - largest) / this.#temperature));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const ids = this.#topP < 1 ? likeliest(weights, this.#topP, total) : weights.keys();
    const kept = [...ids];
    let rest = this.#random() * kept.reduce((sum, id) => sum + weights[id], 0);
    return kept.find((id) => (rest -= weights[id]) < 0) ?? kept.at(-1);
  }
}

/** The fewest ids, the likeliest first, whose weights together reach a share of the total. */
function likeliest(weights, share, total) {
  // All tokens below this weight together have less than what may be left out: only the others are sorted.
  const least = ((1 - share) * total) / weights.length;
  const order = [...weights.keys()].filter((id) => weights[id] >= least);
  order.sort((one, other) => weights[other] - weights[one]);
  let sum = 0;
  const count = order.findIndex((id) => (sum += weights[id]) >= share * total) + 1;
  return count > 0 ? order.slice(0, count) : order;
}

/** Numbers from 0 to below 1 (the generator of that name by Tommy Ettinger: 32 bits of state). */
function mulberry32(seed) {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
}
