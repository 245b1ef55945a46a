/** R4: rotary positions on the neuron axis, interleaved pairs (2i, 2i+1), phases counted in turns. */

import { ConfigError } from "./errors.mjs";

export const PHASES = ["exact", "float32"];
export const THETA = 2 ** 16;
export const MAX_POSITION = 2n ** 63n; // positions are whole numbers below it, as BigInt

// How far a stored table may be from the normative one, relatively, and still be it: the specification's stored_table.py.
const TABLE_ROUNDING = 2 ** -19;

/**
 * Turns per token of each neuron: the normative float32 table.
 *
 * Every operation is rounded to float32, as in published models. The power is taken in float64 and rounded once: a power of
 * float32 would not be correctly rounded.
 * @param {number} n_neurons N
 * @returns {Float32Array} (N,)
 */
export function frequencies(n_neurons) {
  const table = new Float32Array(n_neurons);
  for (let n = 0; n < n_neurons; n++) {
    const exponent = Math.fround((n - (n % 2)) / Math.fround(n_neurons));
    const growth = Math.fround(THETA ** exponent);
    table[n] = Math.fround(1 / growth) / Math.fround(2 * Math.PI);
  }
  return table;
}

/**
 * Whether frequencies (N,) from a file are the normative table, as its writer's arithmetic rounded it.
 * @param {Float32Array} stored
 * @returns {boolean}
 */
export function is_the_table(stored) {
  const wanted = frequencies(stored.length);
  return stored.every((value, n) => Math.abs(value - wanted[n]) <= TABLE_ROUNDING * Math.abs(wanted[n]));
}

/**
 * A model's own table, refused unless every number is finite.
 * @param {Float32Array | Float64Array} values (N,)
 * @returns {Float32Array} (N,)
 */
export function own_frequencies(values) {
  const table = Float32Array.from(values);
  const n = table.findIndex((value) => !Number.isFinite(value));
  if (n >= 0) throw new ConfigError(`frequency ${n} is ${values[n]}: a model turns by finite numbers of float32, so mend it`);
  return table;
}

/**
 * Turns per token in units of 2^-64 turns: whole numbers whose products with positions wrap at whole turns.
 *
 * Every f of the normative table is a whole number of them. Others are rounded to the nearest one, ties to even; whole turns
 * drop out, and what turns backwards is its two's complement.
 * @param {Float32Array} table (N,)
 * @returns {BigUint64Array} (N,)
 */
export function fixed_point(table) {
  return BigUint64Array.from(table, (f) => BigInt.asUintN(64, BigInt(rint((f - Math.floor(f + 0.5)) * 2 ** 64))));
}

/** The nearest whole number, ties to even. */
function rint(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}

/**
 * The phases of one position after another: cosine and sine for each neuron, in the type of the model's numbers.
 *
 * Exact phases are 64-bit fractions of a turn, kept as two halves of 32 bits. From one position to the next they take one
 * addition that wraps by itself; a product of BigInt is needed only where a text begins.
 */
export class Rotation {
  /**
   * @param {Float32Array} table turns per token (N,)
   * @param {"exact" | "float32"} phase
   * @param {Float32ArrayConstructor | Float64ArrayConstructor} Real
   */
  constructor(table, phase, Real) {
    this.table = table;
    this.phase = phase;
    this.position = -1n; // nowhere yet
    this.cos = new Real(table.length); // (N,)
    this.sin = new Real(table.length); // (N,)
    this.whole = fixed_point(table); // turns per token in units of 2^-64
    this.step = halves(this.whole);
    this.turned = { high: new Uint32Array(table.length), low: new Uint32Array(table.length) };
    // Two neurons of a pair turn alike, unless a model's own table has it otherwise.
    this.in_pairs = table.every((f, n) => f === table[n - (n % 2)]);
  }

  /**
   * Set cos and sin to the phases of a position.
   * @param {bigint} position
   */
  turn_to(position) {
    if (position === this.position) return;
    if (this.phase === "exact") this.#turn_exactly(position);
    this.position = position;
    const { high, low } = this.turned;
    const { cos, sin, table } = this;
    for (let n = 0; n < table.length; n++) {
      if (this.in_pairs && n % 2) {
        cos[n] = cos[n - 1];
        sin[n] = sin[n - 1];
        continue;
      }
      const turns = this.phase === "exact" ? high[n] * 2 ** -32 + low[n] * 2 ** -64 : float32_turns(position, table[n]);
      cos[n] = Math.cos(2 * Math.PI * turns);
      sin[n] = Math.sin(2 * Math.PI * turns);
    }
  }

  /**
   * The phase of one neuron at a position, in turns.
   * @param {number} n
   * @param {bigint} position
   */
  turns(n, position) {
    if (this.phase === "float32") return float32_turns(position, this.table[n]);
    return Number(BigInt.asUintN(64, position * this.whole[n])) * 2 ** -64;
  }

  #turn_exactly(position) {
    const { high, low } = this.turned;
    const { step } = this;
    if (position !== this.position + 1n || this.position < 0n) {
      this.turned = halves(this.whole.map((f) => BigInt.asUintN(64, position * f)));
      return;
    }
    for (let n = 0; n < low.length; n++) {
      low[n] += step.low[n];
      high[n] += step.high[n] + (low[n] < step.low[n] ? 1 : 0); // the carry
    }
  }
}

/** What published models saw: the product rounded to float32. Its error grows with the position. */
function float32_turns(position, f) {
  return Math.fround(Math.fround(Number(position)) * f) % 1;
}

function halves(whole) {
  return {
    high: Uint32Array.from(whole, (f) => Number(f >> 32n)),
    low: Uint32Array.from(whole, (f) => Number(f & 0xffffffffn)),
  };
}

/**
 * Cosine and sine of the phases of positions from `start` on.
 * @param {bigint} start
 * @param {number} length T
 * @param {Float32Array} table (N,)
 * @param {Float32ArrayConstructor | Float64ArrayConstructor} Real
 * @param {"exact" | "float32"} phase
 * @returns {{cos: Float32Array | Float64Array, sin: Float32Array | Float64Array}} each (T, N)
 */
export function rotation(start, length, table, Real, phase) {
  const N = table.length;
  const turning = new Rotation(table, phase, Real);
  const [cos, sin] = [new Real(length * N), new Real(length * N)];
  for (let t = 0; t < length; t++) {
    turning.turn_to(start + BigInt(t));
    cos.set(turning.cos, t * N);
    sin.set(turning.sin, t * N);
  }
  return { cos, sin };
}

/**
 * Turn each pair of neurons by its phase: v * cos + swap(v) * sin, where swap makes (-b, a) of (a, b).
 *
 * Where a model's own frequencies differ within a pair this is no rotation, and neither shorter nor relative.
 * @param {Float32Array | Float64Array} v (T, N)
 * @param {Float32Array | Float64Array} cos (T, N)
 * @param {Float32Array | Float64Array} sin (T, N)
 * @returns {Float32Array | Float64Array} (T, N)
 */
export function rope(v, cos, sin) {
  const rotated = new v.constructor(v.length);
  for (let n = 0; n < v.length; n += 2) {
    rotated[n] = v[n] * cos[n] - v[n + 1] * sin[n];
    rotated[n + 1] = v[n + 1] * cos[n + 1] + v[n] * sin[n + 1];
  }
  return rotated;
}
