/** Plots and graphs, drawn by d3: from numbers to SVG, without knowing of the model or the page. */

import {
  axisBottom,
  axisLeft,
  forceCollide,
  forceLink,
  forceManyBody,
  forceSimulation,
  forceX,
  forceY,
  line,
  scaleLinear,
  scaleLog,
  scalePoint,
  scaleSqrt,
  select,
} from "./d3.mjs";
import { distribution, exceeding, largest, sums } from "./graph.mjs";

const WAYS = ["out", "into"];

/** An empty drawing as wide as its place on the page, and the frame inside its axes. */
function framed(svg, height, { left = 44, right = 16, top = 24, bottom = 36 } = {}) {
  const width = Math.max(240, svg.clientWidth || svg.parentElement.clientWidth);
  const drawn = select(svg).attr("viewBox", `0 0 ${width} ${height}`).attr("height", height);
  drawn.selectAll("*").remove();
  return { drawn, width, height, left, right: width - right, top, bottom: height - bottom };
}

function axes({ drawn, left, right, top, bottom }, x_axis, y_axis, x_title, y_title) {
  drawn.append("g").attr("class", "axis").attr("transform", `translate(0,${bottom})`).call(x_axis);
  drawn.append("g").attr("class", "axis").attr("transform", `translate(${left},0)`).call(y_axis);
  const title = (text, x, y, anchor) =>
    drawn.append("text").attr("class", "title").attr("x", x).attr("y", y).attr("text-anchor", anchor).text(text);
  title(x_title, right, bottom + 32, "end");
  title(y_title, 0, 12, "start");
}

/**
 * Hubs, their partners and the edges between them; each near those that it is joined with.
 * @param {SVGSVGElement} svg
 * @param {import("./graph.mjs").Hubs} graph
 * @param {Map<number, {x: number, y: number}>} before where neurons stood in the last picture, so that they are found again
 * @param {{named: (neuron: number) => string, pick: (neuron: number) => void}} page
 * @returns {Map<number, {x: number, y: number}>} where they stand now
 */
export function draw_network(svg, graph, before, { named, pick }) {
  const { drawn, width, height } = framed(svg, 430);
  const degree = sums(graph.out, graph.into);
  const size = scaleSqrt().domain([0, degree[graph.drawn[0]]]).range([2, 11]);
  const nodes = Array.from(graph.drawn, (neuron) => ({ neuron, r: size(degree[neuron]), ...before.get(neuron) }));
  const edges = Array.from(graph.weights, (_, e) => ({ source: graph.links[2 * e], target: graph.links[2 * e + 1] }));
  forceSimulation(nodes)
    .force("link", forceLink(edges).distance(60).strength(0.02))
    .force("charge", forceManyBody().strength(-170))
    .force("x", forceX(width / 2).strength(0.05))
    .force("y", forceY(height / 2).strength(0.09))
    .force(
      "apart",
      forceCollide(({ r }) => r + 1.5),
    )
    .stop()
    .tick(before.size ? 100 : 250);
  for (const [axis, most] of [
    ["x", width],
    ["y", height],
  ]) {
    const places = nodes.map((node) => node[axis]);
    const fitted = scaleLinear()
      .domain([Math.min(...places), Math.max(...places)])
      .range([14, most - 14]);
    for (const node of nodes) node[axis] = fitted(node[axis]);
  }
  drawn
    .append("g")
    .selectAll("line")
    .data(edges)
    .join("line")
    .attr("data-from", ({ source }) => source.neuron)
    .attr("data-to", ({ target }) => target.neuron)
    .attr("x1", ({ source }) => source.x)
    .attr("y1", ({ source }) => source.y)
    .attr("x2", ({ target }) => target.x)
    .attr("y2", ({ target }) => target.y);
  drawn
    .append("g")
    .selectAll("circle")
    .data(nodes)
    .join("circle")
    .attr("data-neuron", ({ neuron }) => neuron)
    .attr("cx", ({ x }) => x)
    .attr("cy", ({ y }) => y)
    .attr("r", ({ r }) => r)
    .on("click", (_, { neuron }) => pick(neuron))
    .append("title")
    .text(({ neuron }) => `Neuron ${named(neuron)}: excites ${graph.out[neuron]}, excited by ${graph.into[neuron]}`);
  return new Map(nodes.map(({ neuron, x, y }) => [neuron, { x, y }]));
}

/** Mark what fires, what passes the gate, and the neuron that was picked with its edges. */
export function mark_network(svg, { fired, passed, picked }) {
  select(svg)
    .selectAll("circle")
    .classed("fires", ({ neuron }) => fired.has(neuron))
    .classed("passes", ({ neuron }) => passed.has(neuron))
    .classed("picked", ({ neuron }) => neuron === picked);
  select(svg)
    .selectAll("line")
    .classed("from", ({ source }) => source.neuron === picked)
    .classed("to", ({ target }) => target.neuron === picked);
}

/** The share of neurons with at least so many edges, both ways, beside those of shuffled weights, which are dashed. */
export function draw_degrees(svg, graph) {
  const frame = framed(svg, 200);
  const [own, chance] = [distribution(graph), graph.chance];
  const most = Math.max(2, ...WAYS.flatMap((way) => [largest(own[way]), largest(chance[way])]));
  const x = scaleLog().domain([1, most]).range([frame.left, frame.right]);
  const y = scaleLog()
    .domain([1 / graph.out.length, 1])
    .range([frame.bottom, frame.top]);
  const share = (value) => `${Number((100 * value).toPrecision(1))}%`;
  const powers = y.ticks().filter((value) => Number.isInteger(Number(Math.log10(value).toFixed(6))));
  axes(
    frame,
    axisBottom(x).ticks(4, "~s"),
    axisLeft(y).tickValues(powers).tickFormat(share),
    "edges",
    "neurons with at least as many",
  );
  const curve = line(
    ([degree]) => x(degree),
    ([, exceeded]) => y(exceeded),
  );
  for (const [kind, counted] of [
    ["chance", chance],
    ["own", own],
  ]) {
    for (const way of WAYS)
      frame.drawn
        .append("path")
        .attr("class", `${kind} ${way}`)
        .attr("d", curve(exceeding(counted[way])));
  }
}

/**
 * The degrees of some neurons over the checkpoints of a run, and the largest that chance gives.
 * @param {SVGSVGElement} svg
 * @param {{label: string, graph: import("./graph.mjs").Hubs}[]} run
 * @param {number[]} neurons
 * @param {number} at the checkpoint that is looked at
 * @param {{named: (neuron: number) => string, go: (at: number) => void}} page
 */
export function draw_course(svg, run, neurons, at, { named, go }) {
  const frame = framed(svg, 200);
  const degrees = run.map(({ graph }) => sums(graph.out, graph.into));
  const chance = run.map(({ graph }) => largest(graph.chance.both));
  const most = Math.max(...chance, ...degrees.flatMap((all) => neurons.map((neuron) => all[neuron])));
  const x = scalePoint()
    .domain([...run.keys()])
    .range([frame.left + 8, frame.right - 8]);
  const y = scaleLinear().domain([0, most]).nice().range([frame.bottom, frame.top]);
  const every = Math.ceil(run.length / Math.max(2, Math.floor((frame.right - frame.left) / 90)));
  const ticks = [...run.keys()].filter((i) => (run.length - 1 - i) % every === 0);
  const x_axis = axisBottom(x)
    .tickValues(ticks)
    .tickFormat((i) => run[i].label);
  axes(frame, x_axis, axisLeft(y).ticks(4), "checkpoint", "edges");
  const curve = line(
    (_, i) => x(i),
    (value) => y(value),
  );
  const path = (kind, values) => frame.drawn.append("path").attr("class", kind).attr("d", curve(values));
  path("chance", chance);
  for (const neuron of neurons)
    path(
      "hub",
      degrees.map((all) => all[neuron]),
    )
      .append("title")
      .text(`Neuron ${named(neuron)}`);
  frame.drawn
    .append("line")
    .attr("class", "now")
    .attr("x1", x(at))
    .attr("x2", x(at))
    .attr("y1", frame.top)
    .attr("y2", frame.bottom);
  frame.drawn
    .selectAll("circle")
    .data(neurons)
    .join("circle")
    .attr("cx", x(at))
    .attr("cy", (neuron) => y(degrees[at][neuron]))
    .attr("r", 3.5);
  frame.drawn
    .append("g")
    .selectAll("rect")
    .data(run)
    .join("rect")
    .attr("x", (_, i) => x(i) - x.step() / 2)
    .attr("y", frame.top)
    .attr("width", Math.max(1, x.step()))
    .attr("height", frame.bottom - frame.top)
    .on("click", (_, one) => go(run.indexOf(one)));
}

/** Bits per byte over the readings of a phrase, and a ring for the control. */
export function draw_lesson(svg, bits, control) {
  const frame = framed(svg, 170, { right: 76 });
  const x = scalePoint()
    .domain([...bits.keys()])
    .range([frame.left + 8, frame.right - 8]);
  const y = scaleLinear()
    .domain([0, Math.max(1, ...bits, control)])
    .nice()
    .range([frame.bottom, frame.top]);
  const every = Math.ceil(bits.length / 12);
  const x_axis = axisBottom(x)
    .tickValues([...bits.keys()].filter((i) => i % every === 0))
    .tickFormat((i) => i + 1);
  axes(frame, x_axis, axisLeft(y).ticks(4), "reading", "bits per byte");
  const curve = line(
    (_, i) => x(i),
    (value) => y(value),
  );
  frame.drawn.append("path").attr("class", "hub").attr("d", curve(bits));
  const point = (kind, i, value) =>
    frame.drawn.append("circle").attr("class", kind).attr("cx", x(i)).attr("cy", y(value)).attr("r", 4);
  bits.forEach((value, i) => point("", i, value));
  point("control", bits.length - 1, control);
  frame.drawn
    .append("text")
    .attr("x", x(bits.length - 1) + 10)
    .attr("y", y(control) + 4)
    .text("shuffled");
}
