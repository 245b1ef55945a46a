/** The canonical checkpoint: one safetensors file that describes itself. And the recurrent state, likewise. */

import { BDHConfig } from "./config.mjs";
import { RecurrentState, check_token } from "./decode.mjs";
import { CheckpointError, StateError, shown } from "./errors.mjs";
import { WEIGHTS, check_params, tuple } from "./params.mjs";
import { MAX_POSITION } from "./rope.mjs";
import { FLOATS, read_safetensors, write_safetensors } from "./safetensors.mjs";

export const SPEC_VERSION = "1.0";
const [FORMAT, STATE_FORMAT] = ["bdh", "bdh-state"];
const FREQS = "freqs"; // the tensor (N,) of a model that brings its own frequencies

// Names that weights have in other dialects of BDH, as bdh-convert knows them.
const OTHER_DIALECTS = /(^|[._])(embed[._]weight|attn[._]freqs|encoder(_v)?|decoder(_[xy])?|lm_head([._]weight)?|readout)$/;

/**
 * The weights and the configuration of a canonical checkpoint.
 * @param {Uint8Array} bytes
 * @param {string} name of the file, for errors
 * @returns {{params: Record<string, Float32Array>, config: BDHConfig, dtype: string, step: number | null}} dtype as in the
 *   file; step of the training run, where the file tells it
 */
export function read(bytes, name) {
  const { tensors, metadata } = read_safetensors(bytes, name);
  demand_format(name, metadata, FORMAT, tensors);
  const { [FREQS]: own, ...weights } = without_moments(tensors);
  if (Object.keys(weights).sort().join() !== [...WEIGHTS].sort().join()) {
    const names = shown(Object.keys(tensors).sort().join(", "));
    throw new CheckpointError(`${shown(name)} holds ${names}: a canonical file holds ${WEIGHTS.join(", ")}`);
  }
  for (const [key, { dtype }] of Object.entries(tensors)) {
    if (!FLOATS.includes(dtype))
      throw new CheckpointError(`${shown(name)} holds ${key} as ${dtype}: weights are floating point numbers`);
  }
  if (own && own.values.length !== own.shape.at(-1)) {
    throw new CheckpointError(
      `${shown(name)} holds frequencies of shape ${tuple(own.shape)}: give one number for each neuron, (N,)`,
    );
  }
  const config = BDHConfig.from_dict(config_in(name, metadata), own?.values ?? null);
  check_params(weights, config);
  const params = Object.fromEntries(WEIGHTS.map((key) => [key, as_float32(weights[key].values)]));
  return { params, config, dtype: weights.encoder.dtype, step: step_in(metadata) };
}

/** What bdh-train keeps beside the weights to go on with a run is no part of the model. */
function without_moments(tensors) {
  return Object.fromEntries(Object.entries(tensors).filter(([name]) => !/^optimizer\.(first|second)\./.test(name)));
}

/** The step of a checkpoint that bdh-train saved. */
function step_in({ training }) {
  try {
    const { step } = JSON.parse(training).progress;
    return Number.isSafeInteger(step) ? step : null;
  } catch {
    return null;
  }
}

/**
 * A file with a state, the fingerprint of its model and the tokens that are written but not yet read. Every port can go on with it.
 * @param {RecurrentState} state
 * @param {BDHConfig} config
 * @param {string} model fingerprint of the weights
 * @param {ArrayLike<number>} pending (P,) of one text
 * @returns {Uint8Array}
 */
export function save_state(state, config, model, pending) {
  const { n_head: nh, n_neurons: N, n_embd: D } = config;
  const layers = state.layers.map((values, i) => [`layers.${i}.state`, { shape: [state.batch, nh, N, D], values }]);
  const tokens = { shape: [1, pending.length], values: BigInt64Array.from(pending, BigInt) };
  const about = { format: STATE_FORMAT, spec_version: SPEC_VERSION, config: JSON.stringify(config.as_dict()) };
  return write_safetensors(
    { ...Object.fromEntries(layers), pending: tokens },
    { ...about, model, position: String(state.position) },
  );
}

/**
 * A saved state and its pending tokens, if it belongs to the model with this fingerprint.
 * @param {Uint8Array} bytes
 * @param {string} name of the file, for errors
 * @param {BDHConfig} config
 * @param {string} model fingerprint of the weights
 * @returns {{state: RecurrentState, pending: number[]}}
 */
export function read_state(bytes, name, config, model) {
  const { tensors, metadata } = read_safetensors(bytes, name);
  const file = shown(name);
  demand_format(name, metadata, STATE_FORMAT, tensors);
  if (metadata.model !== model) {
    const theirs = shown(metadata.model, 64).slice(0, 12);
    throw new CheckpointError(
      `${file} is a state of model ${theirs}, this is model ${model.slice(0, 12)}: load the weights it was saved with`,
    );
  }
  const { pending, ...layers } = tensors;
  const memories = Object.keys(layers).map((_, i) => layers[`layers.${i}.state`]);
  const fit = [1, config.n_head, config.n_neurons, config.n_embd];
  if (memories.length !== config.n_layer || memories.some((memory) => memory?.shape.join() !== fit.join())) {
    const held = shown(
      Object.values(layers)
        .map(({ shape }) => tuple(shape))
        .join(", "),
    );
    throw new StateError(
      `${file} holds ${held}, the model ${config.n_layer} times ${tuple(fit)} for one text: it is another's`,
    );
  }
  const wrong = memories.findIndex(({ dtype }) => dtype !== "F32" && dtype !== "F64");
  if (wrong >= 0)
    throw new CheckpointError(
      `${file} holds layer ${wrong} as ${memories[wrong].dtype}: a state is float32 or float64, so save it again`,
    );
  if (pending?.shape.length !== 2 || pending.shape[0] !== 1 || !["I64", "U64", "I32"].includes(pending.dtype)) {
    throw new CheckpointError(`${file} holds no pending tokens of one text, (1, P): save it again`);
  }
  const tokens = Array.from(pending.values, Number);
  for (const token of tokens) check_token(token, config);
  const state = new RecurrentState(
    position_in(file, metadata),
    memories.map(({ values }) => as_float32(values).slice()),
  );
  return { state, pending: tokens };
}

/** Whether a file says of itself that it is a state: it is then read as one, whatever its name. */
export function is_state(bytes) {
  try {
    return read_safetensors(bytes, "").metadata.format === STATE_FORMAT;
  } catch {
    return false;
  }
}

function position_in(file, metadata) {
  const position = /^\d{1,19}$/.test(metadata.position ?? "") ? BigInt(metadata.position) : MAX_POSITION;
  if (position < MAX_POSITION) return position;
  throw new StateError(`${file} is at position ${shown(metadata.position, 40)}: positions run from 0 to 2^63 - 1`);
}

function config_in(name, metadata) {
  try {
    return JSON.parse(metadata.config);
  } catch {
    throw new CheckpointError(
      `${shown(name)} has no configuration that can be read: convert its source again with bdh-convert`,
    );
  }
}

function demand_format(name, metadata, wanted, tensors) {
  const [file, found] = [shown(name), metadata.format];
  if (found !== wanted) {
    const names = Object.keys(tensors);
    if (found === undefined && names.some((key) => OTHER_DIALECTS.test(key))) {
      throw new CheckpointError(
        `${file} holds ${shown(names.sort().join(", "), 90)}, another dialect: convert it with bdh-convert --to numpy`,
      );
    }
    throw new CheckpointError(
      `${file} has format ${shown(JSON.stringify(found), 80)}, wanted "${wanted}": ${advice(found, wanted)}`,
    );
  }
  const version = metadata.spec_version ?? "";
  if (version.split(".")[0] !== SPEC_VERSION.split(".")[0]) {
    throw new CheckpointError(
      `${file} follows specification ${shown(version, 40)}, this is ${SPEC_VERSION}: use a release that reads it`,
    );
  }
}

function advice(found, wanted) {
  if (wanted === STATE_FORMAT) return "a state is what this page or bdh-generate --save-state wrote";
  if (found === STATE_FORMAT) return "it is a saved state, so open the weights that it was saved with first";
  return "convert it with bdh-convert --to numpy";
}

/** Numbers of a file in the type that this port computes in. */
function as_float32(values) {
  return values instanceof Float32Array ? values : Float32Array.from(values);
}
