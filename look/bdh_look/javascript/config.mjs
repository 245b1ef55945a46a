/** The six numbers that make a BDH model, and the frequencies that a model may bring. */

import { ConfigError, shown } from "./errors.mjs";
import { frequencies, is_the_table, own_frequencies } from "./rope.mjs";

export const DEFAULTS = {
  n_layer: 6, // L: how often the shared weights are applied
  n_embd: 256, // D
  dropout: 0.1, // in training only (R8): this port never drops
  n_head: 4, // nh
  mlp_internal_dim_multiplier: 128,
  vocab_size: 256, // V: raw bytes
};
export const SIZES = Object.keys(DEFAULTS);

/** Sizes of a model. */
export class BDHConfig {
  /**
   * @param {Partial<typeof DEFAULTS>} sizes
   * @param {Float32Array | Float64Array | null} freqs the model's own turns per token (N,), where it has any (R4)
   */
  constructor(sizes = {}, freqs = null) {
    Object.assign(this, DEFAULTS, sizes);
    for (const name of SIZES) {
      if (name !== "dropout") demand_positive_integer(name, this[name]);
    }
    if (typeof this.dropout !== "number" || !(this.dropout >= 0 && this.dropout < 1)) {
      throw new ConfigError(`dropout is ${told(this.dropout)}: it must be a number from 0 up to, but not including, 1`);
    }
    const N = this.n_neurons;
    if (N < 2 || N % 2) {
      throw new ConfigError(
        `${N} neurons per head, which rotation cannot pair: mlp_internal_dim_multiplier * n_embd // n_head =` +
          ` ${this.mlp_internal_dim_multiplier} * ${this.n_embd} // ${this.n_head} must be even and at least 2`,
      );
    }
    this.freqs = freqs && own(freqs, N);
  }

  /** N, the neurons of one head. */
  get n_neurons() {
    return Math.floor((this.mlp_internal_dim_multiplier * this.n_embd) / this.n_head);
  }

  /** The six numbers, without the frequencies, which files carry as a tensor. */
  as_dict() {
    return Object.fromEntries(SIZES.map((name) => [name, this[name]]));
  }

  /** Read a configuration in which every key is known and n_layer, which no weight shows, is present. */
  static from_dict(values, freqs = null) {
    if (values === null || typeof values !== "object" || Array.isArray(values)) {
      throw new ConfigError(`the configuration is ${told(values)}: it must be a mapping of sizes`);
    }
    const unknown = Object.keys(values).filter((name) => !SIZES.includes(name));
    if (unknown.length) {
      throw new ConfigError(`unknown configuration keys ${shown(unknown.sort().join(", "))}: BDH has ${SIZES.join(", ")}`);
    }
    if (!("n_layer" in values)) {
      throw new ConfigError("no n_layer in the configuration: layers share weights, so nothing else tells it; say it");
    }
    return new BDHConfig(values, freqs);
  }
}

/**
 * Turns per token of each neuron of a model: its own table if it brings one, or else the normative one.
 * @param {BDHConfig} config
 * @returns {Float32Array} (N,)
 */
export function frequencies_of(config) {
  return config.freqs ?? frequencies(config.n_neurons);
}

/** The table of a model that brings one; null if it is the normative one, so that two equal models are equal. */
function own(freqs, N) {
  if (freqs.length !== N) {
    throw new ConfigError(`${freqs.length} frequencies for ${N} neurons: check n_embd, n_head and mlp_internal_dim_multiplier`);
  }
  const table = own_frequencies(freqs);
  return is_the_table(table) ? null : table;
}

function demand_positive_integer(name, value) {
  if (!Number.isSafeInteger(value) || value < 1) {
    throw new ConfigError(`${name} is ${told(value)}: it must be a whole number of at least 1`);
  }
}

const told = (value) => shown(JSON.stringify(value), 80);
