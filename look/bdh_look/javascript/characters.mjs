/**
 * Bytes as characters and back, without loss: a byte that is no UTF-8, or that a text field would change, stands as a character of
 * the private use area.
 */

const PRIVATE = 0xf700; // + the byte

/**
 * @param {ArrayLike<number>} bytes
 * @returns {string}
 */
export function as_text(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length;) {
    const length = sequence_length(bytes, i);
    text += length ? String.fromCodePoint(code_point(bytes, i, length)) : String.fromCharCode(PRIVATE + bytes[i]);
    i += length || 1;
  }
  return text;
}

/**
 * @param {string} text
 * @returns {Uint8Array}
 */
export function as_bytes(text) {
  const encoder = new TextEncoder();
  return Uint8Array.from([...text].flatMap((c) => (is_private(c) ? [c.charCodeAt(0) - PRIVATE] : [...encoder.encode(c)])));
}

/** How many bytes a character of such a text stands for. */
export function byte_length(character) {
  const point = character.codePointAt(0);
  if (is_private(character)) return 1;
  return point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
}

/**
 * One byte as a reader would name it.
 * @param {number} byte
 */
export function named(byte) {
  const names = { 10: "⏎", 9: "⇥", 32: "␣" };
  if (byte in names) return names[byte];
  return byte > 32 && byte < 127 ? String.fromCharCode(byte) : byte.toString(16).toUpperCase().padStart(2, "0");
}

const is_private = (c) => c >= "\uf700" && c <= "\uf7ff";

/** How many bytes from i on are one character that a text field keeps, or 0. */
function sequence_length(bytes, i) {
  const first = bytes[i];
  if (first < 0x80) return first >= 32 && first !== 127 ? 1 : first === 10 || first === 9 ? 1 : 0;
  const length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : first >= 0xc2 ? 2 : 0;
  if (!length || first > 0xf4 || i + length > bytes.length) return 0;
  for (let j = 1; j < length; j++) if ((bytes[i + j] & 0xc0) !== 0x80) return 0;
  const point = code_point(bytes, i, length);
  const shortest = [0, 0, 0x80, 0x800, 0x10000][length];
  if (point < shortest || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return 0;
  return point >= PRIVATE && point <= PRIVATE + 0xff ? 0 : length;
}

function code_point(bytes, i, length) {
  let point = length === 1 ? bytes[i] : bytes[i] & (0xff >> (length + 1));
  for (let j = 1; j < length; j++) point = (point << 6) | (bytes[i + j] & 0x3f);
  return point;
}
