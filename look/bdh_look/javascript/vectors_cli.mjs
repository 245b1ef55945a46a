/** node vectors_cli.mjs VECTORS OUTPUTS [float32|float64]: compute every case of a folder of vectors (conformance/VECTORS.md). */

import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { outputs } from "./vectors.mjs";

const [vectors, target, dtype = "float32"] = process.argv.slice(2);
const Real = { float32: Float32Array, float64: Float64Array }[dtype];
if (!target || !Real) {
  console.error("usage: node vectors_cli.mjs VECTORS OUTPUTS [float32|float64]");
  process.exit(2);
}
for (const name of readdirSync(vectors)) {
  const about = join(vectors, name, "manifest.json");
  if (!existsSync(about)) continue;
  const file = outputs(JSON.parse(readFileSync(about)), readFileSync(join(vectors, name, "inputs.safetensors")), Real);
  mkdirSync(join(target, name), { recursive: true });
  writeFileSync(join(target, name, "outputs.safetensors"), file);
}
