// What the live page takes of d3, and no more.
export { shuffler } from "d3-array";
export { axisBottom, axisLeft } from "d3-axis";
export { forceCollide, forceLink, forceManyBody, forceSimulation, forceX, forceY } from "d3-force";
export { randomLcg } from "d3-random";
export { scaleLinear, scaleLog, scalePoint, scaleSqrt } from "d3-scale";
export { select } from "d3-selection";
export { line } from "d3-shape";
