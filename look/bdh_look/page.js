"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const decode = ({ type, shape, base64 }) => {
    const raw = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    return { shape, values: new globalThis[type + "Array"](raw.buffer) };
  };
  const arrays = Object.fromEntries(Object.entries(data.arrays).map(([name, held]) => [name, decode(held)]));
  const row = (name, ...index) => {  // the part of an array at its first few indices
    const { shape, values } = arrays[name];
    const size = shape.slice(index.length).reduce((a, b) => a * b, 1);
    const start = index.reduce((at, i, axis) => at * shape[axis] + i, 0) * size;
    return values.subarray(start, start + size);
  };
  const { n_layer: L, n_head: H, n_neurons: N } = data.config;
  const T = data.glyphs.length, FULL = 32767, TOP = data.top;
  const tokens = arrays.tokens.values, loss = arrays.loss.values;
  const known = new Map(Array.from(arrays.met.values, (id, at) => [id, at]));

  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "css") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  const drawn = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const byte = (id) => {
    const named = { 9: "tab", 10: "newline", 13: "return", 32: "space" }[id];
    return named || (id > 32 && id < 127 ? String.fromCharCode(id) : "\\x" + id.toString(16).padStart(2, "0"));
  };
  const percent = (share) => {
    const size = Math.abs(share) * 100;
    return (share < 0 ? "−" : "") + (size >= 9.95 ? size.toFixed(0) : size >= 0.1 || size === 0 ? size.toFixed(1) : "<0.1") + " %";
  };
  const number = (value) => Math.abs(value) >= 100 ? String(Math.round(value)) : value.toPrecision(2);
  const neuronName = (id) => `h${Math.floor(id / N)} #${id % N}`;
  const context = (t, before = 12, after = 6) => {
    const part = (from, to) => data.glyphs.slice(Math.max(0, from), Math.min(T, to)).join("");
    return make("span", { class: "context" }, part(t - before, t), make("mark", {}, data.glyphs[t] === " " ? "␣" : data.glyphs[t]), part(t + 1, t + 1 + after));
  };
  const jump = (t) => make("button", { class: "link", type: "button", onclick: () => pick(t), title: `byte ${t}` }, context(t, 4, 1));
  const table = (titles, rows) => make("table", { class: "plain" },
    make("thead", {}, make("tr", {}, ...titles.map((title) => make("th", { scope: "col" }, title)))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell))))));
  const neuronButton = (id, kind = "link") => known.has(id)
    ? make("button", { class: kind + (id === neuron ? " is" : ""), type: "button", "data-neuron": id, onclick: () => showNeuron(id, true) }, neuronName(id))
    : make("span", {}, neuronName(id));

  let here = 0, layer = null, head = null, neuron = null;  // no layer and head: all of them
  let shade = arrays.causes ? "causes" : "reads";

  // The text.
  const spans = data.glyphs.map((glyph, t) => {
    const odd = glyph === "⏎" || glyph === "→" || glyph === "␍" || glyph === "·" || glyph.startsWith("\\x");
    const span = make("span", { id: `b${t}`, role: "option", "aria-selected": "false", "aria-label": `${byte(tokens[t])}, byte ${t}`,
      css: { "--l": `${Math.min(100, loss[t] / 5 * 100)}%` } }, glyph);
    if (odd) span.className = "odd";
    return span;
  });
  const text = $("text");
  spans.forEach((span, t) => text.append(span, ...(tokens[t] === 10 ? ["\n"] : [])));
  text.addEventListener("click", (event) => {
    const span = event.target.closest("span");
    if (span) pick(Number(span.id.slice(1)));
  });
  const lineStep = (way) => {  // the byte above or below, as the text is laid out
    const { offsetTop: top, offsetLeft: left } = spans[here];
    let best = here, wanted = null;
    for (let t = here + way; t >= 0 && t < T; t += way) {
      if (spans[t].offsetTop === top) continue;
      if (wanted === null) wanted = spans[t].offsetTop;
      if (spans[t].offsetTop !== wanted) break;
      if (best === here || Math.abs(spans[t].offsetLeft - left) < Math.abs(spans[best].offsetLeft - left)) best = t;
    }
    return best;
  };
  text.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: T - 1 }[event.key];
    if (to === undefined && event.key !== "ArrowUp" && event.key !== "ArrowDown") return;
    event.preventDefault();
    pick(Math.max(0, Math.min(T - 1, to ?? lineStep(event.key === "ArrowUp" ? -1 : 1))));
  });
  $("time").addEventListener("input", (event) => pick(Number(event.target.value)));

  // What was read: shares by earlier byte, of all layers and heads, or of some.
  const readBy = (t) => {
    const shares = new Map();
    if (layer === null) {
      const start = t * (t - 1) / 2, most = arrays.everywhereMost.values[t];
      for (let s = 0; s < t; s++) shares.set(s, arrays.everywhere.values[start + s] / 255 * most);
      return shares;
    }
    const some = head === null ? Array.from({ length: H }, (_, h) => h) : [head];
    for (const h of some) {
      const at = row("reads", layer, h, t), share = row("readShares", layer, h, t);
      at.forEach((s, k) => {
        if (s < t && share[k]) shares.set(s, (shares.get(s) || 0) + (head === null ? Math.abs(share[k]) / H : share[k]) / FULL);
      });
    }
    return shares;
  };
  const sorted = (shares) => [...shares].filter(([, share]) => share !== 0).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));

  // What mattered: how much log-probability each earlier byte gave to what is expected, tried without it.
  const causesOf = (t) => {
    if (!arrays.causes || t === 0) return [];
    const earlier = row("causes", t), gave = row("gave", t), left = row("left", t);
    return Array.from(earlier).slice(0, t).map((s, k) => [s, gave[k], left[k]]);
  };

  const showText = (found, scale) => {
    for (const span of spans) { span.style.removeProperty("--r"); span.style.removeProperty("--t"); }
    for (const [s, size] of found) {
      spans[s].style.setProperty("--r", `${Math.sqrt(Math.min(1, Math.abs(size) / scale)) * 85}%`);
      if (size < 0) spans[s].style.setProperty("--t", "var(--against)");
    }
  };
  const showExpected = (causes) => {
    const ids = row("expected", here), chances = row("chances", here), real = here + 1 < T ? tokens[here + 1] : null;
    const sentence = ["After ", make("b", {}, data.glyphs.slice(Math.max(0, here - 15), here + 1).join("")), " the model expects ",
      make("b", {}, byte(ids[0])), ` (${percent(chances[0])}).`];
    if (real !== null) {
      sentence.push(" What comes is ", make("b", {}, byte(real)), real === ids[0] ? ", as expected." : `, a surprise of ${(loss[here + 1] / Math.LN2).toFixed(1)} bits.`);
    }
    $("sentence").replaceChildren(...sentence);
    $("expected").replaceChildren(...Array.from(ids, (id, k) => make("div", { class: "row" + (id === real ? " was" : "") },
      make("span", { class: "byte" }, byte(id)), make("span", { class: "number" }, percent(chances[k])),
      make("div", { class: "meter", css: { width: `${chances[k] * 100}%` } }))));
    if (!arrays.causes) { $("causes-section").hidden = true; $("shade").hidden = true; return; }
    const top = causes.slice(0, 6), most = top.length ? Math.max(0.1, Math.abs(top[0][1])) : 1, [s, gave, left] = top[0] ?? [];
    const note = ["Nothing stands before this byte: the prediction comes from the byte itself."];
    if (top.length) note.splice(0, 1, `Beside the picked byte itself. Without `, make("b", { class: "byte" }, byte(tokens[s])), ` at byte ${s}, `,
      make("b", { class: "byte" }, byte(ids[0])), Math.abs(gave) < 0.02 ? ` would be as likely: no single earlier byte decides here.` : ` would have ${percent(left)} and not ${percent(chances[0])}.`);
    $("causes-note").replaceChildren(...note);
    $("causes-head").hidden = !top.length;
    $("causes-head").replaceChildren(make("span", {}, "earlier byte"), make("span", { class: "number" }, "chance of ", make("b", { class: "byte" }, byte(ids[0])), " without it"));
    $("causes").replaceChildren(...top.map(([s, gave, left]) => make("li", {}, make("button", { class: "row cause", type: "button", onclick: () => pick(s), title: `pick byte ${s}` },
      context(s, 10, 4), make("span", { class: "number", "aria-label": `without it ${percent(left)}` }, percent(left)),
      make("div", { class: "meter" + (gave < 0 ? " against" : ""), css: { width: `${Math.abs(gave) / most * 100}%` } })))));
  };
  const showHeads = () => {
    const button = (l, h, label, name, strength) => make("button", { class: "pick", type: "button", "aria-label": name,
      "aria-pressed": String(layer === l && head === h), css: { "--c": `${strength}%` }, onclick: () => choose(l, h) }, label);
    const sharpest = (l, h) => Math.abs(row("readShares", l, h, here)[0]);
    const most = Math.max(1, ...Array.from({ length: L * H }, (_, k) => sharpest(Math.floor(k / H), k % H)));
    const rows = Array.from({ length: L }, (_, l) => make("tr", {}, make("th", { scope: "row" }, `layer ${l}`),
      make("td", {}, button(l, null, "all", `layer ${l}, all heads`, 0)),
      ...Array.from({ length: H }, (_, h) => make("td", {}, button(l, h, `h${h}`, `layer ${l}, head ${h}`, (sharpest(l, h) / most) ** 1.5 * 75)))));
    const focused = document.activeElement?.getAttribute?.("aria-label");
    $("heads").replaceChildren(button(null, null, "everything", "all layers and heads", 0), make("table", {}, make("tbody", {}, ...rows)));
    if (focused) $("heads").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  };
  const choose = (l, h) => { layer = l; head = h; shade = "reads"; show(); };
  for (const button of document.querySelectorAll("[data-shade]")) button.addEventListener("click", () => { shade = button.dataset.shade; show(); });
  const showReads = (found) => {
    const top = found.slice(0, 10), most = top.length ? Math.abs(top[0][1]) : 1;
    const covered = top.reduce((sum, [, share]) => sum + Math.abs(share), 0);
    const where = layer === null ? "all layers and heads" : head === null ? `layer ${layer}` : `layer ${layer}, head ${head}`;
    $("read-note").textContent = here === 0 ? "The first byte reads nothing: its row is exactly zero."
      : top.length ? `Shares of what was read, ${where}. These ${top.length} are ${percent(covered)} of it.` + (top.some(([, s]) => s < 0) ? " A minus takes away." : "")
      : "Nothing was read here.";
    $("reads").replaceChildren(...top.map(([s, share]) => make("li", {}, make("button", { class: "row reading", type: "button", onclick: () => pick(s), title: `pick byte ${s}` },
      make("span", { class: "number" }, percent(share)), context(s),
      make("div", { class: "meter" + (share < 0 ? " against" : ""), css: { width: `${Math.abs(share) / most * 100}%` } })))));
  };
  const showSynapses = () => {
    const found = [];
    for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) {
      if ((layer !== null && l !== layer) || (head !== null && h !== head)) continue;
      const entries = row("synapses", l, h, here), shares = row("synapseShares", l, h, here), values = row("synapseValues", l, h, here);
      shares.forEach((share, k) => { if (share) found.push([share / FULL, l, h, entries[3 * k], entries[3 * k + 1], entries[3 * k + 2], values[k]]); });
    }
    found.sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
    $("synapses").replaceChildren(found.length ? table(["share", "layer", "synapse", "value", "written by"],
      found.slice(0, 8).map(([share, l, h, n, d, s, value]) => [percent(share), String(l), make("span", {}, neuronButton(h * N + n), `→${d}`), number(value), jump(s)]))
      : make("p", { class: "soft" }, "No synapse was read here."));
  };
  const showLayers = () => $("layers").replaceChildren(...Array.from({ length: L }, (_, l) => {
    const ids = row("neurons", l, here), sizes = row("strengths", l, here), [x, y, xy] = row("active", l, here);
    const strip = drawn("svg", { class: "strip", viewBox: `0 0 ${H * N} 26`, preserveAspectRatio: "none", "aria-hidden": "true" });
    for (let h = 1; h < H; h++) strip.append(drawn("line", { class: "cut", x1: h * N, x2: h * N, y1: 0, y2: 26, style: "stroke:var(--line);stroke-width:1" }));
    ids.forEach((id, k) => { if (sizes[k]) strip.append(drawn("line", { x1: id + 0.5, x2: id + 0.5, y1: 26, y2: 26 - Math.max(2, Math.sqrt(sizes[k] / 255) * 26) })); });
    const rate = (count) => percent(count / (H * N));
    return make("div", { class: "layer" }, make("p", {}, make("b", {}, `Layer ${l}`), ` excited ${rate(x)}, gate open ${rate(y)}, both ${rate(xy)}`), strip,
      make("div", {}, ...Array.from(ids).filter((_, k) => sizes[k]).slice(0, 7).map((id) => neuronButton(id, "chip"))));
  }));
  const showNeuron = (id, scroll) => {
    neuron = id;
    const at = known.get(id), bytes = (name) => make("span", { class: "bytes" }, ...Array.from(row(name, at)).map((b) => make("span", {}, byte(b))));
    const places = row("contexts", at), layers = row("contextLayers", at), sizes = row("contextSizes", at);
    const seen = Array.from(places).map((t, k) => [t, layers[k], sizes[k]]).filter(([, , size]) => size);
    const others = (ids, by) => {
      const held = Array.from(row(ids, at)).map((other, k) => [other, row(by, at)[k]]).filter(([, weight]) => weight > 0);
      return make("span", { class: "bytes" }, ...held.map(([other]) => neuronButton(other, "chip")));
    };
    $("h-neuron").textContent = `Neuron ${id % N} of head ${Math.floor(id / N)}`;
    $("about-neuron").replaceChildren(make("dl", {},
      make("dt", {}, "most excited at"), make("dd", {}, ...(seen.length ? seen.map(([t, l, size]) => make("button", { class: "row exciting", type: "button", onclick: () => pick(t), title: `pick byte ${t}` },
        make("span", { class: "number", "aria-label": `layer ${l}` }, `L${l}`), context(t, 9, 3), make("div", { class: "meter", css: { width: `${size / 255 * 100}%` } }))) : ["nothing in this text"])),
      make("dt", {}, "speaks for"), make("dd", {}, bytes("speaksFor")),
      make("dt", {}, "against"), make("dd", {}, bytes("speaksAgainst")),
      make("dt", {}, "excites neurons"), make("dd", {}, others("excites", "excitesBy")),
      make("dt", {}, "excited by"), make("dd", {}, others("excitedBy", "excitedHow"))),
      make("p", { class: "soft" }, "All layers share a neuron. What it speaks for is its row of the decoder, seen by the readout; partners are the largest entries of encoder after decoder."));
    for (const button of document.querySelectorAll("[data-neuron]")) button.classList.toggle("is", Number(button.dataset.neuron) === id);
    if (scroll) { $("h-neuron").focus({ preventScroll: true }); $("neuron").scrollIntoView({ block: "nearest", behavior: "smooth" }); }
  };

  // The state over the text.
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const channels = (name) => { const c = colour(name); return [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)); };
  const most = Math.max(...arrays.norms.values);
  const painted = [];
  $("state").append(...Array.from({ length: L }, (_, l) => {
    const norms = row("norms", l), points = Array.from(norms, (v, t) => `${t + 0.5},${(30 - v / most * 29).toFixed(2)}`).join(" ");
    const curve = drawn("svg", { viewBox: `0 0 ${T} 30`, preserveAspectRatio: "none", "aria-hidden": "true" });
    curve.append(drawn("polyline", { class: "curve", points }));
    const canvas = make("canvas", { class: "course", width: T, height: TOP.followed, role: "img", "aria-label": `Course of the ${TOP.followed} largest synapses of layer ${l}` });
    const paint = () => {
      const image = new ImageData(T, TOP.followed), up = channels("--read"), down = channels("--against");
      for (let k = 0; k < TOP.followed; k++) row("course", l, k).forEach((value, t) => {
        image.data.set([...(value < 0 ? down : up), Math.abs(value) * 2], 4 * (k * T + t));
      });
      canvas.getContext("2d").putImageData(image, 0, 0);
    };
    painted.push(paint);
    canvas.addEventListener("click", (event) => pick(Math.min(T - 1, Math.floor(event.offsetX / canvas.clientWidth * T))));
    return make("div", { class: "one" }, make("p", {}, `Layer ${l}: `, make("span", { id: `norm${l}` })), curve, canvas, make("div", { class: "cursor" }));
  }));
  const repaint = () => painted.forEach((paint) => paint());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  repaint();
  const showState = () => {
    for (let l = 0; l < L; l++) {
      const norms = row("norms", l), grown = norms[here] - (here ? norms[here - 1] : 0);
      $(`norm${l}`).textContent = `size ${norms[here].toFixed(1)}, ${grown < 0 ? "−" : "+"}${Math.abs(grown).toFixed(2)} at this byte`;
    }
    for (const cursor of document.querySelectorAll(".cursor")) cursor.style.left = `${(here + 0.5) / T * 100}%`;
    const rows = [];
    for (let l = 0; l < L; l++) {
      const entries = row("grew", l, here), by = row("grewBy", l, here);
      for (let k = 0; k < 2; k++) if (by[k]) rows.push([String(l), neuronButton(entries[2 * k]), String(entries[2 * k + 1]), (by[k] < 0 ? "−" : "+") + Math.abs(by[k]).toFixed(2)]);
    }
    $("grew").replaceChildren(table(["layer", "neuron", "feature", "by"], rows));
  };

  const show = () => {
    const found = sorted(readBy(here)), causes = causesOf(here);
    if (shade === "causes") showText(causes, Math.max(0.5, causes.length ? Math.abs(causes[0][1]) : 0));
    else showText(found, found.length ? Math.abs(found[0][1]) : 1);
    for (const button of document.querySelectorAll("[data-shade]")) button.setAttribute("aria-pressed", String(button.dataset.shade === shade));
    showExpected(causes); showHeads(); showReads(found); showSynapses(); showLayers(); showState();
  };
  const pick = (t) => {
    spans[here].classList.remove("here"); spans[here].setAttribute("aria-selected", "false");
    document.querySelector("#text .next")?.classList.remove("next");
    here = t;
    spans[t].classList.add("here"); spans[t].setAttribute("aria-selected", "true");
    spans[t + 1]?.classList.add("next");
    text.setAttribute("aria-activedescendant", `b${t}`);
    $("time").value = t; $("at").textContent = `${t} of ${T - 1}`;
    const { offsetTop, offsetHeight } = spans[t];
    if (offsetTop < text.scrollTop || offsetTop + offsetHeight > text.scrollTop + text.clientHeight) text.scrollTop = offsetTop - text.clientHeight / 2;
    show();
  };

  // Begin where something can be seen: at the byte of the second half whose prediction came most from an earlier one.
  let begin = T - 2, best = -1;
  for (let t = Math.floor(T / 2); t < T - 1; t++) {
    const worth = arrays.causes ? row("gave", t)[0] : arrays.everywhereMost.values[t] * row("chances", t)[0];
    if (tokens[t] > 32 && worth > best) { best = worth; begin = t; }
  }
  pick(Math.max(0, begin));
  showNeuron(row("neurons", L - 1, here)[0], false);
  document.documentElement.dataset.ready = "yes";
})();
