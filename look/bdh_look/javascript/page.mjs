/** The page: what happens when somebody types, drops a file, moves the cursor or presses a button. */

import { causes } from "./causes.mjs";
import { as_bytes, as_text, byte_length, named } from "./characters.mjs";
import { is_state, read, read_state, save_state } from "./checkpoint.mjs";
import { Model, check_token } from "./decode.mjs";
import { bar, columns_for, context, counted, draw_memory, draw_neurons, element, forget_colours, percent } from "./drawing.mjs";
import { BDHError, CheckpointError, SamplingError, shown } from "./errors.mjs";
import { GraphCard, decoded } from "./graph_card.mjs";
import { log_softmax } from "./model.mjs";
import { count, fingerprint } from "./params.mjs";
import { partners, speaks_for } from "./partners.mjs";
import { draw_lesson } from "./plots.mjs";
import { Reading, lesson, shuffled, strongest, value_at } from "./reading.mjs";
import { Sampling, check_length, sample, uniform } from "./sampling.mjs";
import { in_slices } from "./slices.mjs";
import { stream } from "./text.mjs";

const OPENING = "The quick brown fox jumps over the lazy dog. The quick brown f";
const SLICE = 24; // milliseconds of work before the page may breathe
const REDRAW = 120; // milliseconds between two pictures while it works
const NEAR = 64; // tokens that are read again at once, to show a state or to go back
const CANDIDATES = 8; // bytes shown under "What comes next?"
const TRIED = 12; // earlier bytes that are left out, one at a time
const ROOM_TO_TRY = 2 ** 26; // bytes of a state: of a larger one the page holds no two copies at each key
const CAUSES = 5; // shown under "What this came from"
const LOOKED_BACK = 8; // and under "What it looked back at"
const CHIPS = 5; // neurons shown side by side
const STRIP = 600; // bytes of text shown under "What it looked back at"

const LARGEST_STATE = 2 ** 31; // bytes
const MOST_LAYERS = 100;

const $ = (id) => document.getElementById(id);

const app = {
  name: "", // of the checkpoint
  model: null,
  fingerprint: null, // worked out when a state is saved or loaded
  reading: null,
  target: [], // the bytes in the text field, which the reading follows
  chosen: -1, // the byte to look inside at
  layer: 0,
  head: null, // null: all of them
  neuron: null, // the one that was picked; null: the strongest
  synapses: "strongest", // or "read", at this byte
  graph: null, // the GraphCard
  job: 0, // the number of the work under way: whoever finds another one there has been replaced
  working: false,
};

// ---- Work, a little at a time ----

/** Run a generator to its end in slices, unless other work takes its place; whether it came to its end. */
async function work(steps, told) {
  const mine = ++app.job;
  let [done, read, busy, drawn, took] = [false, 0, 0, performance.now(), 0];
  set_working(true);
  try {
    while (!done) {
      const start = performance.now();
      while (!done && performance.now() - start < SLICE) {
        done = steps.next().done;
        read += 1;
      }
      busy += performance.now() - start;
      if (performance.now() - drawn > Math.max(REDRAW, 4 * took)) {
        const begun = performance.now();
        draw(true);
        say(told((1000 * read) / busy));
        drawn = performance.now();
        took = drawn - begun;
      }
      await new Promise((resume) => setTimeout(resume));
      if (mine !== app.job) return false;
    }
  } catch (error) {
    if (mine === app.job) stop();
    return complain(error);
  }
  if (mine !== app.job) return false;
  set_working(false);
  draw();
  say(read > 16 ? `${told((1000 * read) / busy)}` : "");
  return done;
}

function stop() {
  app.job += 1;
  set_working(false);
  draw();
}

function set_working(working) {
  app.working = working;
  $("stop").disabled = !working;
}

const speed = (what) => (rate) => `${what}: ${counted(rate)} bytes a second`;

/** Read what is in the text field: go back to where it differs from what was read, and on from there. */
function follow() {
  const { reading, target } = app;
  let same = 0;
  while (same < target.length && target[same] === reading.tokens[same]) same += 1;
  if (same < reading.tokens.length) {
    const distance = reading.distance_to(same);
    reading.rewind(distance > NEAR ? same - distance : same);
  }
  if (reading.tokens.length < target.length) return work(reading_on(), speed("read"));
  stop();
}

function* reading_on() {
  while (app.reading.tokens.length < app.target.length) {
    app.reading.read(app.target[app.reading.tokens.length]);
    yield;
  }
}

/** Write on: each byte drawn from what the model expects, shown, and read (R14). */
function* writing_on(length, how) {
  yield* reading_on();
  for (let i = 0; i < length; i++) {
    const { reading } = app;
    const byte = sample(reading.logits.at(-1), uniform(how.seed, reading.position), how);
    app.target.push(byte);
    reading.read(byte);
    app.chosen = app.target.length - 1;
    yield;
  }
}

// ---- Files ----

/** Open what was dropped or chosen: a saved state, a checkpoint, or several checkpoints of one training run. */
async function open_files(files) {
  try {
    const opened = [];
    for (const file of files) opened.push({ bytes: await bytes_of(file), name: file.name });
    if (opened.length === 1 && is_state(opened[0].bytes)) load_state(opened[0].bytes, opened[0].name);
    else open_run(opened.map(({ bytes, name }) => checkpoint(bytes, name)));
  } catch (error) {
    complain(error);
  }
}

async function bytes_of(file) {
  try {
    return new Uint8Array(await file.arrayBuffer());
  } catch (error) {
    throw new CheckpointError(`${shown(file.name)} could not be read (${error.message}): check it and its disk`);
  }
}

/** A checkpoint that this page can run, refused otherwise. */
function checkpoint(bytes, name) {
  const { params, config, dtype, step } = read(bytes, name);
  if (config.vocab_size > 256) {
    throw new CheckpointError(
      `${shown(name)} has ${config.vocab_size} tokens, and bytes are 256: use its own tokenizer with bdh_spec.load`,
    );
  }
  const state = 4 * config.n_layer * config.n_head * config.n_neurons * config.n_embd;
  if (state > LARGEST_STATE || config.n_layer > MOST_LAYERS) {
    const needs = `${counted(config.n_layer)} layers and a state of ${counted(state)} bytes`;
    throw new CheckpointError(`${shown(name)} has ${needs}, which is more than a page can hold: run it with bdh-generate`);
  }
  return { name, params, config, dtype, step, graphs: {} };
}

/** The step that the name of a checkpoint tells: the last number in it. */
function step_in(name) {
  const numbers = name.replace(/\.safetensors$/, "").match(/\d+/g);
  return numbers ? Number(numbers.at(-1)) : null;
}

/** Checkpoints by step, and those that tell none last; of them the last one runs. */
function open_run(run) {
  const sizes = ({ config }) => [config.n_embd, config.n_head, config.n_neurons].join();
  const other = run.find((one) => sizes(one) !== sizes(run[0]));
  if (other)
    throw new CheckpointError(
      `${shown(other.name)} has other sizes than ${shown(run[0].name)}: checkpoints of one run have the same neurons`,
    );
  const of_run = run.length > 1 ? run.map((one) => ({ ...one, step: one.step ?? step_in(one.name) })) : run;
  of_run.sort((a, b) => (a.step ?? Infinity) - (b.step ?? Infinity) || a.name.localeCompare(b.name, "en", { numeric: true }));
  open_model(of_run.at(-1));
  app.graph.open(of_run, of_run.length - 1);
}

/** Run a checkpoint: the text is read again by it. */
function open_model({ name, params, config, dtype }) {
  app.job += 1;
  Object.assign(app, { name, model: new Model(params, config), fingerprint: null, layer: 0, head: null, neuron: null });
  const facts = [
    `${counted(count(config))} parameters`,
    `${config.n_layer} layers`,
    `${config.n_head} × ${counted(config.n_neurons)} neurons`,
  ];
  if (dtype !== "F32") facts.push(dtype.toLowerCase());
  if (config.freqs) facts.push("its own frequencies");
  $("model-name").textContent = name;
  $("model-facts").textContent = facts.join(" · ");
  $("welcome").hidden = true;
  $("desk").hidden = false;
  choices(
    $("layers"),
    "layer",
    Array.from({ length: config.n_layer }, (_, i) => [String(i + 1), i]),
    app.layer,
  );
  choices(
    $("heads"),
    "head",
    [["all", null], ...Array.from({ length: config.n_head }, (_, h) => [String(h + 1), h])],
    app.head,
  );
  choices(
    $("which"),
    "synapses",
    [
      ["strongest", "strongest"],
      ["read at this byte", "read"],
    ],
    app.synapses,
  );
  dismiss();
  const opening = as_bytes(OPENING).every((byte) => byte < config.vocab_size) ? OPENING : "";
  begin(null, as_bytes($("text").value || opening));
}

/** A new text, or one that goes on with a state. */
function begin(base, bytes) {
  app.reading = new Reading(app.model, base);
  app.target = [...bytes];
  app.chosen = bytes.length - 1;
  $("before").hidden = !base;
  if (base)
    $("before").textContent =
      `Goes on from a saved state, which has read ${counted(Number(base.position))} bytes before these.`;
  show_text();
  return follow();
}

function own_fingerprint() {
  app.fingerprint ??= fingerprint(app.model.params, app.model.config);
  return app.fingerprint;
}

function load_state(bytes, name) {
  if (!app.model) throw new CheckpointError(`${shown(name)} is a saved state: open the weights that it was saved with first`);
  const { state, pending } = read_state(bytes, name, app.model.config, own_fingerprint());
  dismiss();
  begin(state, pending);
}

/** All but the last byte read, and that one pending, as bdh-generate has it: so a continuation draws what it would have drawn. */
function save() {
  const { reading, target, model } = app;
  if (!target.length)
    throw new CheckpointError("there is no text yet, so there is nothing to remember: write at least one byte");
  if (reading.tokens.length < target.length)
    throw new CheckpointError("the text is still being read: wait for its end, or press Stop and shorten it");
  const state = reading.state_after(target.length - 1);
  const file = save_state(state, model.config, own_fingerprint(), target.slice(-1));
  const address = URL.createObjectURL(new Blob([file], { type: "application/octet-stream" }));
  element("a", { href: address, download: "state.safetensors" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
  say(`saved: ${counted(Number(state.position) + 1)} bytes of text in ${counted(file.length / 2 ** 20, 1)} MB`);
}

// ---- What is shown ----

/** Draw everything again; in the course of work only what is cheap. */
function draw(underway = false) {
  if (!app.model) return;
  draw_text();
  draw_here();
  draw_next();
  draw_back();
  draw_rasters();
  draw_state(underway);
  draw_causes(underway);
  app.graph.fire(app.reading.records[app.chosen]?.[app.layer] ?? null);
}

/** Put the text into its field, where it was not typed. */
function show_text() {
  const field = $("text");
  field.value = as_text(app.target);
  field.setSelectionRange(field.value.length, field.value.length);
  const frame = field.closest(".editor");
  requestAnimationFrame(() => (frame.scrollTop = frame.scrollHeight));
}

const shades = []; // of each character: its element, its text, and what it was last drawn as

/** Shade each character by the bits its bytes cost, and mark the one that is looked at. */
function draw_text() {
  const field = $("text");
  const written = as_text(app.target);
  if (field.value !== written) show_text();
  const { bits } = app.reading;
  let [at, i] = [0, 0];
  for (const character of written) {
    const length = byte_length(character);
    const cost = bits.slice(at, at + length).reduce((sum, one) => sum + (one ?? 0), 0);
    const unread = at + length > bits.length;
    const here = app.chosen >= at && app.chosen < at + length;
    const look = `${character}${unread ? "?" : cost.toFixed(2)}${here}`;
    if (shades[i]?.look !== look) {
      const span = element(
        "span",
        { class: here ? "at" : "", style: `background:rgba(var(--shade),${unread ? 0 : shade_of(cost)})` },
        character,
      );
      if (shades[i]) shades[i].span.replaceWith(span);
      else $("shades").append(span);
      shades[i] = { span, look };
    }
    at += length;
    i += 1;
  }
  while (shades.length > i) shades.pop().span.remove();
  if (!$("shades").lastChild || $("shades").lastChild.nodeType !== Node.TEXT_NODE) {
    for (const node of [...$("shades").childNodes]) if (node.nodeType === Node.TEXT_NODE) node.remove();
    $("shades").append("\u200b"); // so that a last empty line has its height
  }
}

const shade_of = (bits) => Math.min(0.8, bits / 10).toFixed(3);

function draw_here() {
  const { reading, chosen } = app;
  if (chosen < 0) return $("here").replaceChildren("Write something to look inside.");
  const bits = reading.bits[chosen];
  const cost =
    bits === undefined
      ? "not read yet"
      : bits === null
        ? "the first, which nothing predicted"
        : `${counted(bits, 1)} bits, ${surprise(bits)}`;
  const place = reading.base ? Number(reading.base.position) + chosen : chosen;
  $("here").replaceChildren(
    "Inside, at byte ",
    `${counted(place + 1)} `,
    element("b", {}, named(app.target[chosen])),
    ` — ${cost}`,
  );
}

function surprise(bits) {
  return bits < 1 ? "as expected" : bits < 4 ? "not sure" : bits < 8 ? "a surprise" : "no idea of it";
}

function draw_next() {
  const { reading, chosen, target } = app;
  const logits = reading.logits[chosen];
  if (!logits) {
    $("next").replaceChildren();
    $("next-after").textContent = chosen < 0 ? "Write something, and here stands what the model expects." : "Not read yet.";
    return;
  }
  const chances = log_softmax(logits).map(Math.exp);
  const came = target[chosen + 1];
  const order = [...chances.keys()].sort((a, b) => chances[b] - chances[a]);
  const rows = order.slice(0, CANDIDATES);
  if (came !== undefined && !rows.includes(came)) rows[CANDIDATES - 1] = came;
  $("next").replaceChildren(
    ...rows.map((byte) => {
      const label = element("span", { class: "byte", title: `byte ${byte}` }, named(byte));
      return bar(label, chances[byte], percent(chances[byte]), { row: byte === came ? "came" : "" });
    }),
  );
  const mean = reading.mean_bits();
  const after = element("span", { class: "place" }, ...context(target, chosen, 18, 0, 0));
  const followed =
    came === undefined ? "" : ` Outlined: the byte that came, rank ${order.indexOf(came) + 1} of ${order.length}.`;
  const sum = Number.isNaN(mean) ? "" : ` The whole text so far costs ${counted(mean, 2)} bits per byte; 8 would be guessing.`;
  $("next-after").replaceChildren("After ", after, ` the model expects these bytes.${followed}${sum}`);
}

let tried = ""; // what the causes that are shown, or worked out, belong to

/** What the prediction came from: worked out a little at a time, once there is time for it. */
async function draw_causes(underway) {
  const { reading, chosen } = app;
  const what = underway || !reading.records[chosen] ? "" : [reading.position, app.job, chosen].join();
  if (what && what === tried) return;
  tried = what;
  $("causes-of").setAttribute("aria-busy", String(Boolean(what)));
  if (!what) return underway ? undefined : show_causes(null, "");
  const note = why_not_to_try();
  const known = note ? null : await in_slices(causes(reading, chosen, TRIED), () => what === tried);
  if (note || known) show_causes(known, note);
}

/** Why nothing is tried without some byte; empty if it is. */
function why_not_to_try() {
  const { reading, chosen } = app;
  if (chosen === 0 && reading.base) return "What stands before is in the state, where no byte can be told apart.";
  if (chosen === 0) return "Nothing stands before this byte: the prediction comes from itself.";
  if (reading.state.size > ROOM_TO_TRY)
    return "The state of this model is too large to try it without some byte here: bdh-look TEXT does.";
  const near = chosen === reading.tokens.length - 1 || reading.distance_to(chosen) <= NEAR;
  return near ? "" : "Too much would have to be read again here. At the end of the text stands what the prediction came from.";
}

function show_causes(known, note) {
  $("causes-of").setAttribute("aria-busy", "false");
  const found = known ? known.found.slice(0, CAUSES) : [];
  const most = Math.max(0.1, ...found.map(({ gave }) => Math.abs(gave)));
  const byte = (token) => element("b", { class: "byte" }, named(token));
  if (!found.length) $("causes-note").replaceChildren(note);
  else if (Math.abs(found[0].gave) < 0.02)
    $("causes-note").replaceChildren(
      "Without any single one of the earlier bytes ",
      byte(known.likeliest),
      " would be as likely.",
    );
  else
    $("causes-note").replaceChildren(
      ...["Without ", byte(app.target[found[0].at]), ` at byte ${counted(found[0].at + 1)}, `, byte(known.likeliest)],
      ` would have ${percent(found[0].left)} and not ${percent(known.chance)}. Below, the chance that is left to it without each:`,
    );
  $("causes").replaceChildren(
    ...found.map(({ at, gave, left }) =>
      bar(place(at), Math.abs(gave) / most, percent(left), { fill: gave < 0 ? "down" : "" }),
    ),
  );
}

/** The share of each earlier byte in what was read, with the sign of what it added; means over heads. */
function shares() {
  const { reading, chosen, layer, head } = app;
  const by_head = reading.scores(chosen, layer).filter((_, h) => head === null || h === head);
  const mean = new Float64Array(chosen);
  for (const scores of by_head) {
    const total = scores.reduce((sum, score) => sum + Math.abs(score), 0);
    if (total) scores.forEach((score, u) => (mean[u] += score / total / by_head.length));
  }
  return mean;
}

function draw_back() {
  const { reading, chosen, target } = app;
  const strip = $("back-strip");
  if (!reading.records[chosen] || chosen < 1) {
    strip.replaceChildren(chosen === 0 && !reading.base ? "A first byte has nothing to look back at." : "");
    $("back").replaceChildren();
    return;
  }
  const share = shares();
  const most = share.reduce((one, other) => Math.max(one, Math.abs(other)), 0);
  const from = Math.max(0, chosen - STRIP);
  const spans = target.slice(from, chosen + 1).map((byte, i) => {
    const u = from + i;
    const alpha = u < chosen && most ? (0.75 * Math.abs(share[u])) / most : 0;
    const text = byte === 10 ? "⏎\n" : as_text([byte]);
    const style = `background:rgba(var(${share[u] < 0 ? "--minus" : "--plus"}),${alpha.toFixed(3)})`;
    return element("span", { style, class: u === chosen ? "at" : "" }, text);
  });
  const lost = reading.first_record
    ? `(What fired at the first ${counted(reading.first_record)} bytes is no longer kept.)\n`
    : "";
  const earlier = reading.base
    ? "(What it reads of the text before the saved state stands in the state, where no byte can be told apart.)\n"
    : "";
  strip.replaceChildren(earlier, lost, ...spans);
  strip.scrollTop = strip.scrollHeight;
  const best = [...share.keys()].sort((a, b) => Math.abs(share[b]) - Math.abs(share[a])).slice(0, LOOKED_BACK);
  $("back").replaceChildren(
    ...best.map((u) =>
      bar(place(u), Math.abs(share[u]) / most, percent(Math.abs(share[u])), { fill: share[u] < 0 ? "down" : "" }),
    ),
  );
}

/** A byte in its context, which looks inside there when pressed. */
function place(t, before, after) {
  const press = { type: "button", class: "place", title: `Look inside at byte ${t + 1}`, onclick: () => choose(t) };
  return element("button", press, ...context(app.target, t, before, after));
}

function draw_rasters() {
  const { model, reading, chosen } = app;
  const { n_layer, n_head, n_neurons } = model.config;
  const holder = $("rasters");
  if (holder.children.length !== n_layer) holder.replaceChildren(...Array.from({ length: n_layer }, (_, i) => raster(i)));
  const total = n_head * n_neurons;
  const nothing = { index: new Uint32Array(0), value: new Float32Array(0) };
  [...holder.children].forEach((figure, i) => {
    const { fired, passed } = reading.records[chosen]?.[i] ?? { fired: nothing, passed: nothing };
    const [canvas, caption] = figure.children;
    figure.className = i === app.layer ? "chosen" : "";
    draw_neurons(canvas, total, fired, passed);
    const facts = `${percent(fired.index.length / total)} fire, ${percent(passed.index.length / total)} pass`;
    canvas.setAttribute("aria-label", `Layer ${i + 1}: of ${counted(total)} neurons ${facts}`);
    caption.replaceChildren(element("strong", {}, `Layer ${i + 1}`), ` ${facts}`);
  });
  draw_neuron();
  draw_chips();
}

function raster(layer) {
  const canvas = element("canvas", {
    role: "img",
    onpointermove: (event) => draw_neuron(layer, neuron_under(event)),
    onpointerleave: () => draw_neuron(),
    onclick: (event) => {
      app.neuron = neuron_under(event);
      select("layer", layer);
    },
  });
  return element("figure", {}, canvas, element("figcaption"));
}

function neuron_under({ target: canvas, offsetX, offsetY }) {
  const { n_head, n_neurons } = app.model.config;
  const total = n_head * n_neurons;
  const columns = columns_for(total);
  const [x, y] = [(offsetX / canvas.clientWidth) * columns, (offsetY / canvas.clientHeight) * Math.ceil(total / columns)];
  return Math.min(total - 1, Math.floor(y) * columns + Math.floor(x));
}

/** The strongest neuron that passes the gate of a layer; undefined where none does. */
function strongest_through(layer) {
  const passed = app.reading.records[app.chosen]?.[layer].passed;
  return passed?.index[passed.value.indexOf(Math.max(...passed.value))];
}

/** One neuron, and where in this text it fires most: the one pointed at or picked, or the strongest that passes the gate. */
function draw_neuron(layer = app.layer, at = app.neuron) {
  const row = at ?? strongest_through(layer);
  if (row === undefined) return $("neuron").replaceChildren();
  const who = at === null ? `Strongest through the gate of layer ${layer + 1}: neuron` : `Layer ${layer + 1}, neuron`;
  $("neuron").replaceChildren(`${who} ${neuron(row, app.model.config)}. `, ...where_it_fires(layer, row));
}

/** Who else passes the gate, and of the neuron that was picked, or the strongest, what it writes and its partners. */
function draw_chips() {
  const { model, reading, chosen, layer, target } = app;
  const row = app.neuron ?? strongest_through(layer);
  $("about-neuron").hidden = row === undefined;
  if (row === undefined) return;
  const passed = reading.records[chosen]?.[layer].passed ?? { index: [], value: [] };
  const by_value = [...passed.index.keys()].sort((a, b) => passed.value[b] - passed.value[a]);
  const chip = (other) => {
    const press = { type: "button", class: "chip", "aria-pressed": String(other === app.neuron), onclick: () => pick(other) };
    return element("button", press, neuron(other, model.config));
  };
  const byte = (token) => element("span", { class: "byte" }, named(token));
  const { excites, excited_by } = partners(model, row, CHIPS);
  const speaks = speaks_for(model, row, target);
  const half = Math.min(CHIPS, Math.ceil(speaks.length / 2));
  const told = {
    passing: by_value.slice(0, CHIPS).map((i) => chip(passed.index[i])),
    for: speaks.slice(0, half).map(byte),
    against: speaks.slice(half).reverse().slice(0, half).map(byte),
    excites: excites.map(chip),
    "excited-by": excited_by.map(chip),
  };
  for (const [name, children] of Object.entries(told)) $(`neuron-${name}`).replaceChildren(...children);
}

/** Pick a neuron, or let it go again. */
function pick(row) {
  app.neuron = row === app.neuron ? null : row;
  draw(app.working);
  [...document.querySelectorAll("#about-neuron .chip")]
    .find((one) => one.textContent === neuron(row, app.model.config))
    ?.focus();
}

/** Where in this text a neuron fires most in a layer. */
function where_it_fires(layer, row) {
  const activity = app.reading.records.map((kept) => (kept ? value_at(kept[layer].fired, row) : 0));
  const best = [...activity.keys()]
    .filter((t) => activity[t] > 0)
    .sort((a, b) => activity[b] - activity[a])
    .slice(0, 3);
  if (!best.length) return ["It has not fired in this text."];
  return [
    "In this text it fires most at ",
    ...best.flatMap((t) => [element("span", { class: "place" }, ...context(app.target, t, 6, 0, 0)), " "]),
  ];
}

const neuron = (row, { n_neurons }) => `${counted((row % n_neurons) + 1)} of head ${Math.floor(row / n_neurons) + 1}`;

let shown_state = ""; // what the picture of the state shows, so that it is not worked out again

function draw_state(underway) {
  const { reading, model, chosen, layer, head } = app;
  const { n_layer, n_head: nh, n_neurons: N, n_embd: D } = model.config;
  const near = reading.distance_to(chosen + 1) <= NEAR;
  const length = near && !underway && chosen < reading.tokens.length ? chosen + 1 : reading.tokens.length;
  const what = [length, reading.state.position, app.job, layer, head, underway, app.synapses].join();
  if (what === shown_state) return;
  shown_state = what;
  const state = length === reading.tokens.length ? reading.state : reading.state_after(length);
  const memory = state.layers[layer];
  const numbers = nh * N * D;
  $("memory-size").textContent =
    `${n_layer} × ${counted(numbers)} numbers, ${counted((n_layer * numbers * 4) / 2 ** 20, 1)} MB`;
  const when = length === chosen + 1 ? "after this byte" : "after the last byte read";
  $("memory-hint").textContent =
    "All it knows of the text is this state, of the same size however long the text gets. " +
    `Layer ${layer + 1} ${when}: neurons across, ` +
    `features down${nh > 1 && head === null ? ", a band for each head" : ""}. ` +
    "Every byte adds to the synapses of the neurons that fire.";
  draw_memory($("memory"), memory, head === null ? [...Array(nh).keys()] : [head], N, D);
  const [start, end] = head === null ? [0, numbers] : [head * N * D, (head + 1) * N * D];
  const is_read = app.synapses === "read" && length === chosen + 1 && reading.records[chosen];
  $("measure").textContent = is_read ? "Share" : "Strength";
  if (!is_read)
    return $("synapses").replaceChildren(...strongest(memory, start, end, 8).map((at) => synapse(memory, at, length)));
  const before = reading.state_before(chosen);
  const parts = reading.parts(chosen, layer, before);
  const rows = strongest(parts, start, end, 8).map((at) => synapse(before.layers[layer], at, chosen, percent(parts[at])));
  $("synapses").replaceChildren(...rows);
}

/** A row of the table of synapses: who, how strong or how much read, and the bytes that wrote most of it. */
function synapse(memory, at, length, share = null) {
  const { reading, model, layer } = app;
  const D = model.config.n_embd;
  const [row, d] = [Math.floor(at / D), at % D];
  const written = reading.written(layer, row, d, length - 1);
  const sign = Math.sign(memory[at]);
  const best = [...written.keys()]
    .filter((t) => written[t] * sign > 0)
    .sort((a, b) => sign * (written[b] - written[a]))
    .slice(0, 1);
  return element(
    "tr",
    {},
    element("td", {}, counted(Math.floor(row / model.config.n_neurons) + 1)),
    element("td", {}, counted((row % model.config.n_neurons) + 1)),
    element("td", {}, counted(d + 1)),
    element(
      "td",
      { class: sign > 0 ? "plus" : "minus" },
      share ?? `${sign > 0 ? "+" : "−"}${counted(Math.abs(memory[at]), 1)}`,
    ),
    element("td", {}, ...(best.length ? best.map((t) => place(t, 7, 1)) : ["before this text"])),
  );
}

// ---- The lesson ----

/** Teach a phrase, compare with its bytes shuffled, and let the model complete it before and after. */
function* teaching(phrase, times) {
  const { model, reading } = app;
  yield* reading_on();
  const bits = [];
  let [before, after] = [null, null];
  for (const step of lesson(model, reading.state, phrase, times)) {
    if (step) {
      bits.push(step.bits);
      before ??= step.state;
      after = step.state;
    }
    yield;
  }
  const draws = new Sampling(1, null, 1n); // a seed of its own: the same shuffle every time
  const control = shuffled(phrase, (i) => uniform(draws.seed, BigInt(i)));
  let confused = null;
  for (const step of lesson(model, reading.state, control, times)) {
    confused = step?.state ?? confused;
    yield;
  }
  let control_bits;
  for (const step of lesson(model, confused, phrase, 0)) {
    if (step) control_bits = step.bits;
    yield;
  }
  const half = Math.max(1, Math.min(phrase.length - 1, Math.ceil(phrase.length * 0.6)));
  const completed = [];
  for (const state of [before, after]) {
    const rest = [];
    for (const byte of stream(
      model,
      [10, ...phrase.slice(0, half)],
      phrase.length - half,
      new Sampling(0, null, 0n),
      state.copy(),
    )) {
      rest.push(byte);
      yield;
    }
    completed.push(rest);
  }
  show_lesson(phrase.slice(0, half), times, bits, control_bits, completed);
}

function show_lesson(prompt, times, bits, control, [before, after]) {
  const often = times === 1 ? "once" : `${times} times`;
  const [first, last] = [bits[0], bits.at(-1)];
  const verdict =
    last > 0.95 * first
      ? "it learned nothing"
      : last > 0.95 * control
        ? "no better than after the same bytes shuffled"
        : `${percent(1 - last / first)} less surprise`;
  const completion = (when, rest) =>
    element(
      "blockquote",
      {},
      element("small", {}, when),
      as_text(prompt),
      element("b", {}, as_text(rest).replaceAll("\n", "⏎")),
    );
  const sum = element(
    "p",
    { class: "verdict" },
    element("strong", {}, `${counted(first, 2)} → ${counted(last, 2)}`),
    ` bits per byte after reading it ${often}: ${verdict}.`,
  );
  const told =
    "Each point is one reading of the phrase. The ring is a control: the phrase after its bytes, shuffled, were read " +
    `${often}: ${counted(control, 2)}.`;
  const curve = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  curve.setAttribute("role", "img");
  curve.setAttribute("aria-label", `Bits per byte by reading: ${bits.map((value) => value.toFixed(2)).join(", ")}`);
  $("learned").replaceChildren(sum, curve, element("p", { class: "hint" }, told));
  draw_lesson(curve, bits, control);
  const asked = "Asked to complete it, with the likeliest byte each time, ";
  $("completed").replaceChildren(
    completion(`${asked}before:`, before),
    completion(`${asked}after reading it ${often}:`, after),
  );
}

// ---- Talk ----

function say(text) {
  const { reading, target } = app;
  if (!reading) return;
  const progress =
    reading.tokens.length < target.length
      ? `${counted(reading.tokens.length)} of ${counted(target.length)} bytes read`
      : `${counted(target.length)} bytes`;
  $("status").textContent = text ? `${progress} · ${text}` : progress;
}

function complain(error) {
  if (!(error instanceof BDHError)) throw error;
  $("notice").firstElementChild.textContent = error.message;
  $("notice").hidden = false;
}

function dismiss() {
  $("notice").hidden = true;
}

/** Whatever a handler throws on purpose is shown as its sentence. */
function trying(action) {
  return (event) => {
    try {
      dismiss();
      return action(event);
    } catch (error) {
      return complain(error);
    }
  };
}

// ---- Choices ----

/** Radio buttons for a choice of the app. */
function choices(fieldset, name, options, current) {
  const made = options.map(([label, value]) => {
    const input = element("input", {
      type: "radio",
      name,
      checked: value === current,
      "aria-label": `${name} ${label}`,
      onchange: () => select(name, value),
    });
    input.dataset.value = String(value);
    return element("label", {}, input, element("span", { "aria-hidden": "true" }, label));
  });
  fieldset.replaceChildren(fieldset.firstElementChild, ...made);
}

function select(name, value) {
  app[name] = value;
  for (const input of document.querySelectorAll(`input[name=${name}]`)) input.checked = input.dataset.value === String(value);
  draw(app.working);
}

/** Look inside at a byte, and put the cursor there. */
function choose(t) {
  app.chosen = t;
  const end = as_text(app.target.slice(0, t + 1)).length;
  $("text").focus({ preventScroll: true }); // the button that was pressed is drawn anew
  $("text").setSelectionRange(end, end);
  draw(app.working);
}

/** The byte before the cursor; of a character of several bytes its last. */
function byte_at_cursor() {
  const field = $("text");
  return Math.max(as_bytes(field.value.slice(0, field.selectionStart)).length, 1) - 1;
}

// ---- What people do ----

function listen() {
  $("text").addEventListener(
    "input",
    trying(() => {
      const bytes = as_bytes($("text").value);
      for (const byte of bytes) check_token(byte, app.model.config);
      app.target = [...bytes];
      app.chosen = bytes.length ? byte_at_cursor() : -1;
      follow();
      draw(app.working);
      say("");
    }),
  );
  document.addEventListener("selectionchange", () => {
    if (document.activeElement !== $("text") || !app.target.length || app.working) return;
    const t = byte_at_cursor();
    if (t !== app.chosen) {
      app.chosen = t;
      draw();
    }
  });
  $("generate").addEventListener(
    "submit",
    trying((event) => {
      event.preventDefault();
      const form = event.target.elements;
      const how = new Sampling(Number(form.temperature.value), Number(form.top_k.value), BigInt(form.seed.value));
      const length = Number(form.bytes.value);
      check_length(length);
      if (!app.target.length) throw new SamplingError("the text is empty: a text begins with at least one byte");
      work(writing_on(length, how), speed("written"));
    }),
  );
  $("stop").addEventListener("click", () => {
    app.target.length = app.reading.tokens.length; // what has not been read goes
    app.chosen = Math.min(app.chosen, app.target.length - 1);
    show_text();
    stop();
    say("stopped");
  });
  $("afresh").addEventListener(
    "click",
    trying(() => {
      begin(null, []);
      $("text").focus();
      say("");
    }),
  );
  $("lesson").addEventListener(
    "submit",
    trying((event) => {
      event.preventDefault();
      const form = event.target.elements;
      const phrase = as_bytes(form.phrase.value);
      for (const byte of [10, ...phrase]) check_token(byte, app.model.config);
      work(teaching(phrase, Number(form.times.value)), speed("taught"));
    }),
  );
  $("save").addEventListener("click", trying(save));
  for (const id of ["open", "load"]) $(id).addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async ({ target }) => {
    if (target.files.length) await open_files([...target.files]);
    target.value = "";
  });
  $("notice").lastElementChild.addEventListener("click", dismiss);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    shown_state = "";
    forget_colours();
    draw();
  });
  listen_for_drops();
}

/** Files may be dropped anywhere. While one is held over the page it says so; the event comes again and again until it is gone. */
function listen_for_drops() {
  let gone;
  const cover = (hidden) => {
    clearTimeout(gone);
    $("drop").hidden = hidden;
  };
  const with_files = ({ dataTransfer }) => [...(dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!with_files(event)) return;
    event.preventDefault();
    cover(false);
    gone = setTimeout(() => cover(true), 600);
  });
  document.addEventListener("drop", (event) => {
    if (!with_files(event)) return;
    event.preventDefault();
    cover(true);
    const files = [...event.dataTransfer.files];
    if (files.length) open_files(files);
  });
}

/** Begin with the checkpoint that came with the page, and the graphs of its run, if they did. */
function start() {
  app.graph = new GraphCard({
    named: (row) => neuron(row, app.model.config),
    about: (row) => where_it_fires(app.layer, row),
    run: (one) => {
      open_model(one);
      app.graph.runs(one);
    },
  });
  listen();
  const carried = document.getElementById("checkpoint");
  if (!carried) return ($("welcome").hidden = false);
  trying(() => {
    const bytes = Uint8Array.from(atob(carried.textContent.trim()), (c) => c.charCodeAt(0));
    const one = checkpoint(bytes, carried.dataset.name);
    open_run([one]);
    const run = document.getElementById("run");
    if (!run) return;
    const earlier = decoded(JSON.parse(run.textContent)).map((held) => ({ ...held, config: one.config, params: null }));
    app.graph.open([...earlier.slice(0, -1), { ...earlier.at(-1), params: one.params }], earlier.length - 1);
  })();
}

start();
