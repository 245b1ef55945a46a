/** R14: from logits to a token, so that one seed gives one text on every port. */

import { SamplingError } from "./errors.mjs";

/** A seed that nobody has used, short enough to be typed again. */
export function fresh_seed() {
  return BigInt(Math.floor(Math.random() * 2 ** 32));
}

/** How the tokens of a text are drawn. Settings that define no distribution are refused. */
export class Sampling {
  /**
   * @param {number} temperature 0: always the best
   * @param {number | null} top_k of how many candidates, 0 or null: of all
   * @param {bigint} seed
   */
  constructor(temperature = 1, top_k = null, seed = fresh_seed()) {
    if (!(temperature >= 0 && temperature < Infinity)) {
      throw new SamplingError(`temperature is ${temperature}: it must be a finite number, 0 (greedy) or more`);
    }
    if (top_k !== null && !(Number.isInteger(top_k) && top_k >= 0)) {
      throw new SamplingError(`top_k is ${top_k}: keep 1 or more tokens, or 0 or null for all`);
    }
    if (!(seed >= 0n && seed < 2n ** 64n))
      throw new SamplingError(`seed is ${seed}: it must be a whole number from 0 to 2^64 - 1`);
    Object.assign(this, { temperature, top_k, seed });
  }
}

/** Refuse a number of new tokens that no text can have. */
export function check_length(max_new_tokens) {
  if (!Number.isInteger(max_new_tokens) || max_new_tokens < 0) {
    throw new SamplingError(`max_new_tokens is ${max_new_tokens}: a text cannot shrink; ask for 0 or more`);
  }
}

/**
 * The draw that decides the token at `position` of text `row`: 53 bits, from 0 up to but not including 1.
 *
 * The top bits of the first word of Philox4x64-10 with key (seed, 0) on counter (1, 0, position, row): NumPy, given a counter of 0,
 * counts up before it draws.
 * @param {bigint} seed
 * @param {bigint} position
 * @param {bigint} row
 */
export function uniform(seed, position, row = 0n) {
  const [word] = philox([1n, 0n, position, row], [seed, 0n]);
  return Number(word >> 11n) * 2 ** -53;
}

const MASK = 2n ** 64n - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];

/**
 * Philox4x64-10 (Salmon et al., 2011): four words of 64 bits from a counter of four and a key of two.
 * @param {bigint[]} counter
 * @param {bigint[]} key
 * @returns {bigint[]}
 */
export function philox(counter, key) {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const [p0, p1] = [MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2]; // of 128 bits
    [c0, c1, c2, c3] = [(p1 >> 64n) ^ c1 ^ k0, p1 & MASK, (p0 >> 64n) ^ c3 ^ k1, p0 & MASK];
    [k0, k1] = [(k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK];
  }
  return [c0, c1, c2, c3];
}

/**
 * Choose one token from logits (V,) by inverse CDF at `draw`; at temperature 0 the best, the lowest id if tied.
 * @param {ArrayLike<number>} logits (V,)
 * @param {number} draw
 * @param {Sampling} how
 * @returns {number}
 */
export function sample(logits, draw, how) {
  const values = Float64Array.from(logits);
  const wrong = values.find((logit) => !Number.isFinite(logit));
  if (wrong !== undefined) throw new SamplingError(`logits hold ${wrong}: the model has diverged, nothing can be drawn`);
  if (how.temperature === 0) return values.indexOf(values.reduce((best, logit) => Math.max(best, logit)));
  const cumulative = probabilities(values, how);
  for (let v = 1; v < cumulative.length; v++) cumulative[v] += cumulative[v - 1];
  const wanted = draw * cumulative.at(-1);
  return cumulative.findIndex((sum) => sum > wanted);
}

/**
 * Softmax of logits (V,) over temperature in float64, everything below the top_k-th value left out.
 * @param {Float64Array} logits
 * @param {Sampling} how
 * @returns {Float64Array} (V,)
 */
export function probabilities(logits, how) {
  let kth = -Infinity;
  if (how.top_k && how.top_k < logits.length) kth = logits.slice().sort()[logits.length - how.top_k];
  const best = logits.reduce((one, other) => Math.max(one, other));
  const weights = logits.map((logit) => (logit >= kth ? Math.exp((logit - best) / how.temperature) : 0));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}
