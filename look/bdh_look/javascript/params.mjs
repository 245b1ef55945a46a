/** The five weights, shared by all layers. */

import { ParamsError } from "./errors.mjs";

export const WEIGHTS = ["embed", "encoder", "encoder_v", "decoder", "lm_head"];

/**
 * The shape of each weight.
 * @param {import("./config.mjs").BDHConfig} config
 * @returns {Record<string, number[]>}
 */
export function shapes(config) {
  const { vocab_size: V, n_embd: D, n_head: nh, n_neurons: N } = config;
  return { embed: [V, D], encoder: [nh, D, N], encoder_v: [nh, D, N], decoder: [nh * N, D], lm_head: [D, V] };
}

/** The number of trainable values. */
export function count(config) {
  return Object.values(shapes(config)).reduce((sum, shape) => sum + size_of(shape), 0);
}

/** The number of values of an array of this shape. */
export function size_of(shape) {
  return shape.reduce((product, length) => product * length, 1);
}

/**
 * Refuse weights whose shapes do not fit the configuration.
 * @param {Record<string, {shape: number[]}>} tensors
 * @param {import("./config.mjs").BDHConfig} config
 */
export function check_params(tensors, config) {
  for (const [name, shape] of Object.entries(shapes(config))) {
    const found = tensors[name].shape;
    if (found.join() !== shape.join()) {
      const sizes =
        shape.length === 2 && name !== "decoder" ? "vocab_size and n_embd" : "n_embd, n_head and mlp_internal_dim_multiplier";
      throw new ParamsError(`${name} has shape ${tuple(found)}, config asks for ${tuple(shape)}: check ${sizes}`);
    }
  }
}

/**
 * The SHA-256 of the weights as float32, and of the model's own frequencies if it has any.
 *
 * The same for every file and port that holds these values, so that a saved state finds the model it belongs to.
 * @param {Record<string, Float32Array>} params
 * @param {import("./config.mjs").BDHConfig} config
 * @returns {string} 64 hexadecimal digits
 */
export function fingerprint(params, config) {
  const digest = new SHA256();
  for (const [name, shape] of Object.entries(shapes(config))) digest.update_with(name, shape, params[name]);
  if (config.freqs) digest.update_with("freqs", [config.n_neurons], config.freqs);
  return digest.hexdigest();
}

/** A shape as the specification writes it: (4, 64, 512), or (8,) of one axis. */
export function tuple(shape) {
  return shape.length === 1 ? `(${shape[0]},)` : `(${shape.join(", ")})`;
}

/**
 * SHA-256 (FIPS 180-4). Browsers keep theirs from pages that come by plain http, and from nobody else, so this is our own.
 */
export class SHA256 {
  constructor() {
    this.state = Uint32Array.from(roots(8, 2));
    this.constants = Uint32Array.from(roots(64, 3));
    this.block = new Uint8Array(64);
    this.schedule = new Uint32Array(64);
    this.ring = new Uint32Array(8);
    this.length = 0; // bytes so far
  }

  /** Add a weight's name, shape and values as little-endian float32. */
  update_with(name, shape, values) {
    this.update(new TextEncoder().encode(`${name}${tuple(shape)}`));
    const numbers = values instanceof Float32Array ? values : Float32Array.from(values);
    this.update(new Uint8Array(numbers.buffer, numbers.byteOffset, numbers.byteLength));
  }

  /** @param {Uint8Array} bytes */
  update(bytes) {
    for (let i = 0; i < bytes.length; i++) {
      this.block[this.length % 64] = bytes[i];
      this.length += 1;
      if (this.length % 64 === 0) this.#compress();
    }
  }

  hexdigest() {
    const bits = new DataView(new ArrayBuffer(8));
    bits.setBigUint64(0, BigInt(this.length) * 8n);
    this.update(Uint8Array.of(0x80));
    while (this.length % 64 !== 56) this.update(Uint8Array.of(0));
    this.update(new Uint8Array(bits.buffer));
    return [...this.state].map((word) => word.toString(16).padStart(8, "0")).join("");
  }

  #compress() {
    const { block, schedule: w, constants, state } = this;
    for (let i = 0; i < 16; i++) {
      w[i] = (block[4 * i] << 24) | (block[4 * i + 1] << 16) | (block[4 * i + 2] << 8) | block[4 * i + 3];
    }
    for (let i = 16; i < 64; i++) {
      const s0 = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ (w[i - 15] >>> 3);
      const s1 = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ (w[i - 2] >>> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    // The eight words stand in a ring that turns by one with each round, so that none is moved.
    const ring = this.ring;
    ring.set(state);
    for (let i = 0; i < 64; i++) {
      const at = 64 - i; // where a stands, then b, c, ...
      const a = ring[at & 7];
      const e = ring[(at + 4) & 7];
      const s1 = turned(e, 6) ^ turned(e, 11) ^ turned(e, 25);
      const t1 = (ring[(at + 7) & 7] + s1 + ((e & ring[(at + 5) & 7]) ^ (~e & ring[(at + 6) & 7])) + constants[i] + w[i]) | 0;
      const s0 = turned(a, 2) ^ turned(a, 13) ^ turned(a, 22);
      const b = ring[(at + 1) & 7];
      const c = ring[(at + 2) & 7];
      ring[(at + 3) & 7] += t1;
      ring[(at + 7) & 7] = t1 + s0 + ((a & b) ^ (a & c) ^ (b & c));
    }
    for (let i = 0; i < 8; i++) state[i] += ring[i]; // after 64 rounds it stands as it began
  }
}

const turned = (word, by) => (word >>> by) | (word << (32 - by));

/** The first 32 bits of the fractional parts of a root of the first primes: a square root (2) or a cube root (3). */
function roots(count, degree) {
  const found = [];
  for (let candidate = 2n; found.length < count; candidate++) {
    let prime = true;
    for (let factor = 2n; factor * factor <= candidate; factor++) prime &&= candidate % factor !== 0n;
    if (prime) found.push(fraction_of_root(candidate, degree));
  }
  return found;
}

/** floor(root(prime) * 2^32) mod 2^32, by bisection in whole numbers: exact. */
function fraction_of_root(prime, degree) {
  const target = prime << BigInt(32 * degree);
  let [low, high] = [0n, 1n << 40n];
  while (high - low > 1n) {
    const middle = (low + high) >> 1n;
    if (middle ** BigInt(degree) <= target) low = middle;
    else high = middle;
  }
  return Number(low & 0xffffffffn);
}
