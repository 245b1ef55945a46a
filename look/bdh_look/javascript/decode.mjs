/**
 * R13: the recurrent form, one token at a time, and only the neurons that fire.
 *
 * It computes what model.mjs computes of the whole text, from a state of fixed size. Where neuron n is silent, its rows of
 * encoder_v, of the decoder and, if its partner is silent too, of the state are not touched. Sums are accumulated in float64; the
 * state and what is carried from layer to layer are stored as float32 (float64 in a float64 model).
 */

import { frequencies_of } from "./config.mjs";
import { StateError, TokensError } from "./errors.mjs";
import { layer_norm } from "./model.mjs";
import { MAX_POSITION, Rotation } from "./rope.mjs";

/** What a model remembers of B texts: how many tokens it has read of each and, per layer, a matrix per head. */
export class RecurrentState {
  /**
   * @param {bigint} position tokens read so far
   * @param {(Float32Array | Float64Array)[]} layers L of (B, nh, N, D)
   * @param {number} batch B
   */
  constructor(position, layers, batch = 1) {
    Object.assign(this, { position, layers, batch });
  }

  /** A state of its own, which later tokens do not change. */
  copy() {
    return new RecurrentState(
      this.position,
      this.layers.map((memory) => memory.slice()),
      this.batch,
    );
  }

  /** The memory it takes, in bytes. */
  get size() {
    return this.layers.reduce((sum, memory) => sum + memory.byteLength, 0);
  }
}

/**
 * The state before the first token: zeros.
 * @param {number} batch B
 * @param {import("./config.mjs").BDHConfig} config
 * @param {Float32ArrayConstructor | Float64ArrayConstructor} Real
 */
export function init_state(batch, config, Real = Float32Array) {
  const size = batch * config.n_head * config.n_neurons * config.n_embd;
  return new RecurrentState(
    0n,
    Array.from({ length: config.n_layer }, () => new Real(size)),
    batch,
  );
}

/** A model, with its weights laid out so that each neuron's are one row. */
export class Model {
  /**
   * @param {Record<string, Float32Array | Float64Array>} params the five weights, all of the type to compute in
   * @param {import("./config.mjs").BDHConfig} config
   * @param {"exact" | "float32"} phase
   */
  constructor(params, config, phase = "exact") {
    const { n_embd: D, n_head: nh, n_neurons: N, vocab_size: V } = config;
    const Real = params.encoder.constructor;
    Object.assign(this, { params, config, phase, Real });
    this.encoder = transposed(params.encoder, nh, D, N); // nh N D
    this.encoder_v = transposed(params.encoder_v, nh, D, N); // nh N D
    this.lm_head = transposed(params.lm_head, 1, D, V); // V D
    this.rotation = new Rotation(frequencies_of(config), phase, Real);
    // What one token needs, layer after layer. Float64 where only sums are kept.
    this.x = new Float64Array(D);
    this.x_sparse = new Real(nh * N);
    this.rotated = new Real(nh * N);
    this.xy_sparse = new Real(nh * N);
    this.attention = new Float64Array(D);
    this.decoded = new Float64Array(D);
  }

  /** @param {number} batch B */
  init_state(batch = 1) {
    return init_state(batch, this.config, this.Real);
  }

  /**
   * Read one more token of each text, after what the state remembers. The state is changed in place.
   * @param {RecurrentState} state
   * @param {ArrayLike<number>} tokens (B,)
   * @param {(layer: number, model: Model) => void} [watch] is shown x before each layer, and x_sparse, rotated and
   *   xy_sparse (nh, N) of it, which the next layer overwrites
   * @returns {Float32Array | Float64Array} logits (B, V)
   */
  advance(state, tokens, watch) {
    const { vocab_size: V, n_layer } = this.config;
    this.#check(state, tokens);
    this.rotation.turn_to(state.position);
    const logits = new this.Real(state.batch * V);
    for (let b = 0; b < state.batch; b++) {
      this.#embed(tokens[b]);
      for (let i = 0; i < n_layer; i++) this.#layer(i, state.layers[i], b, watch);
      this.#readout(logits, b * V);
    }
    state.position += 1n;
    return logits;
  }

  #check(state, tokens) {
    if (tokens.length !== state.batch)
      throw new StateError(`${tokens.length} tokens for a state of ${state.batch} texts: give one for each`);
    if (state.position + 1n >= MAX_POSITION)
      throw new StateError(`the state is at position ${state.position}: positions run from 0 to 2^63 - 1`);
    for (const token of tokens) check_token(token, this.config);
  }

  /** R1 */
  #embed(token) {
    const D = this.config.n_embd;
    const row = this.params.embed.subarray(token * D, (token + 1) * D);
    this.x.set(row);
    this.#norm(this.x);
  }

  /** R2, stored in the type of the model. */
  #norm(x) {
    layer_norm(x, x.length, x);
    if (this.Real === Float32Array) for (let d = 0; d < x.length; d++) x[d] = Math.fround(x[d]);
  }

  /** R3 to R10 of one layer, for text b. */
  #layer(i, memory, b, watch) {
    const { n_head: nh, n_neurons: N } = this.config;
    const { x, decoded } = this;
    decoded.fill(0);
    for (let h = 0; h < nh; h++) {
      fire(this.encoder, h * N, N, x, this.x_sparse); // R3
      rope_of_those_that_fire(this.x_sparse, h * N, N, this.rotation, this.rotated); // R4
      this.attention.fill(0);
      read_and_write(memory, (b * nh + h) * N, this.rotated, h * N, N, x, this.attention); // R13, in place of R5
      this.#norm(this.attention); // R6
      gate(this.encoder_v, this.x_sparse, h * N, N, this.attention, this.xy_sparse); // R7
      decode(this.params.decoder, this.xy_sparse, h * N, N, decoded); // R9
    }
    watch?.(i, this);
    this.#norm(decoded);
    for (let d = 0; d < x.length; d++) x[d] += decoded[d];
    this.#norm(x); // R10
  }

  /** R11 */
  #readout(logits, start) {
    const D = this.config.n_embd;
    for (let v = 0; v < this.config.vocab_size; v++) logits[start + v] = dot(this.lm_head, v * D, this.x, D);
  }
}

/**
 * Refuse a token that no model of this vocabulary can read.
 * @param {number} token
 */
export function check_token(token, config) {
  if (Number.isInteger(token) && token >= 0 && token < config.vocab_size) return;
  const V = config.vocab_size;
  throw new TokensError(`token ${token} is outside the vocabulary of ${V}: ids run from 0 to ${V - 1}`);
}

/** The sum of row * x, where the row starts at `start` of the weights. */
function dot(weights, start, x, D) {
  let s0 = 0; // four sums that do not wait for one another
  let s1 = 0;
  let s2 = 0;
  let s3 = 0;
  let d = 0;
  for (; d + 3 < D; d += 4) {
    s0 += weights[start + d] * x[d];
    s1 += weights[start + d + 1] * x[d + 1];
    s2 += weights[start + d + 2] * x[d + 2];
    s3 += weights[start + d + 3] * x[d + 3];
  }
  for (; d < D; d++) s0 += weights[start + d] * x[d];
  return s0 + s1 + (s2 + s3);
}

/** x_sparse of one head (R3), whose neurons begin at `first`: four at a time, so that x is fetched once for them. */
function fire(encoder, first, N, x, x_sparse) {
  const D = x.length;
  let n = first;
  for (; n + 3 < first + N; n += 4) {
    const row = n * D;
    let s0 = 0;
    let s1 = 0;
    let s2 = 0;
    let s3 = 0;
    for (let d = 0; d < D; d++) {
      const value = x[d];
      s0 += encoder[row + d] * value;
      s1 += encoder[row + D + d] * value;
      s2 += encoder[row + 2 * D + d] * value;
      s3 += encoder[row + 3 * D + d] * value;
    }
    x_sparse[n] = s0 > 0 ? s0 : 0;
    x_sparse[n + 1] = s1 > 0 ? s1 : 0;
    x_sparse[n + 2] = s2 > 0 ? s2 : 0;
    x_sparse[n + 3] = s3 > 0 ? s3 : 0;
  }
  for (; n < first + N; n++) x_sparse[n] = Math.max(dot(encoder, n * D, x, D), 0);
}

/** rope of one head (R4), zero where both neurons of a pair are silent. */
function rope_of_those_that_fire(x_sparse, first, N, { cos, sin }, rotated) {
  for (let n = 0; n < N; n += 2) {
    const a = x_sparse[first + n];
    const b = x_sparse[first + n + 1];
    if (a === 0 && b === 0) {
      rotated[first + n] = rotated[first + n + 1] = 0;
      continue;
    }
    rotated[first + n] = a * cos[n] - b * sin[n];
    rotated[first + n + 1] = b * cos[n + 1] + a * sin[n + 1];
  }
}

/**
 * attention += q S, then S += q^T x, in one pass over those rows of the state whose pair of neurons fires.
 * @param {Float32Array | Float64Array} memory rows of D
 * @param {number} first_row of this text and head
 */
function read_and_write(memory, first_row, rotated, first, N, x, attention) {
  const D = x.length;
  for (let n = 0; n < N; n += 2) {
    const q0 = rotated[first + n];
    const q1 = rotated[first + n + 1];
    if (q0 === 0 && q1 === 0) continue;
    const row = (first_row + n) * D;
    for (let d = 0; d < D; d++) {
      const held0 = memory[row + d];
      const held1 = memory[row + D + d];
      attention[d] += q0 * held0 + q1 * held1; // the read before the write
      memory[row + d] = held0 + q0 * x[d];
      memory[row + D + d] = held1 + q1 * x[d];
    }
  }
}

/** xy_sparse of one head (R7): y_sparse matters only where x_sparse is not zero. */
function gate(encoder_v, x_sparse, first, N, yKV, xy_sparse) {
  const D = yKV.length;
  for (let n = first; n < first + N; n++) {
    const value = x_sparse[n] === 0 ? 0 : dot(encoder_v, n * D, yKV, D);
    xy_sparse[n] = value > 0 ? x_sparse[n] * value : 0;
  }
}

/** decoded += xy_sparse of one head @ its rows of the decoder (R9). */
function decode(decoder, xy_sparse, first, N, decoded) {
  const D = decoded.length;
  for (let n = first; n < first + N; n++) {
    const value = xy_sparse[n];
    if (value === 0) continue;
    const row = n * D;
    for (let d = 0; d < D; d++) decoded[d] += value * decoder[row + d];
  }
}

/** weights (nh, rows, columns) as (nh, columns, rows). */
export function transposed(weights, nh, rows, columns) {
  const out = new weights.constructor(weights.length);
  for (let h = 0; h < nh; h++) {
    const start = h * rows * columns;
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++) out[start + c * rows + r] = weights[start + r * columns + c];
    }
  }
  return out;
}
