/** What can go wrong, by whose fault. Every message states the fact, the value, the place and the next step. */

/** Any error that this port raises on purpose. */
export class BDHError extends Error {}

/** A configuration that describes no BDH model. */
export class ConfigError extends BDHError {}

/** Weights that do not fit their configuration. */
export class ParamsError extends BDHError {}

/** Tokens or targets that no model of this vocabulary can read. */
export class TokensError extends BDHError {}

/** A recurrent state of another model, or one that is none. */
export class StateError extends BDHError {}

/** A temperature, top_k, seed or length that defines no distribution. */
export class SamplingError extends BDHError {}

/** A file that is not the checkpoint or the state it is taken for. */
export class CheckpointError extends BDHError {}

/**
 * What a file says, fit to be shown: control characters spelt out, and the middle of what is long left out.
 * @param {unknown} text
 * @param {number} most characters
 * @returns {string}
 */
export function shown(text, most = 200) {
  let plain = String(text);
  if (plain.length > most) plain = `${plain.slice(0, Math.floor((most * 2) / 3))}...${plain.slice(-Math.floor(most / 3))}`;
  return plain.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);
}
