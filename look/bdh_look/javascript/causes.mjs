/**
 * What a prediction came from, as bdh_look.causes has it: what would be expected had one earlier byte not been written to the
 * state. Scores say what was read; this says what it was good for.
 */

import { log_softmax } from "./model.mjs";

/**
 * Try a token again without each of the earlier ones that it read most, in steps.
 * @param {import("./reading.mjs").Reading} reading
 * @param {number} t
 * @param {number} most earlier tokens to try
 * @returns {Generator<void, {likeliest: number, chance: number, found: {at: number, gave: number, left: number}[]}>}
 *   the token that is expected after t, its probability, and for each earlier token, the one that mattered most first, the
 *   log-probability that it gave to that, in nats, and the probability that is left without it
 */
export function* causes(reading, t, most) {
  const before = reading.state_before(t);
  const without = before.copy();
  const expected = log_softmax(reading.logits[t]);
  const likeliest = expected.indexOf(Math.max(...expected));
  const found = [];
  for (const at of yield* candidates(reading, t, most)) {
    without.position = before.position;
    without.layers.forEach((memory, i) => memory.set(before.layers[i]));
    reading.unwrite(without, at);
    const left = log_softmax(reading.model.advance(without, [reading.tokens[t]]))[likeliest];
    found.push({ at, gave: expected[likeliest] - left, left: Math.exp(left) });
    yield;
  }
  found.sort((a, b) => Math.abs(b.gave) - Math.abs(a.gave));
  return { likeliest, chance: Math.exp(expected[likeliest]), found };
}

/** The earlier tokens that were read most, over all layers and heads, or by any of them. */
function* candidates(reading, t, most) {
  const { n_layer } = reading.model.config;
  const [mean, peak] = [new Float64Array(t), new Float64Array(t)];
  for (let i = 0; i < n_layer; i++) {
    for (const scores of reading.scores(t, i)) {
      const total = scores.reduce((sum, score) => sum + Math.abs(score), 0);
      for (let u = 0; u < t && total > 0; u++) {
        const share = Math.abs(scores[u]) / total;
        mean[u] += share;
        peak[u] = Math.max(peak[u], share);
      }
    }
    yield;
  }
  const best = (values, all) => all.sort((a, b) => values[b] - values[a]);
  const kept = [...mean.keys()].slice(reading.first_record); // of the others nobody knows what they wrote
  const by_mean = best(mean, [...kept]).slice(0, Math.ceil(most / 2));
  const others = kept.filter((u) => !by_mean.includes(u));
  return [...by_mean, ...best(peak, others).slice(0, most - by_mean.length)];
}
