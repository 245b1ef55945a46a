/**
 * What this port computes of the suite's vectors (conformance/VECTORS.md): every tensor but the gradients, which it does not claim.
 *
 *     bdh-conform vectors export vectors
 *     node vectors_cli.mjs vectors outputs [float32|float64]
 *     bdh-conform vectors check vectors outputs
 */

import { BDHConfig, frequencies_of } from "./config.mjs";
import { Model, RecurrentState } from "./decode.mjs";
import { loss, trace } from "./model.mjs";
import { WEIGHTS } from "./params.mjs";
import { rotation } from "./rope.mjs";
import { read_safetensors, write_safetensors } from "./safetensors.mjs";
import { Sampling, sample, uniform } from "./sampling.mjs";

/**
 * Compute a case.
 * @param {object} manifest its manifest.json
 * @param {Uint8Array} file its inputs.safetensors
 * @param {Float32ArrayConstructor | Float64ArrayConstructor} Real
 * @returns {Uint8Array} a safetensors file of the outputs
 */
export function outputs(manifest, file, Real) {
  const inputs = read_safetensors(file, "inputs.safetensors").tensors;
  const config = BDHConfig.from_dict(manifest.config);
  const { batch: B, phase } = manifest;
  const params = Object.fromEntries(WEIGHTS.map((name) => [name, Real.from(inputs[`params.${name}`].values)]));
  const tokens = Array.from(inputs.tokens.values, Number);
  const targets = Array.from(inputs.targets.values, Number);
  const stages = trace(tokens, B, params, config, phase);
  const found = {
    frequencies: { shape: [config.n_neurons], values: frequencies_of(config) },
    ...phases(inputs, config, phase, Real),
    ...Object.fromEntries(stages),
    loss: { shape: [1], values: Real.of(loss(stages.get("logits").values, targets, config.vocab_size)) },
    ...sampled(inputs),
  };
  const model = new Model(params, config, phase);
  for (const start of manifest.decode.starts) {
    for (const [name, tensor] of Object.entries(decode(model, tokens, B, BigInt(start))))
      found[`decode.${start}.${name}`] = tensor;
  }
  return write_safetensors(found, {});
}

/** Cosines and sines, each (1, P, N), at long positions (R4). */
function phases(inputs, config, phase, Real) {
  const each = [...inputs["phases.positions"].values].map((position) =>
    rotation(position, 1, frequencies_of(config), Real, phase),
  );
  const shape = [1, each.length, config.n_neurons];
  const laid = (side) => ({ shape, values: Real.from(each.flatMap((turned) => [...turned[side]])) });
  return { "phases.cos": laid("cos"), "phases.sin": laid("sin") };
}

/** Logits (B, T, V) of a text read token by token from `start` on, and the states after it (R13). */
function decode(model, tokens, B, start) {
  const { n_head: nh, n_neurons: N, n_embd: D, vocab_size: V } = model.config;
  const T = tokens.length / B;
  const state = new RecurrentState(start, model.init_state(B).layers, B);
  const logits = new model.Real(B * T * V);
  for (let t = 0; t < T; t++) {
    const row = model.advance(
      state,
      Array.from({ length: B }, (_, b) => tokens[b * T + t]),
    );
    for (let b = 0; b < B; b++) logits.set(row.subarray(b * V, (b + 1) * V), (b * T + t) * V);
  }
  const states = state.layers.map((values, i) => [`layers.${i}.state`, { shape: [B, nh, N, D], values }]);
  return { logits: { shape: [B, T, V], values: logits }, ...Object.fromEntries(states) };
}

/** Uniform draws (S,) and the tokens (S,) that they choose (R14). */
function sampled(inputs) {
  const of = (name) => inputs[`sampling.${name}`];
  const [S, C] = of("logits").shape;
  const uniforms = Array.from({ length: S }, (_, s) =>
    uniform(of("seed").values[s], of("position").values[s], of("row").values[s]),
  );
  const tokens = uniforms.map((draw, s) => {
    const how = new Sampling(of("temperature").values[s], Number(of("top_k").values[s]), of("seed").values[s]);
    return sample(of("logits").values.subarray(s * C, (s + 1) * C), draw, how);
  });
  return {
    "sampling.uniforms": { shape: [S], values: Float64Array.from(uniforms) },
    "sampling.tokens": { shape: [S], values: BigInt64Array.from(tokens, BigInt) },
  };
}
