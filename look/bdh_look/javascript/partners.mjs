/** What a neuron's weights say of it: which bytes it speaks for, whom it excites, and who it. */

import { layer_norm } from "./model.mjs";

/**
 * Bytes by how much a neuron speaks for them: its row of the decoder, seen by the readout.
 * @param {import("./decode.mjs").Model} model
 * @param {number} row of the neuron in (nh, N)
 * @param {Iterable<number>} tokens those to ask about: of others that no text had, the readout is noise
 * @returns {number[]} tokens, those it speaks for first
 */
export function speaks_for(model, row, tokens) {
  const D = model.config.n_embd;
  const written = layer_norm(Float64Array.from(decoder_row(model, row)), D);
  const towards = new Map([...new Set(tokens)].map((token) => [token, dot(written, model.lm_head, token * D)]));
  return [...towards.keys()].sort((a, b) => towards.get(b) - towards.get(a));
}

/**
 * The neurons that one excites most in the next layer, and that excite it, by Gx = encoder after decoder.
 * @param {import("./decode.mjs").Model} model
 * @param {number} row of the neuron in (nh, N)
 * @returns {{excites: number[], excited_by: number[]}} rows, the most first; none that it holds down
 */
export function partners(model, row, count) {
  const { n_embd: D, n_head, n_neurons } = model.config;
  const towards = model.encoder.subarray(row * D, (row + 1) * D);
  const from = centred(decoder_row(model, row));
  // A row's mean, which R2 takes away, is as well taken away from what it is multiplied with.
  const felt = centred(towards);
  const [out, into] = [new Float64Array(n_head * n_neurons), new Float64Array(n_head * n_neurons)];
  for (let other = 0; other < out.length; other++) {
    out[other] = dot(from, model.encoder, other * D);
    into[other] = dot(felt, model.params.decoder, other * D);
  }
  return { excites: most_of(out, count), excited_by: most_of(into, count) };
}

const decoder_row = ({ params, config }, row) => params.decoder.subarray(row * config.n_embd, (row + 1) * config.n_embd);

function centred(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return Float64Array.from(values, (value) => value - mean);
}

function dot(vector, weights, start) {
  let sum = 0;
  for (let d = 0; d < vector.length; d++) sum += vector[d] * weights[start + d];
  return sum;
}

/** The places of the largest values above zero. */
function most_of(values, count) {
  const positive = [...values.keys()].filter((place) => values[place] > 0);
  return positive.sort((a, b) => values[b] - values[a]).slice(0, count);
}
