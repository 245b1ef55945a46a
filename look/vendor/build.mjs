/** Writes the module that the live page takes d3 from: what d3.mjs names, with the licence of each package that is in it. */

import { readFileSync } from "node:fs";
import { build } from "esbuild";

const OUTPUT = "../bdh_look/javascript/d3.mjs";
const options = {
  entryPoints: ["d3.mjs"],
  outfile: OUTPUT,
  bundle: true,
  format: "esm",
  target: "es2022",
  charset: "utf8",
  minify: true,
  legalComments: "none", // there are none: the licences are put at the head
  metafile: true,
  write: false,
};

/** The packages of which something is in the bundle. */
function packages({ outputs }) {
  const [{ inputs }] = Object.values(outputs);
  const used = Object.keys(inputs).filter((path) => inputs[path].bytesInOutput > 0);
  return [...new Set(used.map((path) => /^node_modules\/([^/]+)\//.exec(path)?.[1]).filter(Boolean))].sort();
}

/** Names and versions by licence, and the licence: they differ in the years of the copyright alone. */
function licences(names) {
  const of = (name, file) => readFileSync(`node_modules/${name}/${file}`, "utf8");
  const rest = new Set();
  const lines = names.map((name) => {
    const { version, license } = JSON.parse(of(name, "package.json"));
    const [copyright, ...permission] = of(name, "LICENSE").trim().split("\n");
    if (license !== "ISC") throw new Error(`${name} is under ${license}: see to its notice`);
    rest.add(permission.join("\n").trim());
    return `${name} ${version}, ${copyright.trim()}`;
  });
  if (rest.size !== 1) throw new Error("the packages have licences of several wordings: give each its own");
  return [...lines, "", ...[...rest][0].split("\n")].map((line) => ` * ${line}`.trimEnd()).join("\n");
}

const { metafile } = await build(options);
const head = `/*\n * Made by look/vendor: change d3.mjs there, and run make javascript.\n *\n${licences(packages(metafile))}\n */`;
await build({ ...options, write: true, banner: { js: head } });
