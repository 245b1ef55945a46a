/** A text under way, and everything that can be asked about it: losses, predictions, neurons, what was read from where, states. */

import { frequencies_of } from "./config.mjs";
import { log_softmax } from "./model.mjs";
import { Rotation } from "./rope.mjs";

const SNAPSHOT_BUDGET = 192 * 2 ** 20; // bytes of states kept on the way, to go back to
const RECORD_BUDGET = 256 * 2 ** 20; // bytes of records of what fired
const FIRST_SPACING = 16; // bytes of text between two states that are kept; doubled where memory runs out

/**
 * What one layer did at one byte: x (D,) before it, and the neurons that fired, as places in (nh, N) and values.
 * @typedef {{x: Float32Array, fired: Sparse, passed: Sparse}} LayerRecord passed: xy_sparse, what the gate let through
 * @typedef {{index: Uint32Array, value: Float32Array}} Sparse
 */

/** One text, read byte by byte. */
export class Reading {
  /**
   * @param {import("./decode.mjs").Model} model
   * @param {import("./decode.mjs").RecurrentState | null} base the state of an earlier text that this one goes on with
   */
  constructor(model, base = null) {
    this.model = model;
    this.base = base;
    this.tokens = []; // of this text
    this.logits = []; // after each token, (V,)
    this.bits = []; // what each token cost, or null for a first one, which nothing predicts
    this.records = []; // LayerRecord[] of each token; null where memory was short
    this.record_size = 0;
    this.first_record = 0; // the first token whose record is still there
    this.spacing = FIRST_SPACING;
    this.snapshots = [];
    this.state = base ? base.copy() : model.init_state();
  }

  /** Tokens read before this text and in it. */
  get position() {
    return this.state.position;
  }

  /** Read one more token. */
  read(token) {
    const t = this.tokens.length;
    if (t && t % this.spacing === 0) this.#keep_snapshot(t);
    const record = [];
    const logits = this.model.advance(this.state, [token], (i, model) => record.push(recorded(model)));
    this.bits.push(t ? -log_softmax(this.logits[t - 1])[token] / Math.LN2 : null);
    this.tokens.push(token);
    this.logits.push(logits);
    this.#keep_record(record);
  }

  /** Forget all but the first tokens, as if no more had been read. */
  rewind(length) {
    if (length === this.tokens.length) return;
    this.snapshots = this.snapshots.filter(({ at }) => at <= length);
    this.state = this.state_after(length);
    for (let t = length; t < this.records.length; t++)
      this.record_size -= this.records[t] ? size_of_record(this.records[t]) : 0;
    for (const kept of [this.tokens, this.logits, this.bits, this.records]) kept.length = length;
    this.first_record = Math.min(this.first_record, length);
  }

  /** The state after so many tokens of this text: one of its own, computed again from the nearest that was kept. */
  state_after(length) {
    if (length === this.tokens.length) return this.state.copy();
    const nearest = this.snapshots.findLast(({ at }) => at <= length);
    let [at, state] = nearest
      ? [nearest.at, nearest.state.copy()]
      : [0, this.base ? this.base.copy() : this.model.init_state()];
    for (; at < length; at++) this.model.advance(state, [this.tokens[at]]);
    return state;
  }

  /** The state before token t: of the last one without reading anything again, by taking out what it wrote. */
  state_before(t) {
    if (t < this.tokens.length - 1) return this.state_after(t);
    const state = this.state.copy();
    this.unwrite(state, t);
    state.position -= 1n;
    return state;
  }

  /** Take out of a state of this text what token t wrote to it, in all layers. */
  unwrite(state, t) {
    const { n_head: nh, n_neurons: N, n_embd: D } = this.model.config;
    const turning = new Rotation(frequencies_of(this.model.config), this.model.phase, Float64Array);
    turning.turn_to(this.position - BigInt(this.tokens.length - t));
    state.layers.forEach((memory, i) => {
      const { fired, x } = this.records[t][i];
      rotated(fired, nh * N, turning).forEach((key, row) => {
        if (key !== 0) for (let d = 0; d < D; d++) memory[row * D + d] -= key * x[d];
      });
    });
  }

  /** How many tokens state_after would have to read again. */
  distance_to(length) {
    if (length === this.tokens.length) return 0;
    return length - (this.snapshots.findLast(({ at }) => at <= length)?.at ?? 0);
  }

  /** Mean bits per token of tokens from `start` to `end` that something predicted; NaN if none was. */
  mean_bits(start = 0, end = this.tokens.length) {
    const counted = this.bits.slice(start, end).filter((bits) => bits !== null);
    return counted.reduce((sum, bits) => sum + bits, 0) / counted.length;
  }

  /**
   * What token t read from each earlier token: scores (R5) by head, as they were when it was read.
   * @param {number} t
   * @param {number} layer
   * @returns {Float64Array[]} nh of (t,): zero where memory was too short for a record
   */
  scores(t, layer) {
    const { n_head: nh, n_neurons: N } = this.model.config;
    const scores = Array.from({ length: nh }, () => new Float64Array(t));
    if (!this.records[t]) return scores;
    const turning = new Rotation(frequencies_of(this.model.config), this.model.phase, Float64Array);
    const begin = this.position - BigInt(this.tokens.length);
    turning.turn_to(begin + BigInt(t));
    const q = rotated(this.records[t][layer].fired, nh * N, turning);
    for (let u = this.first_record; u < t; u++) {
      turning.turn_to(begin + BigInt(u));
      const { index, value } = this.records[u][layer].fired;
      for (let i = 0; i < index.length; i++) {
        const at = index[i];
        const n = at % N;
        // What a neuron gives to its own rotated row, and to that of its partner.
        const own = turning.cos[n] * q[at];
        const partner = n % 2 ? -turning.sin[n - 1] * q[at - 1] : turning.sin[n + 1] * q[at + 1];
        scores[(at - n) / N][u] += value[i] * (own + partner);
      }
    }
    return scores;
  }

  /**
   * What token t read from each entry of a layer's state, as a share of all that its head read, signs aside.
   * @param {RecurrentState} before the state before token t
   * @returns {Float32Array} (nh, N, D)
   */
  parts(t, layer, before) {
    const { n_head: nh, n_neurons: N, n_embd: D } = this.model.config;
    const turning = new Rotation(frequencies_of(this.model.config), this.model.phase, Float64Array);
    turning.turn_to(this.position - BigInt(this.tokens.length - t));
    const q = rotated(this.records[t][layer].fired, nh * N, turning);
    const parts = Float32Array.from(before.layers[layer], (value, at) => Math.abs(q[Math.floor(at / D)] * value));
    for (let h = 0; h < nh; h++) {
      const of_head = parts.subarray(h * N * D, (h + 1) * N * D);
      const total = of_head.reduce((sum, part) => sum + part, 0);
      if (total) for (let at = 0; at < of_head.length; at++) of_head[at] /= total;
    }
    return parts;
  }

  /**
   * Which tokens wrote a synapse: what each added to the state's entry (row, d) of a layer, up to token t.
   * @param {number} row place of the neuron in (nh, N)
   * @returns {Float64Array} (t + 1,)
   */
  written(layer, row, d, t) {
    const N = this.model.config.n_neurons;
    const turning = new Rotation(frequencies_of(this.model.config), this.model.phase, Float64Array);
    const begin = this.position - BigInt(this.tokens.length);
    const [n, partner] = [row % N, row % 2 ? row - 1 : row + 1];
    const written = new Float64Array(t + 1);
    for (let u = this.first_record; u <= t; u++) {
      const { fired, x } = this.records[u][layer];
      const [own, other] = [value_at(fired, row), value_at(fired, partner)];
      if (own === 0 && other === 0) continue;
      const angle = 2 * Math.PI * turning.turns(n, begin + BigInt(u));
      const key = own * Math.cos(angle) + (row % 2 ? other : -other) * Math.sin(angle);
      written[u] = key * x[d];
    }
    return written;
  }

  #keep_record(record) {
    this.records.push(record);
    this.record_size += size_of_record(record);
    while (this.record_size > RECORD_BUDGET && this.first_record < this.records.length - 1) {
      this.record_size -= size_of_record(this.records[this.first_record]);
      this.records[this.first_record++] = null;
    }
  }

  #keep_snapshot(at) {
    if (this.snapshots.some((kept) => kept.at === at)) return;
    const room = Math.floor(SNAPSHOT_BUDGET / this.state.size);
    if (room < 1) return;
    if (this.snapshots.length >= room) {
      this.spacing *= 2;
      this.snapshots = this.snapshots.filter((kept) => kept.at % this.spacing === 0);
    }
    if (at % this.spacing === 0) this.snapshots.push({ at, state: this.state.copy() });
  }
}

/** What a model's layer has just done. */
function recorded(model) {
  return { x: Float32Array.from(model.x), fired: sparse(model.x_sparse), passed: sparse(model.xy_sparse) };
}

/** The values that are not zero, and where they stand. */
function sparse(values) {
  let size = 0;
  for (let i = 0; i < values.length; i++) if (values[i] !== 0) size += 1;
  const [index, value] = [new Uint32Array(size), new Float32Array(size)];
  for (let i = 0, next = 0; i < values.length; i++) {
    if (values[i] === 0) continue;
    index[next] = i;
    value[next++] = values[i];
  }
  return { index, value };
}

/** One of the values, by bisection. */
export function value_at({ index, value }, place) {
  let [low, high] = [0, index.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (index[middle] < place) low = middle + 1;
    else high = middle;
  }
  return index[low] === place ? value[low] : 0;
}

/** The rotated row (nh*N) of a token (R4). */
function rotated({ index, value }, size, { cos, sin, table }) {
  const row = new Float64Array(size);
  index.forEach((at, i) => {
    const n = at % table.length;
    row[at] += value[i] * cos[n];
    if (n % 2) row[at - 1] -= value[i] * sin[n - 1];
    else row[at + 1] += value[i] * sin[n + 1];
  });
  return row;
}

function size_of_record(record) {
  return record.reduce((sum, { x, fired, passed }) => sum + 4 * x.length + 8 * (fired.index.length + passed.index.length), 0);
}

/**
 * What a lesson does (R13, nothing is trained): a phrase is read again and again after a text, each time on a line of its own.
 *
 * The state given stays as it is.
 * @param {import("./decode.mjs").Model} model
 * @param {import("./decode.mjs").RecurrentState} state after the text
 * @param {Uint8Array} phrase
 * @param {number} times
 * @yields {{reading: number, bits: number, state: RecurrentState}} bits per byte of each reading, the first before anything was
 *   learned, the last, times + 1, after that many; and the state before it
 */
export function* lesson(model, state, phrase, times) {
  const learned = state.copy();
  for (let reading = 1; reading <= times + 1; reading++) {
    const before = learned.copy();
    let bits = 0;
    let logits = model.advance(learned, [NEWLINE]);
    for (const token of phrase) {
      bits -= log_softmax(logits)[token] / Math.LN2;
      logits = model.advance(learned, [token]);
      yield null; // a chance for the page to breathe
    }
    yield { reading, bits: bits / phrase.length, state: before };
  }
}

export const NEWLINE = 10;

/** The same bytes in another order, always the same one: what a phrase is compared with. */
export function shuffled(phrase, random) {
  const bytes = Uint8Array.from(phrase);
  for (let i = bytes.length - 1; i > 0; i--) {
    const j = Math.floor(random(i) * (i + 1));
    [bytes[i], bytes[j]] = [bytes[j], bytes[i]];
  }
  return bytes;
}

/**
 * The largest entries of one layer of a state, by their size.
 * @param {Float32Array} memory (nh, N, D)
 * @param {number} start and
 * @param {number} end of the places looked at
 * @returns {number[]} places, the largest first
 */
export function strongest(memory, start, end, count) {
  const found = []; // places, the largest first
  let least = 0;
  for (let place = start; place < end; place++) {
    const size = Math.abs(memory[place]);
    if (size <= least) continue;
    let i = found.length;
    while (i > 0 && Math.abs(memory[found[i - 1]]) < size) i--;
    found.splice(i, 0, place);
    if (found.length > count) found.pop();
    if (found.length === count) least = Math.abs(memory[found[count - 1]]);
  }
  return found;
}
