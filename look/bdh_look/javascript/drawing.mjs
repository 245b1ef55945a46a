/** What the page draws: small functions from numbers to elements, which know nothing of the model. */

import { as_text } from "./characters.mjs";

/**
 * An element with attributes and children.
 * @param {string} tag
 * @param {Record<string, unknown>} attributes class, title, ...; those that begin with "on" listen
 * @param {...(Node | string)} children
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** A number as people read it. */
export function counted(value, digits = 0) {
  return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
}

/** A share in percent, with as many digits as tell something. */
export function percent(share) {
  const value = 100 * share;
  return `${counted(value, value < 9.95 ? 1 : 0)}%`;
}

/** A bar: what it stands for, its length from 0 to 1, and what is written behind it. */
export function bar(label, length, share, { row = "", fill = "" } = {}) {
  const inner = element("i", { class: fill, style: `width:${(100 * Math.max(0, Math.min(1, length))).toFixed(1)}%` });
  return element(
    "li",
    { class: row },
    label,
    element("span", { class: "track" }, inner),
    element("span", { class: "share" }, share),
  );
}

/** Text around a byte, with the byte marked; padded on the left, so that one stands below the other. */
export function context(tokens, t, before = 12, after = 3, pad = before) {
  const visible = (bytes) => as_text(bytes).replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  const here = visible([tokens[t]]).replace(" ", "␣");
  let start = Math.max(0, t - before);
  while (start < t && (tokens[start] & 0xc0) === 0x80) start += 1; // not in the middle of a character
  return [visible(tokens.slice(start, t)).padStart(pad), element("b", {}, here), visible(tokens.slice(t + 1, t + 1 + after))];
}

const colours = new Map(); // by name, in the scheme of the moment

/** Forget the colours: the scheme has changed. */
export function forget_colours() {
  colours.clear();
}

/** A colour of the page's style sheet as [red, green, blue]. */
function colour(name) {
  if (!colours.has(name)) {
    const value = getComputedStyle(document.documentElement).getPropertyValue(name);
    const probe = element("i", { style: `color:${/^\s*\d+,/.test(value) ? `rgb(${value})` : value}` });
    document.body.append(probe);
    colours.set(
      name,
      getComputedStyle(probe)
        .color.match(/[\d.]+/g)
        .slice(0, 3)
        .map(Number),
    );
    probe.remove();
  }
  return colours.get(name);
}

/** A pixel from one colour towards another. */
function mixed(from, to, share) {
  const [red, green, blue] = [0, 1, 2].map((i) => from[i] + (to[i] - from[i]) * share);
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0; // as little-endian memory holds it
}

/** 64 pixels from one colour to another. */
function ramp(from, to) {
  return Uint32Array.from({ length: 64 }, (_, i) => mixed(from, to, i / 63));
}

/** Put pixels (height, width) on a canvas of that size. */
function put(canvas, pixels, width, height) {
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), width, height), 0, 0);
}

/**
 * Neurons as dots: silent, firing, or through the gate.
 * @param {HTMLCanvasElement} canvas
 * @param {number} count nh*N
 * @param {{index: Uint32Array, value: Float32Array}} fired
 * @param {{index: Uint32Array}} passed
 */
export function draw_neurons(canvas, count, fired, passed) {
  const columns = columns_for(count);
  const rows = Math.ceil(count / columns);
  const dot = count > 8192 ? 1 : 4; // pixels from one neuron to the next
  const width = columns * dot;
  const pixels = new Uint32Array(width * rows * dot);
  const paint = (place, pixel) => {
    const corner = Math.floor(place / columns) * dot * width + (place % columns) * dot;
    if (dot === 1) pixels[corner] = pixel;
    else for (let y = 0; y < dot - 1; y++) pixels.fill(pixel, corner + y * width, corner + y * width + dot - 1);
  };
  const firing = ramp(colour("--line"), colour("--plus"));
  const [warm] = ramp(colour("--warm"), colour("--warm"));
  for (let place = 0; place < count; place++) paint(place, firing[0]);
  const most = fired.value.reduce((one, other) => Math.max(one, other), 0);
  fired.index.forEach((place, i) => paint(place, firing[22 + Math.floor((41 * fired.value[i]) / most)]));
  passed.index.forEach((place) => paint(place, warm));
  put(canvas, pixels, width, rows * dot);
}

/** How many neurons stand side by side. */
export function columns_for(count) {
  return 2 ** Math.ceil(Math.log2(Math.sqrt(2 * count)));
}

/**
 * One layer of a state: neurons across, features down, a band for each head; what is larger is stronger in colour.
 * @param {HTMLCanvasElement} canvas
 * @param {Float32Array} memory (nh, N, D)
 * @param {number[]} heads those to show
 */
export function draw_memory(canvas, memory, heads, N, D) {
  const [width, band, gap] = [Math.min(N, 512), Math.min(D, 64), 3];
  const height = heads.length * (band + gap) - gap;
  // Of several entries on one pixel the largest is shown.
  const largest = new Float32Array(width * band * heads.length);
  let most = 0;
  heads.forEach((h, k) => {
    for (let n = 0; n < N; n++) {
      const column = Math.floor((n * width) / N);
      for (let d = 0; d < D; d++) {
        const at = (k * band + Math.floor((d * band) / D)) * width + column;
        const value = memory[(h * N + n) * D + d];
        if (Math.abs(value) > Math.abs(largest[at])) largest[at] = value;
        if (Math.abs(value) > most) most = Math.abs(value);
      }
    }
  });
  const [plus, minus] = ["--plus", "--minus"].map((name) => ramp(colour("--faint"), colour(name)));
  const [between] = ramp(colour("--card"), colour("--card"));
  const pixels = new Uint32Array(width * height).fill(between);
  for (let y = 0; y < height; y++) {
    const [k, within] = [Math.floor(y / (band + gap)), y % (band + gap)];
    for (let x = 0; x < width && within < band; x++) {
      const value = largest[(k * band + within) * width + x];
      const strength = most ? Math.min(1, (2 * Math.abs(value)) / most) ** 0.75 : 0;
      pixels[y * width + x] = (value > 0 ? plus : minus)[Math.floor(63 * strength)];
    }
  }
  canvas.style.aspectRatio = `${width} / ${Math.max(height, 96)}`;
  put(canvas, pixels, width, height);
}
