/**
 * Questions of tests to the port in JavaScript: node ask.mjs FOLDER QUESTION ARGUMENT..., where FOLDER holds the port.
 *
 * An answer is bytes or text on stdout. What the port refuses is its one sentence on stderr, and exit status 2.
 */

import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, question, ...given] = process.argv.slice(2);
const port = async (name) => import(`${pathToFileURL(folder)}/${name}.mjs`);
const { causes } = await port("causes");
const { as_bytes, as_text, byte_length } = await port("characters");
const { read, read_state, save_state } = await port("checkpoint");
const { Model } = await port("decode");
const { BDHError } = await port("errors");
const { hubs } = await port("graph");
const { fingerprint } = await port("params");
const { partners, speaks_for } = await port("partners");
const { Reading } = await port("reading");
const { Rotation, fixed_point, frequencies } = await port("rope");
const { Sampling, uniform } = await port("sampling");
const { generate, stream } = await port("text");

const opened = (path) => read(readFileSync(path), path.split("/").at(-1));
const drawn = (temperature, top_k, seed) => new Sampling(Number(temperature), Number(top_k), BigInt(seed));

const answers = {
  /** CHECKPOINT: its fingerprint */
  fingerprint(path) {
    const { params, config } = opened(path);
    return fingerprint(params, config);
  },
  /** N...: the tables of so many neurons, one after the other, float32 */
  frequencies: (...sizes) => Buffer.concat(sizes.map((N) => Buffer.from(frequencies(Number(N)).buffer))),
  /** CHECKPOINT PROMPT LENGTH TEMPERATURE TOP_K SEED: the prompt and its continuation */
  generate(path, prompt, length, ...how) {
    const { params, config } = opened(path);
    return generate(new Model(params, config), new TextEncoder().encode(prompt), Number(length), drawn(...how));
  },
  /** CHECKPOINT LENGTH: bytes that are written for each second of a processor, warm */
  speed(path, length) {
    const { params, config } = opened(path);
    const model = new Model(params, config);
    const write = (count) => generate(model, new TextEncoder().encode("The "), count, drawn(1, 0, 7));
    write(100);
    const begun = process.cpuUsage();
    write(Number(length));
    const { user, system } = process.cpuUsage(begun);
    return String((1e6 * Number(length)) / (user + system));
  },
  /** CHECKPOINT PROMPT STATE: read the prompt, and save the state as the page does */
  save(path, prompt, target) {
    const { params, config } = opened(path);
    const reading = new Reading(new Model(params, config));
    const bytes = new TextEncoder().encode(prompt);
    for (const byte of bytes) reading.read(byte);
    const state = reading.state_after(bytes.length - 1);
    writeFileSync(target, save_state(state, config, fingerprint(params, config), bytes.slice(-1)));
    return "";
  },
  /** CHECKPOINT STATE LENGTH SEED: what a saved state goes on with */
  go_on(path, file, length, seed) {
    const { params, config } = opened(path);
    const { state, pending } = read_state(readFileSync(file), "state.safetensors", config, fingerprint(params, config));
    return Uint8Array.from(stream(new Model(params, config), pending, Number(length), drawn(1, 0, seed), state));
  },
  /** CHECKPOINT TEXT: of each byte its bits; then of the last one, by layer, the scores of each head, and its neurons that fire */
  read(path, text) {
    const { params, config } = opened(path);
    const reading = new Reading(new Model(params, config));
    const bytes = new TextEncoder().encode(text);
    for (const byte of bytes) reading.read(byte);
    const scores = Array.from({ length: config.n_layer }, (_, i) => reading.scores(bytes.length - 1, i).map((row) => [...row]));
    const fired = reading.records.at(-1).map(({ fired, passed }) => [[...fired.index], [...passed.index]]);
    const written = [...reading.written(config.n_layer - 1, 3, 1, bytes.length - 1)];
    return JSON.stringify({ bits: reading.bits, scores, fired, written });
  },
  /** CHECKPOINT TEXT T: what is left of what is expected after byte T without each of twelve earlier ones, and what T read */
  causes(path, text, t) {
    const { params, config } = opened(path);
    const reading = new Reading(new Model(params, config));
    for (const byte of new TextEncoder().encode(text)) reading.read(byte);
    const steps = causes(reading, Number(t), 12);
    let step = steps.next();
    while (!step.done) step = steps.next();
    const before = reading.state_before(Number(t));
    const parts = Array.from({ length: config.n_layer }, (_, i) => [...reading.parts(Number(t), i, before)]);
    return JSON.stringify({ ...step.value, parts });
  },
  /** CHECKPOINT ROW TEXT: bytes of the text by how much a neuron speaks for them, and its partners */
  neuron(path, row, text) {
    const { params, config } = opened(path);
    const model = new Model(params, config);
    const bytes = new TextEncoder().encode(text);
    return JSON.stringify({ speaks: speaks_for(model, Number(row), bytes), ...partners(model, Number(row), 6) });
  },
  /** CHECKPOINT TEXT LENGTH: read, go back to a length, read on; the losses and the state of the last byte as they then are */
  rewind(path, text, length) {
    const { params, config } = opened(path);
    const model = new Model(params, config);
    const bytes = new TextEncoder().encode(text);
    const [once, again] = [new Reading(model), new Reading(model)];
    for (const byte of bytes) once.read(byte);
    for (const byte of bytes) again.read(byte);
    again.rewind(Number(length));
    for (const byte of bytes.slice(Number(length))) again.read(byte);
    const same = (one, other) => one.length === other.length && one.every((value, i) => value === other[i]);
    return JSON.stringify([
      same(once.bits, again.bits),
      once.state.layers.every((layer, i) => same(layer, again.state.layers[i])),
    ]);
  },
  /** HEX: bytes as characters and back, as HEX; then how many characters, and how many bytes they say they are */
  characters(hex) {
    const text = as_text(Buffer.from(hex, "hex"));
    const lengths = [...text].map(byte_length);
    return JSON.stringify([
      Buffer.from(as_bytes(text)).toString("hex"),
      lengths.length,
      lengths.reduce((sum, one) => sum + one, 0),
    ]);
  },
  /** CHECKPOINT KIND: the graph of that kind and its hubs, and the CPU seconds that it took */
  hubs(path, kind) {
    const { params, config } = opened(path);
    const steps = hubs(params, config, kind);
    const begun = process.cpuUsage();
    let step = steps.next();
    while (!step.done) step = steps.next();
    const { user, system } = process.cpuUsage(begun);
    const plain = (key, value) => (ArrayBuffer.isView(value) ? [...value] : value);
    return JSON.stringify({ ...step.value, seconds: (user + system) / 1e6 }, plain);
  },
  /** N STEPS: whether phases that go from position to position are those of products of whole numbers */
  turns(N, steps) {
    const table = frequencies(Number(N));
    const turning = new Rotation(table, "exact", Float64Array);
    for (let t = 0n; t < BigInt(steps); t++) turning.turn_to(t);
    const { high, low } = turning.turned;
    const wanted = fixed_point(table).map((f) => BigInt.asUintN(64, f * (BigInt(steps) - 1n)));
    return String(wanted.every((turned, n) => turned === (BigInt(high[n]) << 32n) + BigInt(low[n])));
  },
  /** CHECKPOINT: nothing, if it can be read */
  open: (path) => void opened(path) ?? "",
  /** CHECKPOINT STATE RUNS: what mutated files of both are, read as either, if not one sentence: nothing, one hopes */
  mutated(path, file, runs) {
    const { params, config } = opened(path);
    const model = fingerprint(params, config);
    const readers = [(bytes) => read(bytes, "m"), (bytes) => read_state(bytes, "s", config, model)];
    const wrong = [];
    for (let run = 0; run < Number(runs); run++) {
      const draw = (below, n) => Math.floor(uniform(BigInt(run), BigInt(n)) * below);
      let bytes = Uint8Array.from(readFileSync([path, file][run % 2]));
      const head = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
      for (let n = 0; n <= draw(4, 0); n++) {
        const at = draw(n % 3 ? head : bytes.length, 4 * n + 1);
        if (draw(3, 4 * n + 2)) bytes[at] = draw(2, 4 * n + 3) ? draw(256, 4 * n + 4) : 48 + draw(10, 4 * n + 4);
        else bytes = bytes.slice(0, Math.max(at, 1));
      }
      for (const reader of readers) {
        try {
          reader(bytes);
        } catch (error) {
          if (!(error instanceof BDHError) || error.message.length > 700 || /\p{Cc}/u.test(error.message))
            wrong.push(`${run}: ${error.stack}`);
        }
      }
    }
    return wrong.join("\n");
  },
  /** FILE...: of each the sentence with which it is refused, or null */
  refusals(...paths) {
    const refused = (path) => {
      try {
        opened(path);
        return null;
      } catch (error) {
        if (!(error instanceof BDHError)) throw error;
        return error.message;
      }
    };
    return JSON.stringify(paths.map(refused));
  },
};

try {
  process.stdout.write(answers[question](...given));
} catch (error) {
  if (!(error instanceof BDHError)) throw error;
  console.error(error.message);
  process.exit(2);
}
