/** The card of the page that shows the graph behind a model: its hubs, and how they come about over a training run. */

import { bar, counted, element } from "./drawing.mjs";
import { LARGEST, distribution, hubs, largest, sums } from "./graph.mjs";
import { draw_course, draw_degrees, draw_network, mark_network } from "./plots.mjs";
import { in_slices } from "./slices.mjs";

const LISTED = 8; // hubs

const $ = (id) => document.getElementById(id);

/**
 * One checkpoint of a run; its graphs are worked out when they are looked at, or come with the page.
 * @typedef {{name: string, step: number | null, config: import("./config.mjs").BDHConfig,
 *   params: Record<string, Float32Array> | null, graphs: Record<string, import("./graph.mjs").Hubs>}} Checkpoint
 */

export class GraphCard {
  #run = []; // Checkpoints, in order
  #running = 0; // the one that the page runs
  #at = 0; // the one that is looked at
  #kind = "Gx";
  #picked = null; // a neuron
  #firing = null; // {fired, passed} of the byte and layer that the page looks at
  #places = new Map(); // of neurons in the picture
  #drawn = null; // the graph that is in the picture
  #turn = 0; // whoever finds another one there has been replaced
  #is_seen = false;

  /**
   * @param {{about: (neuron: number) => (Node | string)[], named: (neuron: number) => string,
   *   run: (one: Checkpoint) => void}} page what it says of a neuron, how it calls one, and how it runs a checkpoint
   */
  constructor(page) {
    this.page = page;
    const seen = new IntersectionObserver((entries) => {
      if (!entries.some(({ isIntersecting }) => isIntersecting)) return;
      seen.disconnect();
      this.#is_seen = true;
      this.#work_out();
    });
    seen.observe($("graph-card"));
    let width = 0; // drawing changes the height
    new ResizeObserver(([{ contentRect }]) => {
      if (contentRect.width !== width) this.#redraw();
      width = contentRect.width;
    }).observe($("graph-card"));
    for (const input of document.querySelectorAll("input[name=graph]")) {
      input.addEventListener("change", () => {
        this.#kind = input.value;
        this.#work_out();
      });
    }
    $("graph-at").addEventListener("input", ({ target }) => this.#go(Number(target.value)));
    $("graph-run").addEventListener("click", () => page.run(this.#run[this.#at]));
  }

  /**
   * Show the graphs of these checkpoints.
   * @param {Checkpoint[]} run
   * @param {number} running
   */
  open(run, running) {
    Object.assign($("graph-at"), { max: run.length - 1, value: running });
    [this.#run, this.#running, this.#at, this.#picked, this.#places] = [run, running, running, null, new Map()];
    $("graph-time").hidden = run.length < 2;
    $("graph-course").hidden = run.length < 2;
    $("graph-alone").hidden = run.length > 1;
    this.#work_out();
  }

  /** Another checkpoint of the run runs from now on. */
  runs(one) {
    this.#running = this.#run.indexOf(one);
    this.#redraw();
  }

  /** What fires and passes the gate at the byte and in the layer that the page looks at; null where nothing is known. */
  fire(firing) {
    this.#firing = firing;
    this.#mark();
  }

  #go(at) {
    this.#at = at;
    $("graph-at").value = at;
    this.#work_out();
  }

  /** The graphs that are missing: the one that is looked at first. The page breathes, and draws what is there. */
  async #work_out() {
    const [mine, kind] = [++this.#turn, this.#kind];
    this.#redraw();
    if (!this.#is_seen) return;
    const missing = [this.#run[this.#at], ...this.#run].filter((one) => one && !one.graphs[kind] && one.params);
    for (const one of new Set(missing)) {
      const { n_head, n_neurons } = one.config;
      if (n_head * n_neurons > LARGEST) continue;
      const graph = await in_slices(
        hubs(one.params, one.config, kind),
        () => mine === this.#turn,
        (share) => one === this.#run[this.#at] && this.#tell(`Working the graph out: ${Math.round(100 * share)}%.`),
      );
      if (!graph) return;
      one.graphs[kind] = graph;
      this.#redraw();
    }
  }

  #tell(text) {
    $("graph-told").textContent = text;
  }

  #redraw() {
    const one = this.#run[this.#at];
    if (!one) return;
    const step = one.step === null ? "" : `step ${counted(one.step)}, `;
    $("graph-name").textContent = `${step}${one.name}${this.#at === this.#running ? " (it runs)" : ""}`;
    $("graph-run").hidden = !this.#run.some((other, i) => i !== this.#running && other.params);
    $("graph-run").disabled = this.#at === this.#running;
    const graph = one.graphs[this.#kind];
    $("graph-parts").hidden = !graph;
    this.#drawn = graph ?? null;
    if (!graph) return this.#tell(reason(one));
    const degrees = sums(graph.out, graph.into);
    const chance = largest(graph.chance.both);
    this.#tell(
      `${counted(degrees.length)} neurons, ${counted(graph.edges)} edges. The largest hub has ${counted(degrees[graph.drawn[0]])}; ` +
        `by chance, with the weights shuffled, the largest would have ${counted(chance)}. ` +
        `${counted(degrees.filter((degree) => degree > chance).length)} neurons have more than that.`,
    );
    const named = this.page.named;
    this.#places = draw_network($("graph-network"), graph, this.#places, { named, pick: (neuron) => this.#pick(neuron) });
    draw_degrees($("graph-degrees"), graph);
    this.#list(graph, degrees);
    const whole = this.#run.filter(({ graphs }) => graphs[this.#kind]);
    if (whole.length > 1) {
      const points = whole.map(({ name, step, graphs }) => ({
        label: step === null ? name : counted(step),
        graph: graphs[this.#kind],
      }));
      draw_course($("graph-degrees-over-training"), points, [...graph.drawn.slice(0, LISTED)], whole.indexOf(one), {
        named,
        go: (at) => this.#go(this.#run.indexOf(whole[at])),
      });
    }
    this.#mark();
  }

  #list(graph, degrees) {
    const rows = [...graph.drawn.slice(0, LISTED)].map((neuron) => {
      const press = { type: "button", class: "place", "data-neuron": neuron, onclick: () => this.#pick(neuron) };
      const ways = `${counted(graph.out[neuron])} → ${counted(graph.into[neuron])} ←`;
      return bar(element("button", press, this.page.named(neuron)), degrees[neuron] / degrees[graph.drawn[0]], ways);
    });
    $("hubs").replaceChildren(...rows);
  }

  #pick(neuron) {
    this.#picked = neuron === this.#picked ? null : neuron;
    this.#mark();
  }

  #mark() {
    if (!this.#drawn) return;
    const known = this.#at === this.#running ? this.#firing : null;
    const set = (sparse) => new Set(sparse?.index);
    mark_network($("graph-network"), { fired: set(known?.fired), passed: set(known?.passed), picked: this.#picked });
    for (const button of document.querySelectorAll("#hubs button"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.neuron) === this.#picked));
    const neuron = this.#picked ?? this.#drawn.drawn[0];
    const who = `${this.#picked === null ? "The largest hub, neuron" : "Neuron"} ${this.page.named(neuron)}`;
    const [out, into] = [this.#drawn.out[neuron], this.#drawn.into[neuron]];
    const about = this.#at === this.#running ? this.page.about(neuron) : [];
    $("graph-neuron").replaceChildren(`${who}, excites ${counted(out)} and is excited by ${counted(into)}. `, ...about);
  }
}

/** Why a graph is not there. */
function reason({ params, config }) {
  const neurons = config.n_head * config.n_neurons;
  if (!params) return "This graph did not come with the page.";
  if (neurons <= LARGEST) return "Working the graph out.";
  const pairs = `${counted(neurons)} neurons make ${counted(neurons ** 2)} pairs, too many to work out in a page`;
  return `${pairs}: bdh-look graph draws it, and bdh-look live -c RUN works it out beforehand.`;
}

/** The graphs that came with the page, as typed arrays. */
export function decoded(run) {
  const array = ({ type, base64 }) => {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    return new globalThis[`${type}Array`](bytes.buffer);
  };
  const all = (held) =>
    Object.fromEntries(
      Object.entries(held).map(([key, value]) => [
        key,
        value?.base64 !== undefined ? array(value) : typeof value === "object" && value ? all(value) : value,
      ]),
    );
  return run.map(({ name, step, graphs }) => ({ name, step, graphs: all(graphs) }));
}
