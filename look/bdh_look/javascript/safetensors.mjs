/** The safetensors format: a length, a JSON header, then the numbers. Files are strangers': all is checked before it is used. */

import { CheckpointError, shown } from "./errors.mjs";
import { size_of } from "./params.mjs";

const HEADER_LIMIT = 100_000_000; // bytes, as in the format's own library

// By name in a file: bytes of one number, and how an array of them is made of bytes.
const DTYPES = {
  U64: { size: 8, decode: view(BigUint64Array) },
  I64: { size: 8, decode: view(BigInt64Array) },
  F64: { size: 8, decode: view(Float64Array) },
  F32: { size: 4, decode: view(Float32Array) },
  U32: { size: 4, decode: view(Uint32Array) },
  I32: { size: 4, decode: view(Int32Array) },
  BF16: { size: 2, decode: from_bfloat16 },
  F16: { size: 2, decode: from_float16 },
  U16: { size: 2, decode: view(Uint16Array) },
  I16: { size: 2, decode: view(Int16Array) },
  I8: { size: 1, decode: view(Int8Array) },
  U8: { size: 1, decode: view(Uint8Array) },
  BOOL: { size: 1, decode: view(Uint8Array) },
};
export const FLOATS = ["F64", "F32", "BF16", "F16"];
// What is written, in the order in which tensors lie in a file: those of wide types first, so that all are aligned.
const WRITTEN = [
  ["I64", BigInt64Array],
  ["F64", Float64Array],
  ["F32", Float32Array],
];

/**
 * All tensors of a file and its metadata.
 * @param {Uint8Array} bytes
 * @param {string} name of the file, for errors
 * @returns {{tensors: Record<string, {dtype: string, shape: number[], values: any}>, metadata: Record<string, string>}}
 *   bfloat16 and float16 as float32, which holds all their values
 */
export function read_safetensors(bytes, name) {
  demand_no_other_format(bytes, name);
  const damaged = (why) =>
    new CheckpointError(`${shown(name)} is no whole safetensors file (${why}): copy or convert it again`);
  if (bytes.length < 8) throw damaged(`${bytes.length} bytes are no header`);
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  if (length > HEADER_LIMIT || length > bytes.length - 8) throw damaged("it does not begin with its header");
  const { __metadata__: metadata = {}, ...entries } = parsed(bytes.subarray(8, 8 + length), damaged);
  if (!is_mapping(metadata) || Object.values(metadata).some((text) => typeof text !== "string"))
    throw damaged("its metadata is no text");
  const data = bytes.subarray(8 + length);
  check_places(entries, data.length, damaged);
  const tensors = Object.entries(entries).map(
    ([
      key,
      {
        dtype,
        shape,
        data_offsets: [start, end],
      },
    ]) => {
      const values = DTYPES[dtype].decode(data.subarray(start, end));
      return [key, { dtype, shape, values }];
    },
  );
  return { tensors: Object.fromEntries(tensors), metadata };
}

/** Refuse what begins like something else, by its name. */
function demand_no_other_format(bytes, name) {
  const begins = (text) => [...text].every((c, i) => bytes[i] === c.charCodeAt(0));
  const file = shown(name);
  if (bytes.length === 0) throw new CheckpointError(`${file} is empty: copy or download it again`);
  if (begins("version https://git-lfs"))
    throw new CheckpointError(`${file} is a git-LFS pointer and not the file itself: run git lfs pull`);
  if (begins("PK\x03\x04"))
    throw new CheckpointError(`${file} is a zip file, as .pt and .npz are: convert it with bdh-convert --to numpy`);
  if (bytes[0] === 0x80 && bytes[1] <= 5)
    throw new CheckpointError(`${file} is a pickle, which nobody should open: convert it with bdh-convert --to numpy`);
}

function parsed(bytes, damaged) {
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw damaged("its header is no JSON");
  }
  if (!is_mapping(header)) throw damaged("its header is no mapping");
  return header;
}

/** Refuse tensors of unknown type, of another size than their shape, that overlap, or that leave bytes unaccounted for. */
function check_places(entries, length, damaged) {
  const places = [];
  for (const [key, entry] of Object.entries(entries)) {
    const told = shown(key, 80);
    if (!is_mapping(entry)) throw damaged(`${told} is no tensor`);
    const { dtype, shape, data_offsets } = entry;
    if (!Object.hasOwn(DTYPES, dtype)) throw damaged(`${told} has dtype ${shown(JSON.stringify(dtype), 40)}`);
    if (!are_lengths(shape)) throw damaged(`${told} has shape ${shown(JSON.stringify(shape), 80)}`);
    if (!are_lengths(data_offsets) || data_offsets.length !== 2) throw damaged(`${told} lies nowhere`);
    const [start, end] = data_offsets;
    if (end - start !== size_of(shape) * DTYPES[dtype].size)
      throw damaged(`${told} has ${end - start} bytes for shape [${shape}]`);
    places.push([start, end, told]);
  }
  let free = 0;
  for (const [start, end, told] of places.sort(([a, b], [c, d]) => a - c || b - d)) {
    if (start !== free) throw damaged(`${told} begins at ${start}, where ${free} is next`);
    free = end;
  }
  if (free !== length) throw damaged(`${length} bytes of data where its tensors have ${free}`);
}

const is_mapping = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const are_lengths = (value) => Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0);

/** Numbers as they lie in the file, without a copy where they are aligned. */
function view(Kind) {
  return (bytes) => {
    const aligned = bytes.byteOffset % Kind.BYTES_PER_ELEMENT === 0 ? bytes : bytes.slice();
    return new Kind(aligned.buffer, aligned.byteOffset, aligned.length / Kind.BYTES_PER_ELEMENT);
  };
}

/** bfloat16 is the upper half of a float32. */
function from_bfloat16(bytes) {
  const bits = Uint32Array.from(view(Uint16Array)(bytes), (half) => half << 16);
  return new Float32Array(bits.buffer);
}

function from_float16(bytes) {
  return Float32Array.from(view(Uint16Array)(bytes), (half) => {
    const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
  });
}

/**
 * A whole file of tensors, each a typed array of int64, float64 or float32.
 * @param {Record<string, {shape: number[], values: BigInt64Array | Float64Array | Float32Array}>} tensors
 * @param {Record<string, string>} metadata
 * @returns {Uint8Array}
 */
export function write_safetensors(tensors, metadata) {
  const rank = ({ values }) => WRITTEN.findIndex(([, Kind]) => values instanceof Kind);
  const by_place = ([one, a], [other, b]) => rank(a) - rank(b) || (one < other ? -1 : 1);
  const ordered = Object.entries(tensors).sort(by_place);
  const header = { __metadata__: Object.fromEntries(Object.entries(metadata).sort()) };
  let end = 0;
  for (const [name, tensor] of ordered) {
    const [start, [dtype]] = [end, WRITTEN[rank(tensor)]];
    end += tensor.values.byteLength;
    header[name] = { dtype, shape: tensor.shape, data_offsets: [start, end] };
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (new TextEncoder().encode(text).length % 8)) % 8);
  const head = new TextEncoder().encode(text);
  const bytes = new Uint8Array(8 + head.length + end);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(head.length), true);
  bytes.set(head, 8);
  for (const [name, { values }] of ordered) {
    bytes.set(
      new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
      8 + head.length + header[name].data_offsets[0],
    );
  }
  return bytes;
}
