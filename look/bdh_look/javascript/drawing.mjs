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
  return element("li", { class: row }, label, element("span", { class: "track" }, inner), element("span", { class: "share" }, share));
}

/** Text around a byte, with the byte marked; padded on the left, so that one stands below the other. */
export function context(tokens, t, before = 12, after = 3, pad = before) {
  const visible = (bytes) => as_text(bytes).replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  const here = visible([tokens[t]]).replace(" ", "␣");
  return [visible(tokens.slice(Math.max(0, t - before), t)).padStart(pad), element("b", {}, here), visible(tokens.slice(t + 1, t + 1 + after))];
}

/** A colour of the page's style sheet as [red, green, blue]. */
export function colour(name) {
  const probe = element("i", { style: `color:var(${name})` });
  if (/^\s*\d+,/.test(getComputedStyle(document.documentElement).getPropertyValue(name))) probe.style.color = `rgb(var(${name}))`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return found;
}

const mixed = (from, to, share) => from.map((value, i) => value + (to[i] - value) * share);

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
  const [width, height] = [columns * dot, rows * dot];
  const [faint, line, plus, warm] = ["--faint", "--line", "--plus", "--warm"].map(colour);
  const image = new ImageData(width, height);
  const paint = (place, rgb) => {
    const [left, top] = [(place % columns) * dot, Math.floor(place / columns) * dot];
    const size = dot > 1 ? dot - 1 : 1;
    for (let y = top; y < top + size; y++) for (let x = left; x < left + size; x++) image.data.set([...rgb, 255], 4 * (y * width + x));
  };
  for (let place = 0; place < count; place++) paint(place, dot > 1 ? line : faint);
  const most = fired.value.reduce((one, other) => Math.max(one, other), 0);
  fired.index.forEach((place, i) => paint(place, mixed(line, plus, 0.35 + 0.65 * (fired.value[i] / most))));
  passed.index.forEach((place) => paint(place, warm));
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(image, 0, 0);
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
  const [faint, plus, minus, card] = ["--faint", "--plus", "--minus", "--card"].map(colour);
  // Of several entries on one pixel the largest is shown.
  const pixels = new Float32Array(width * band * heads.length);
  let most = 0;
  heads.forEach((h, k) => {
    for (let n = 0; n < N; n++) {
      const column = Math.floor((n * width) / N);
      for (let d = 0; d < D; d++) {
        const at = (k * band + Math.floor((d * band) / D)) * width + column;
        const value = memory[(h * N + n) * D + d];
        if (Math.abs(value) > Math.abs(pixels[at])) pixels[at] = value;
        if (Math.abs(value) > most) most = Math.abs(value);
      }
    }
  });
  const image = new ImageData(width, height);
  for (let y = 0; y < height; y++) {
    const [k, within] = [Math.floor(y / (band + gap)), y % (band + gap)];
    for (let x = 0; x < width; x++) {
      const value = within < band ? pixels[(k * band + within) * width + x] : 0;
      const rgb = within >= band ? card : mixed(faint, value > 0 ? plus : minus, most ? Math.min(1, (2 * Math.abs(value)) / most) ** 0.75 : 0);
      image.data.set([...rgb, 255], 4 * (y * width + x));
    }
  }
  Object.assign(canvas, { width, height });
  canvas.style.aspectRatio = `${width} / ${Math.max(height, 96)}`;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** A curve of bits per byte over readings, and beside it a point for the control. */
export function draw_lesson(bits, control) {
  const [width, height, left, bottom] = [560, 150, 34, 24];
  const most = Math.max(1, Math.ceil(Math.max(...bits, control ?? 0)));
  const x = (i) => left + ((width - left - 90) * i) / Math.max(1, bits.length - 1);
  const y = (value) => (height - bottom) * (1 - value / most) + 6;
  const svg = (tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    return made;
  };
  const told = bits.map((value) => value.toFixed(2)).join(", ");
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Bits per byte by reading: ${told}` });
  for (let value = 0; value <= most; value += Math.ceil(most / 4)) {
    drawn.append(svg("line", { x1: left, x2: width - 90, y1: y(value), y2: y(value), stroke: "var(--line)" }));
    drawn.append(svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value));
  }
  const points = bits.map((value, i) => `${x(i)},${y(value)}`).join(" ");
  drawn.append(svg("polyline", { points, fill: "none", stroke: "var(--accent)", "stroke-width": 2.5 }));
  bits.forEach((value, i) => {
    drawn.append(svg("circle", { cx: x(i), cy: y(value), r: 4, fill: "var(--accent)" }));
    if (bits.length <= 12 || i % 5 === 0) drawn.append(svg("text", { x: x(i), y: height - 4, "text-anchor": "middle" }, i + 1));
  });
  if (control !== undefined) {
    drawn.append(svg("circle", { cx: x(bits.length - 1), cy: y(control), r: 4, fill: "var(--card)", stroke: "var(--warm)", "stroke-width": 2.5 }));
    drawn.append(svg("text", { x: x(bits.length - 1) + 10, y: y(control) + 4 }, "shuffled"));
  }
  return drawn;
}
