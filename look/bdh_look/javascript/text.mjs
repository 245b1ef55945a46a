/** Text from a model: tokens drawn one after the other, each read before the next is drawn. */

import { TokensError } from "./errors.mjs";
import { check_length, sample, uniform } from "./sampling.mjs";

/**
 * Each new token as soon as it is drawn. The state is changed in place: what it has read is all but the last token.
 * @param {import("./decode.mjs").Model} model
 * @param {ArrayLike<number>} prompt (T,), T at least 1: what comes next in the text that the state remembers
 * @param {number} max_new_tokens
 * @param {import("./sampling.mjs").Sampling} how
 * @param {import("./decode.mjs").RecurrentState} state of one text
 * @yields {number}
 */
export function* stream(model, prompt, max_new_tokens, how, state = model.init_state()) {
  check_length(max_new_tokens);
  if (!prompt.length) throw new TokensError("the prompt is empty: a text begins with at least one byte");
  let tokens = prompt;
  for (let i = 0; i < max_new_tokens; i++) {
    let logits;
    for (const token of tokens) logits = model.advance(state, [token]);
    const chosen = sample(logits, uniform(how.seed, state.position), how);
    yield chosen;
    tokens = [chosen];
  }
}

/**
 * A prompt and its continuation. One seed gives one text on every port (R14).
 * @param {import("./decode.mjs").Model} model
 * @param {Uint8Array} prompt
 * @returns {Uint8Array}
 */
export function generate(model, prompt, max_new_tokens, how) {
  return Uint8Array.from([...prompt, ...stream(model, prompt, max_new_tokens, how)]);
}
