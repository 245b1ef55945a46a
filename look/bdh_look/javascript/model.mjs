/**
 * R1 to R12 in parallel form: the equations, in the order in which a token meets them. decode.mjs has the recurrent form (R13).
 *
 * Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary. Arrays are flat and
 * row-major. What is stored is float32, or float64 in a float64 model; every sum is accumulated in float64, which is what
 * JavaScript counts in. Nothing here is fast: it is what the fast form is read beside.
 */

import { frequencies_of } from "./config.mjs";
import { TokensError } from "./errors.mjs";
import { rope, rotation } from "./rope.mjs";

export const EPS = 1e-5;
export const IGNORE = -100; // targets of this value count for nothing

/**
 * Look the tokens up and normalise (R1).
 * @param {ArrayLike<number>} tokens (T,)
 * @returns {Float32Array | Float64Array} (T, D)
 */
export function embed(tokens, params, config) {
  const D = config.n_embd;
  const rows = new params.embed.constructor(tokens.length * D);
  for (let t = 0; t < tokens.length; t++) rows.set(params.embed.subarray(tokens[t] * D, (tokens[t] + 1) * D), t * D);
  return layer_norm(rows, D); // T D
}

/**
 * Centre and scale rows of length D: biased variance, eps inside the root, no affine (R2).
 * @param {Float32Array | Float64Array} x (..., D)
 * @param {number} D
 * @param {Float32Array | Float64Array} out (..., D), which may be x
 */
export function layer_norm(x, D, out = new x.constructor(x.length)) {
  for (let start = 0; start < x.length; start += D) {
    let sum = 0;
    let squares = 0;
    for (let d = start; d < start + D; d++) sum += x[d];
    const mean = sum / D;
    for (let d = start; d < start + D; d++) squares += (x[d] - mean) * (x[d] - mean);
    const scale = 1 / Math.sqrt(squares / D + EPS);
    for (let d = start; d < start + D; d++) out[d] = (x[d] - mean) * scale;
  }
  return out;
}

/** Keep what is positive. */
export function relu(x) {
  return x.map((value) => Math.max(value, 0));
}

/**
 * Similarity of each token with strictly earlier ones: K is Q, no scale, no softmax (R5).
 * @param {Float32Array | Float64Array} rotated (T, N) of one head
 * @returns {Float32Array | Float64Array} (T, T)
 */
export function scores(rotated, T, N) {
  const similar = new rotated.constructor(T * T);
  for (let t = 0; t < T; t++) {
    for (let u = 0; u < t; u++) {
      let sum = 0;
      for (let n = 0; n < N; n++) sum += rotated[t * N + n] * rotated[u * N + n];
      similar[t * T + u] = sum;
    }
  }
  return similar; // T T
}

/** The product of a (n, k) and b (k, m). */
export function product(a, b, n, k, m) {
  const out = new a.constructor(n * m);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < m; j++) {
      let sum = 0;
      for (let l = 0; l < k; l++) sum += a[i * k + l] * b[l * m + j];
      out[i * m + j] = sum;
    }
  }
  return out;
}

/**
 * Run one layer on x (T, D) of one text that begins here.
 * @returns {Record<string, Float32Array | Float64Array>} the stages of a trace, in order; those of heads are (nh, T, ...)
 */
export function layer(x, params, config, cos, sin) {
  const { n_embd: D, n_head: nh, n_neurons: N } = config;
  const T = x.length / D;
  const by_head = { x_sparse: [], rotated: [], scores: [], attention: [], yKV: [], y_sparse: [], xy_sparse: [] };
  for (let h = 0; h < nh; h++) {
    const x_sparse = relu(product(x, head(params.encoder, h, D * N), T, D, N)); // T N
    const rotated = rope(x_sparse, cos, sin); // T N
    const similar = scores(rotated, T, N); // T T
    const attention = product(similar, x, T, T, D); // T D
    const yKV = layer_norm(attention, D); // T D
    const y_sparse = relu(product(yKV, head(params.encoder_v, h, D * N), T, D, N)); // T N
    const xy_sparse = x_sparse.map((value, n) => value * y_sparse[n]); // T N
    const stages = { x_sparse, rotated, scores: similar, attention, yKV, y_sparse, xy_sparse };
    for (const [name, values] of Object.entries(stages)) by_head[name].push(values);
  }
  const decoded = product(merge_heads(by_head.xy_sparse, T, N), params.decoder, T, nh * N, D); // T D
  const y = layer_norm(decoded, D);
  const stages = Object.fromEntries(Object.entries(by_head).map(([name, values]) => [name, joined(values)]));
  return {
    ...stages,
    decoded,
    y,
    x: layer_norm(
      x.map((value, d) => value + y[d]),
      D,
    ),
  };
}

/** One head of weights (nh, size). */
function head(weights, h, size) {
  return weights.subarray(h * size, (h + 1) * size);
}

/** Arrays one after the other. */
function joined(arrays) {
  const out = new arrays[0].constructor(arrays.length * arrays[0].length);
  arrays.forEach((values, i) => out.set(values, i * values.length));
  return out;
}

/** Lay the heads, each (T, N), side by side, head-major: (T, nh*N) (R9). */
export function merge_heads(xy_sparse, T, N) {
  const nh = xy_sparse.length;
  const merged = new xy_sparse[0].constructor(T * nh * N);
  for (let t = 0; t < T; t++) {
    for (let h = 0; h < nh; h++) merged.set(xy_sparse[h].subarray(t * N, (t + 1) * N), (t * nh + h) * N);
  }
  return merged;
}

/** Logits (T, V) of the next token, from x (T, D) (R11). */
export function readout(x, params, config) {
  const { n_embd: D, vocab_size: V } = config;
  return product(x, params.lm_head, x.length / D, D, V);
}

/**
 * Every stage of the parallel form by name, in the order of its computation.
 * @param {ArrayLike<number>} tokens (B, T)
 * @param {number} B
 * @param {Record<string, Float32Array | Float64Array>} params
 * @param {import("./config.mjs").BDHConfig} config
 * @param {"exact" | "float32"} phase
 * @returns {Map<string, {shape: number[], values: Float32Array | Float64Array}>}
 */
export function trace(tokens, B, params, config, phase = "exact") {
  const T = tokens.length / B;
  const { n_embd: D, n_head: nh, n_neurons: N, vocab_size: V } = config;
  const axes = { x_sparse: [nh, T, N], rotated: [nh, T, N], scores: [nh, T, T], attention: [nh, T, D], yKV: [nh, T, D] };
  Object.assign(axes, { y_sparse: [nh, T, N], xy_sparse: [nh, T, N], decoded: [T, D], y: [T, D], x: [T, D] });
  const { cos, sin } = rotation(0n, T, frequencies_of(config), params.encoder.constructor, phase);
  const stages = new Map(); // of each text, in turn
  const keep = (name, shape, values) => {
    if (!stages.has(name)) stages.set(name, { shape: [B, ...shape], parts: [] });
    stages.get(name).parts.push(values);
  };
  for (let b = 0; b < B; b++) {
    let x = embed(tokens.slice(b * T, (b + 1) * T), params, config);
    keep("embed", [T, D], x);
    for (let i = 0; i < config.n_layer; i++) {
      const kept = layer(x, params, config, cos, sin);
      for (const [name, values] of Object.entries(kept)) keep(`layers.${i}.${name}`, axes[name], values);
      x = kept.x;
    }
    keep("logits", [T, V], readout(x, params, config));
  }
  return new Map([...stages].map(([name, { shape, parts }]) => [name, { shape, values: joined(parts) }]));
}

/** The parallel form: tokens (B, T) to logits (B, T, V). */
export function forward(tokens, B, params, config, phase = "exact") {
  return trace(tokens, B, params, config, phase).get("logits").values;
}

/**
 * Mean cross entropy in nats over the targets that are not ignored (R12).
 * @param {Float32Array | Float64Array} logits (B*T, V)
 * @param {ArrayLike<number>} targets (B*T,)
 * @returns {number}
 */
export function loss(logits, targets, V) {
  let [sum, counted] = [0, 0];
  for (let t = 0; t < targets.length; t++) {
    if (targets[t] === IGNORE) continue;
    sum -= log_softmax(logits.subarray(t * V, (t + 1) * V))[targets[t]];
    counted += 1;
  }
  if (!counted) throw new TokensError(`every target is ${IGNORE}, which is ignored: a mean over nothing has no value`);
  return sum / counted;
}

/**
 * Log-probabilities in float64.
 * @param {Float32Array | Float64Array} logits (V,)
 * @returns {Float64Array} (V,)
 */
export function log_softmax(logits) {
  let [best, sum] = [-Infinity, 0];
  for (const logit of logits) if (logit > best) best = logit;
  for (const logit of logits) sum += Math.exp(logit - best);
  const log_sum = Math.log(sum);
  return Float64Array.from(logits, (logit) => logit - best - log_sum);
}
