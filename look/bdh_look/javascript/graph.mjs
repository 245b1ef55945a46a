/**
 * The graphs of neurons, as bdh_look.graph has them, and their hubs. Which neuron excites which: Gx = encoder after decoder,
 * and Gy = encoder_v after decoder. An edge is an entry above a threshold, which leaves a neuron so many edges on average.
 */

import { randomLcg, shuffler } from "./d3.mjs";
import { transposed } from "./decode.mjs";

export const KINDS = ["Gx", "Gy"];
export const EDGES = 8; // per neuron, on average
export const LARGEST = 8192; // neurons: of more a page would work for minutes
const SAMPLE = 4_000_000; // entries that the threshold is taken from, where there are more
const HUBS = 12; // neurons of the largest degree, which are drawn
const PARTNERS = 12; // of each, those at the other ends of its strongest edges, which are drawn too
const LINKS = 600; // edges between all these, the strongest
const ROWS = 8; // worked out between two breaths of the page

/**
 * A graph and its hubs. Neurons are counted over all heads, head-major.
 * @typedef {{threshold: number, edges: number, out: Uint32Array, into: Uint32Array, drawn: Uint32Array, links: Uint32Array,
 *   weights: Float32Array, chance: Distribution}} Hubs
 *   out, into: (nh*N,) how many each neuron excites, and how many it; drawn: hubs by degree, the largest first, and then their
 *   partners; links: (edges, 2) places in drawn, from and to, by weight; chance: of weights that are shuffled
 * @typedef {{out: Uint32Array, into: Uint32Array, both: Uint32Array}} Distribution how many neurons have each degree
 */

/**
 * Work a graph out, in steps.
 * @param {Record<string, Float32Array>} params
 * @param {import("./config.mjs").BDHConfig} config
 * @param {"Gx" | "Gy"} kind
 * @yields {number} how much of it is done, from 0 to 1
 * @returns {Generator<number, Hubs>}
 */
export function* hubs(params, config, kind) {
  const { n_embd: D, n_head: nh, n_neurons: N } = config;
  const towards = transposed(kind === "Gx" ? params.encoder : params.encoder_v, nh, D, N); // nh*N D
  const { found, ...whole } = yield* halved(graph(params.decoder, towards, D), 0);
  const mix = shuffler(randomLcg(0)); // the same control every time
  const mixed = yield* halved(graph(mix(params.decoder.slice()), mix(towards), D), 0.5);
  return { ...whole, edges: found.length, ...largest_of(whole, found), chance: distribution(mixed) };
}

function* halved(steps, from) {
  for (;;) {
    const { done, value } = steps.next();
    if (done) return value;
    yield from + value / 2;
  }
}

/** Every edge: decoder[i] . towards[j] above the threshold, the decoder's rows without their mean, which R2 takes away. */
function* graph(decoder, towards, D) {
  const n = decoder.length / D;
  const centred = centred_rows(decoder, D);
  const row = new Float64Array(n);
  const every = Math.max(1, Math.ceil((n * n) / SAMPLE));
  const sampled = Math.ceil(n / every);
  const share = 1 - Math.min(EDGES, n / 2) / n;
  const upper = new Upper(share, sampled * n);
  for (let i = 0; i < n; i += every) {
    products(centred, i, towards, D, row);
    for (const value of row) upper.add(value);
    if ((i / every) % ROWS === 0) yield i / n / (1 + every);
  }
  const threshold = Math.max(0, upper.quantile());
  const [out, into, found] = [new Uint32Array(n), new Uint32Array(n), []];
  for (let i = 0; i < n; i++) {
    products(centred, i, towards, D, row);
    for (let j = 0; j < n; j++) {
      if (row[j] <= threshold) continue;
      out[i] += 1;
      into[j] += 1;
      found.push([i, j, row[j]]);
    }
    if (i % ROWS === 0) yield (1 + (every * i) / n) / (1 + every);
  }
  return { threshold, out, into, found };
}

function centred_rows(decoder, D) {
  const rows = Float64Array.from(decoder);
  for (let start = 0; start < rows.length; start += D) {
    const row = rows.subarray(start, start + D);
    const mean = row.reduce((sum, value) => sum + value, 0) / D;
    for (let d = 0; d < D; d++) row[d] -= mean;
  }
  return rows;
}

/** One row of the graph (nh*N,): four entries at a time, so that the row is fetched once for them. */
function products(centred, i, towards, D, row) {
  const n = row.length;
  let j = 0;
  for (; j + 3 < n; j += 4) {
    let s0 = 0;
    let s1 = 0;
    let s2 = 0;
    let s3 = 0;
    for (let d = 0, from = i * D, to = j * D; d < D; d++, from++, to++) {
      const value = centred[from];
      s0 += value * towards[to];
      s1 += value * towards[to + D];
      s2 += value * towards[to + 2 * D];
      s3 += value * towards[to + 3 * D];
    }
    row[j] = s0;
    row[j + 1] = s1;
    row[j + 2] = s2;
    row[j + 3] = s3;
  }
  for (; j < n; j++) {
    row[j] = 0;
    for (let d = 0; d < D; d++) row[j] += centred[i * D + d] * towards[j * D + d];
  }
}

/** A quantile among the largest of many values, of which it holds no more than it must. */
class Upper {
  /**
   * @param {number} share of values below it
   * @param {number} count of values there will be
   */
  constructor(share, count) {
    this.place = share * (count - 1); // among all, sorted; between two of them by the line that joins them
    this.kept = count - Math.floor(this.place);
    this.values = new Float64Array(Math.min(count, 4 * this.kept + 16));
    this.size = 0;
    this.least = -Infinity;
  }

  add(value) {
    if (value < this.least) return;
    this.values[this.size++] = value;
    if (this.size === this.values.length) this.#shrink();
  }

  #shrink() {
    const sorted = this.values.subarray(0, this.size).sort();
    const from = Math.max(0, this.size - this.kept);
    sorted.copyWithin(0, from);
    this.size -= from;
    if (this.size === this.kept) this.least = this.values[0];
  }

  quantile() {
    this.#shrink();
    const [lower, upper] = [this.values[0], this.values[Math.min(1, this.size - 1)]];
    return lower + (upper - lower) * (this.place - Math.floor(this.place));
  }
}

/** The neurons of the largest degree, whom they are joined with most, and the strongest edges between all these. */
function largest_of({ out, into }, found) {
  const degree = sums(out, into);
  const joined = new Map(
    [...degree.keys()]
      .sort((a, b) => degree[b] - degree[a] || a - b)
      .slice(0, HUBS)
      .map((hub) => [hub, []]),
  );
  const by_weight = found.filter(([i, j]) => i !== j).sort((a, b) => b[2] - a[2]);
  for (const [i, j] of by_weight) {
    joined.get(i)?.push(j);
    joined.get(j)?.push(i);
  }
  const partners = [...joined.values()].flatMap((all) => [...new Set(all)].slice(0, PARTNERS));
  const drawn = [...new Set([...joined.keys(), ...partners])];
  const place = new Map(drawn.map((neuron, i) => [neuron, i]));
  const strongest = by_weight.filter(([i, j]) => place.has(i) && place.has(j)).slice(0, LINKS);
  return {
    drawn: Uint32Array.from(drawn),
    links: Uint32Array.from(strongest.flatMap(([i, j]) => [place.get(i), place.get(j)])),
    weights: Float32Array.from(strongest, ([, , weight]) => weight),
  };
}

/** Degrees both ways. */
export const sums = (out, into) => Uint32Array.from(out, (value, i) => value + into[i]);

/** How many neurons have each degree. */
function counts(degrees) {
  const counted = new Uint32Array(degrees.reduce((one, other) => Math.max(one, other), 0) + 1);
  for (const degree of degrees) counted[degree] += 1;
  return counted;
}

/**
 * The share of neurons with at least a degree, for each degree above zero that some neuron has.
 * @param {Uint32Array} counted how many neurons have each degree
 * @returns {[number, number][]}
 */
export function exceeding(counted) {
  const total = counted.reduce((sum, one) => sum + one, 0);
  const points = [];
  let above = 0;
  for (let degree = counted.length - 1; degree > 0; degree--) {
    above += counted[degree];
    if (counted[degree]) points.unshift([degree, above / total]);
  }
  return points;
}

/** How degrees are distributed, as `chance` has it of the control. */
export function distribution({ out, into }) {
  return { out: counts(out), into: counts(into), both: counts(sums(out, into)) };
}

/** The largest degree that is in a distribution. */
export const largest = (counted) => counted.length - 1;
