"""Vectors for ports in any language: inputs and what the specification makes of them, in files that any language can read.

conformance/VECTORS.md describes the files. The published sets lie in published/VERSION beside this module and never change.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

import bdh_spec
from bdh_conformance.yardstick.agreement import by_pair
from bdh_conformance.yardstick.cases import Case
from bdh_conformance.yardstick.reference import Specification
from bdh_conformance.yardstick.tolerances import FLOAT64, FLOOR, Expectation, expect, honest
from bdh_spec import SPEC_VERSION, BDHConfig, BDHError, Model, Params, RecurrentState
from bdh_spec.checkpoint import int8_of, tensors_of
from bdh_spec.dtypes import WIDE
from bdh_spec.files import held, part_of, read_safetensors, reading, shown, sync, write_safetensors
from bdh_spec.int8 import widened
from bdh_spec.model import frequencies_of, init_state
from bdh_spec.params import Array, cast
from bdh_spec.rope import PHASES, Phase, frequencies, rotation
from bdh_spec.sampling import Sampling, sample, uniform

SCHEMA = 1
VERSION = "1.0"  # the newest published set
INT8_VERSION = "1.0-int8"  # the newest of weights in int8, which is a level that not every port claims
PUBLISHED = Path(__file__).parent / "published"
SUFFIXES = {"i8": "i1", "f32": "<f4", "f64": "<f8", "i32": "<i4", "i64": "<i8", "u64": "<u8"}

# Where a float32 product loses the phase, where float32 stops counting, and the last position there is.
POSITIONS = (0, 1, 10**4, 10**6, 2**24 + 1, 2**40 + 12345, 2**63 - 1)

# What the sampling draws cycle through: as many draws as temperatures times top_k meet each pair of them once.
TEMPERATURES = (1.0, 0.7, 0.0, 1.5, 2.0, 0.3)
TOP_K = (0, 1, 2, 3, 4, 7, 100)
SEEDS = (0, 7, 2**32 + 1, 2**63, 2**64 - 1)
DRAWN_AT = (1, 2, 10**4, 2**24 + 1, 2**40)
CHOICES = 7


class VectorsError(BDHError, ValueError):
    """Vectors, or outputs of a port, that cannot be read as such."""


@dataclass(frozen=True)
class Vector(Case):
    """A case whose weights and texts are those in ``inputs``, with the pieces in which the text is also read.

    ``starts`` are the positions of the first token, from an empty state; the parallel form starts at 0.
    """

    name: str = ""
    phase: Phase = "exact"
    starts: tuple[int, ...] = (0,)
    plan: tuple[int, ...] = ()
    origin: str = ""  # the case that the inputs were made from
    inputs: Mapping[str, Array] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def params(self) -> Params:
        """Weights in float64, whose values float32 can hold; of those in int8, what they stand for (R17)."""
        return Params(*(weight.astype(np.float64) for weight in widened(self.given, np.float64)))

    @cached_property
    def given(self) -> Params:
        """The weights as they are in ``inputs``."""
        held = {name.removeprefix("params."): value for name, value in self.inputs.items() if name.startswith("params.")}
        return int8_of(held) if self.stored == "int8" else Params(**held)

    @cached_property
    def tokens(self) -> Array:
        return self.inputs["tokens"]

    @cached_property
    def targets(self) -> Array:
        return self.inputs["targets"]


@dataclass(frozen=True)
class Judged:
    """A vector and, for each of WIDE, what a port of that dtype must compute."""

    vector: Vector
    expected: Mapping[str, Mapping[str, Expectation]]  # by tensor, by dtype


def origin(judged: Judged) -> Case:
    """The case that a vector was made from, before its weights were changed."""
    return Case.parse(judged.vector.origin.split(" with ")[0])


def fresh(name: str, case: Case, plan: tuple[int, ...], starts: tuple[int, ...], phase: Phase = "exact") -> Vector:
    """A vector made from a case: its weights rounded to float32, so that ports of either dtype hold the same ones."""
    given = tensors_of(case.given) if case.stored == "int8" else cast(case.given, np.float32)._asdict()
    weights = {f"params.{key}": value for key, value in given.items()}
    texts = {"tokens": case.tokens.astype(np.int64), "targets": case.targets.astype(np.int64)}
    inputs = {**weights, **texts, "phases.positions": np.array(POSITIONS, np.uint64), **draws()}
    about = {one.name: getattr(case, one.name) for one in fields(case)}
    return Vector(**about, name=name, phase=phase, starts=starts, plan=plan, origin=str(case), inputs=inputs)


def specimens() -> list[Vector]:
    """The cases of a published set: each shows mistakes that the others hide."""
    parse = Case.parse
    near, far = (0,), (0, 10**4, 2**24 + 1, 2**40)
    dead = fresh("dead_neurons", parse("B1 T5 L2 h2 D8 m3 V7 seed=14 scale=20"), (2, 3), near)
    large = fresh("large_logits", parse("B2 T4 L1 h2 D8 m2 V6 seed=39 scale=20"), (4,), near)
    dead.inputs["params.encoder"][..., 1] = dead.inputs["params.encoder_v"][..., 2] = 0
    large.inputs["params.lm_head"][...] *= 4096
    return [
        fresh("first_steps", parse("B1 T3 L1 h1 D4 m2 V5 seed=36 scale=20"), (1, 1, 1), near),
        fresh("fresh_weights", parse("B2 T6 L2 h3 D8 m7 V9 seed=44 scale=1"), (3, 1, 2), (0, 10**4)),
        fresh("three_heads", parse("B2 T7 L2 h3 D8 m7 V9 seed=45 scale=20"), (1, 4, 2), far),
        fresh("square_head", parse("B2 T6 L2 h2 D8 m3 V8 seed=31 scale=20"), (2, 3, 1), (2**24 + 1,)),
        fresh("square_encoder", parse("B1 T6 L3 h4 D8 m4 V13 seed=32 scale=20"), (5, 1), (2**40,)),
        fresh("mixed_scales", parse("B1 T6 L2 h2 D8 m5 V11 seed=22 scale=20 weights=mixed"), (6,), near),
        fresh("wide_vocabulary", parse("B1 T5 L1 h1 D4 m3 V260 seed=13 scale=20"), (4, 1), near),
        fresh("long_text", parse("B1 T48 L1 h2 D4 m3 V7 seed=27 scale=20"), (1, 15, 16, 1, 14, 1), (0, 2**24 + 1)),
        fresh("float32_phases", parse("B1 T6 L1 h2 D8 m4 V7 seed=42 scale=20"), (2, 4), (10**4, 10**6), "float32"),
        replace(dead, origin=f"{dead.origin} with neuron 1 of encoder and 2 of encoder_v at zero"),
        replace(large, origin=f"{large.origin} with lm_head times 4096"),
    ]


def int8_specimens() -> list[Vector]:
    """The same of weights in int8 (R17), a set of its own: heads and neurons that can be taken for one another, and cannot."""
    parse = Case.parse
    return [
        fresh("int8_three_heads", parse("B2 T7 L2 h3 D8 m7 V9 seed=45 scale=20 stored=int8"), (1, 4, 2), (0, 2**24 + 1)),
        fresh("int8_square_encoder", parse("B1 T6 L3 h4 D8 m4 V13 seed=32 scale=20 stored=int8"), (5, 1), (0,)),
        fresh("int8_fresh_weights", parse("B2 T6 L2 h3 D8 m7 V9 seed=44 scale=1 stored=int8"), (3, 1, 2), (10**4,)),
    ]


def draws() -> dict[str, Array]:
    """Settings (S,) and logits (S, 7) of the sampling draws: multiples of a half, so that ties are frequent."""
    count = len(TEMPERATURES) * len(TOP_K)

    def cycle(values: tuple[float, ...], dtype: DTypeLike, repeat: int = 1) -> Array:
        return np.resize(np.repeat(np.array(values, dtype), repeat), count)

    return {
        "sampling.logits": np.random.default_rng(14).normal(0, 2, (count, CHOICES)).round() / 2,
        "sampling.temperature": cycle(TEMPERATURES, np.float64),
        "sampling.top_k": cycle(TOP_K, np.int64),
        "sampling.seed": cycle(SEEDS, np.uint64),
        "sampling.position": cycle(DRAWN_AT, np.uint64, repeat=len(SEEDS)),
        "sampling.row": cycle((0, 1, 2, 3), np.uint64),
    }


def observe(model: Model, vector: Vector) -> dict[str, Array]:
    """What a model computes of a vector, under the vectors' names, in the specification's order."""
    _, slopes = model.gradients(vector.tokens, vector.targets)
    seen = model.trace(vector.tokens) | {"loss": np.array(model.loss(vector.tokens, vector.targets))}
    seen |= {f"gradients.{name}": slope for name, slope in slopes._asdict().items()}
    for start in vector.starts:
        seen |= {f"decode.{start}.{name}": value for name, value in decode(model, vector, start).items()}
    return seen


def decode(model: Model, vector: Vector, start: int) -> dict[str, Array]:
    """Logits of the text read piece by piece from ``start`` on, and the states after it (R13)."""
    empty = RecurrentState(start, init_state(vector.batch, vector.config).layers)
    state, logits = model.import_state(empty) if start else model.init_state(vector.batch), []
    for end, length in zip(accumulate(vector.plan), vector.plan, strict=True):
        part, state = model.advance(state, vector.tokens[:, end - length : end])
        logits.append(part)
    memories = model.export_state(state).layers
    return {"logits": np.concatenate(logits, axis=1)} | {f"layers.{i}.state": memory for i, memory in enumerate(memories)}


def in_pairs(judged: Judged) -> Judged:
    """The same with each state judged by pairs of neurons, as NAME_by_pair: see ``by_pair``."""
    vector = judged.vector
    found = {dtype: expect(lambda p: states(p, vector), vector.params, dtype) for dtype in WIDE}

    def expected(name: str, published: Mapping[str, Expectation]) -> Mapping[str, Expectation]:
        if not is_state(name):
            return published
        return {dtype: narrower(published[dtype], found[dtype][paired_name(name)]) for dtype in WIDE}

    return Judged(vector, {paired_name(name): expected(name, by_dtype) for name, by_dtype in judged.expected.items()})


def states(params: Params, vector: Vector) -> dict[str, Array]:
    """The states of every text that the vector decodes, by pairs of neurons."""
    model = Specification(params, vector.config, vector.phase)
    texts = {f"decode.{start}.{name}": v for start in vector.starts for name, v in decode(model, vector, start).items()}
    return {name: value for name, value in paired(texts).items() if name.endswith("_by_pair")}


def narrower(published: Expectation, found: Expectation) -> Expectation:
    """A published state by pairs: the tolerance that the rule of all tolerances gives for them, or the published one if less.

    The published one was made neuron by neuron. It holds for pairs as well, because the relative error of a pair is at most
    that of the worse of its neurons, and the rule taken over the runs that it was made from could give no more.
    """
    allowed, slope = min(published.allowed, found.allowed), min(published.allowed_slope, found.allowed_slope)
    return Expectation(by_pair(published.reference), allowed, slope)


def paired(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Tensors by name, each state by pairs of neurons."""
    return {paired_name(name): by_pair(value) if is_state(name) else value for name, value in tensors.items()}


def paired_name(name: str) -> str:
    return f"{name}_by_pair" if is_state(name) else name


def is_state(name: str) -> bool:
    return name.endswith(".state")


def judge(vector: Vector) -> Judged:
    """What today's specification says of a vector, and how far off each dtype may be."""
    by_dtype = {dtype: {**phases(vector, dtype), **computed(vector, dtype), **sampled(vector, dtype)} for dtype in WIDE}
    names = by_dtype["float64"]
    return Judged(vector, {name: {dtype: by_dtype[dtype][name] for dtype in WIDE} for name in names})


def phases(vector: Vector, dtype: str) -> dict[str, Expectation]:
    """The frequency table (N,), to the bit, and cosines and sines (1, P, N) at long positions (R4)."""
    table = frequencies(vector.config.n_neurons)
    turned, rounded = (rotations(vector, d) for d in (np.float64, np.float32))
    expected = {"frequencies": Expectation(table.astype(np.float64), 0.0, 0.0)}
    for name, reference in turned.items():
        expected[name] = (
            Expectation(reference, FLOAT64, FLOAT64)
            if dtype == "float64"
            else honest(reference, [rounded[name].astype(np.float64)], dtype)
        )
    return expected


def rotations(vector: Vector, dtype: DTypeLike) -> dict[str, Array]:
    """Cosine and sine of the phases at ``phases.positions``, each (1, P, N): one row a position."""
    each = [
        rotation(int(position), 1, frequencies_of(vector.config), dtype, vector.phase)
        for position in vector.inputs["phases.positions"]
    ]
    cos, sin = (np.concatenate(side)[None] for side in zip(*each, strict=True))
    return {"phases.cos": cos, "phases.sin": sin}


def computed(vector: Vector, dtype: str) -> dict[str, Expectation]:
    """Everything that weights and tokens go into (R1 to R13, R15)."""
    return expect(lambda params: observe(Specification(params, vector.config, vector.phase), vector), vector.params, dtype)


def sampled(vector: Vector, dtype: str) -> dict[str, Expectation]:
    """Uniform draws (S,), to the bit in float64, and the tokens (S,) that they choose (R14)."""
    names = ("logits", "temperature", "top_k", "seed", "position", "row")
    lines = list(zip(*(vector.inputs[f"sampling.{name}"] for name in names), strict=True))
    uniforms = [uniform(int(seed), int(position), int(row)) for *_, seed, position, row in lines]
    tokens = [
        sample(logits, draw, Sampling(temperature, int(top_k), int(seed)))
        for (logits, temperature, top_k, seed, *_), draw in zip(lines, uniforms, strict=True)
    ]
    rounding = 0.0 if dtype == "float64" else FLOOR
    return {
        "sampling.uniforms": Expectation(np.array(uniforms), rounding, rounding),
        "sampling.tokens": Expectation(np.array(tokens, np.int64), 0.0, 0.0),
    }


def write(judged: Judged, folder: Path) -> None:
    """Write a case: tensors, case.txt for readers without JSON, and last the manifest, which seals the rest."""
    folder.mkdir(parents=True)
    inputs, expected = dict(judged.vector.inputs), values(judged)
    write_safetensors(folder / "inputs.safetensors", inputs, {})
    write_safetensors(folder / "expected.safetensors", expected, {})
    (folder / "case.txt").write_bytes(as_lines(judged).encode())
    (folder / "manifest.json").write_bytes((json.dumps(manifest(judged, folder), indent=1) + "\n").encode())


def values(judged: Judged) -> dict[str, Array]:
    """The expected tensors as they are stored: float64, the frequency table float32, tokens int64."""
    stored = {name: by_dtype["float64"].reference for name, by_dtype in judged.expected.items()}
    return stored | {"frequencies": stored["frequencies"].astype(np.float32)}


def manifest(judged: Judged, folder: Path) -> dict[str, Any]:
    """Everything about a case but the numbers."""
    vector, expected = judged.vector, {name: describe(name, value) for name, value in values(judged).items()}
    for name, about in expected.items():
        about["tolerance"] = {
            dtype: {"row": found.allowed, "slope": found.allowed_slope} for dtype, found in judged.expected[name].items()
        }
    files = ("case.txt", "inputs.safetensors", "expected.safetensors")
    return {
        "schema": SCHEMA,
        "spec_version": SPEC_VERSION,
        "suite_version": bdh_spec.__version__,
        "name": vector.name,
        "config": vector.config.as_dict(),
        "n_neurons": vector.config.n_neurons,
        "phase": vector.phase,
        "batch": vector.batch,
        "time": vector.time,
        "made_from": vector.origin,
        "decode": {"starts": vector.starts, "plan": vector.plan},
        "layout": "row-major, little-endian, no header, no padding",
        "files": {name: sha256((folder / name).read_bytes()) for name in files},
        "inputs": {name: describe(name, value) for name, value in vector.inputs.items()},
        "expected": expected,
    }


def describe(name: str, value: Array) -> dict[str, Any]:
    """Shape, dtype, raw file and the SHA-256 of the bytes of a tensor."""
    suffix = suffix_of(value)
    raw = f"raw/{name}.{suffix}"
    return {"dtype": suffix, "shape": value.shape, "raw": raw, "sha256": sha256(as_bytes(value))}


def as_lines(judged: Judged) -> str:
    """case.txt: a word, its values, a line each."""
    vector, inputs = judged.vector, judged.vector.inputs
    sizes = {
        "schema": SCHEMA,
        "name": vector.name,
        **vector.config.as_dict(),
        "n_neurons": vector.config.n_neurons,
        "phase": vector.phase,
        "batch": vector.batch,
        "time": vector.time,
        "positions": len(inputs["phases.positions"]),
        "draws": len(inputs["sampling.logits"]),
        "choices": inputs["sampling.logits"].shape[1],
    }
    lines: list[tuple[object, ...]] = list(sizes.items())
    lines += [("decode", start, *vector.plan) for start in vector.starts]
    lines += [("input", name, suffix_of(value), *value.shape) for name, value in inputs.items()]
    lines += [("expected", name, suffix_of(value), *value.shape) for name, value in values(judged).items()]
    return "".join(" ".join(map(str, line)) + "\n" for line in lines)


def read(folder: Path) -> Judged:
    """A case from its folder, every byte of it checked against the manifest."""
    with reading(folder):
        return _read(folder, read_manifest(folder))


def _read(folder: Path, about: Mapping[str, Any]) -> Judged:
    for name, digest in about["files"].items():
        if not (folder / name).is_file() or sha256((folder / name).read_bytes()) != digest:
            raise VectorsError(f"{folder / name} is not what its manifest sealed: export the vectors again")
    inputs, _ = read_safetensors(folder / "inputs.safetensors")
    references, _ = read_safetensors(folder / "expected.safetensors")
    config = BDHConfig.from_dict(about["config"])
    if f"layers.{config.n_layer - 1}.x" not in about["expected"]:
        raise VectorsError(f"{folder} expects nothing of the last of {config.n_layer:,} layers: export the vectors again")
    if about["phase"] not in PHASES:
        raise VectorsError(f"{folder} has phase {about['phase']!r}: phases are {' or '.join(PHASES)}")
    vector = Vector(
        config,
        about["batch"],
        about["time"],
        name=about["name"],
        phase=about["phase"],
        starts=tuple(about["decode"]["starts"]),
        plan=tuple(about["decode"]["plan"]),
        origin=about["made_from"],
        inputs=inputs,
        stored="int8" if "params.embed.scale" in inputs else "float",
    )
    expected = {
        name: tolerances(references[name].reshape(told["shape"]), told["tolerance"])  # safetensors made the scalar an axis of 1
        for name, told in about["expected"].items()
    }
    return Judged(vector, expected)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a case says of itself, if this suite can read it."""
    try:
        about = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise VectorsError(f"{folder} has no manifest that can be read ({error}): export the vectors again") from None
    schema = about.get("schema") if isinstance(about, dict) else None
    if schema != SCHEMA:
        raise VectorsError(f"{folder} has schema {shown(repr(schema), 80)}, this suite reads {SCHEMA}: export with this suite")
    return dict(about)


def tolerances(reference: Array, told: Mapping[str, Mapping[str, float]]) -> dict[str, Expectation]:
    """What a port of each dtype must compute, as the manifest tells it."""
    return {dtype: Expectation(reference.astype(np.float64), limits["row"], limits["slope"]) for dtype, limits in told.items()}


def case_folders(vectors: Path) -> list[Path]:
    """The cases of a set, the smallest first: what is wrong everywhere is best looked at there."""
    found = [path.parent for path in vectors.glob("*/manifest.json")]
    if not found:
        raise VectorsError(f"{vectors} holds no vectors: write them there with bdh-conform vectors export")
    return sorted(found, key=lambda folder: (sum(path.stat().st_size for path in folder.iterdir()), folder.name))


def versions() -> list[str]:
    """The published sets."""
    return sorted(path.name for path in PUBLISHED.iterdir())


def export(target: Path, version: str = VERSION) -> list[str]:
    """Copy a published set to a new folder and unpack every tensor into a raw file; the names of the cases."""
    if version not in versions():
        raise VectorsError(f"no vectors {version!r} are published: there are {', '.join(versions())}")
    folders = case_folders(PUBLISHED / version)
    with new_folder(target) as part:
        for folder in folders:
            read(folder)
            unpack(stored(folder), part / folder.name / "raw")
            for source in sorted(folder.iterdir()):
                (part / folder.name / source.name).write_bytes(source.read_bytes())
    return [folder.name for folder in folders]


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to fill: it takes the name at the end, or vanishes if anything went wrong."""
    demand_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    try:
        part.mkdir()
        with held(part):
            yield part
            for path in (*part.rglob("*"), part):
                sync(path)
            part.rename(target)
    except OSError as error:
        raise VectorsError(f"{target} could not be written ({error.strerror or error}): nothing was left there") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def demand_new(target: Path) -> None:
    """Refuse a folder in which something is: old outputs or vectors would be judged with the new."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise VectorsError(f"{target} exists: name a new or an empty folder")


def export_cases(target: Path, texts: Sequence[str]) -> list[str]:
    """Write vectors of any cases, such as ``B1 T2 L2 h2 D4 m4 V7 seed=7``, from today's specification; their names."""
    cases = [Case.parse(text) for text in texts]
    vectors = [fresh(f"case_{i}", case, ragged(case.time), (0, 2**24 + 1)) for i, case in enumerate(cases, 1)]
    with new_folder(target) as part:
        for vector in vectors:
            write(judge(vector), part / vector.name)
            unpack(stored(part / vector.name), part / vector.name / "raw")
    return [vector.name for vector in vectors]


def ragged(time: int) -> tuple[int, ...]:
    """A text in pieces of one, three, one, three, ... tokens."""
    pieces = [length for _ in range(time) for length in (1, 3)]
    ends = [end for end in accumulate(pieces) if end < time]
    return tuple(end - start for start, end in pairwise([0, *ends, time]))


def publish(target: Path, cases: Callable[[], Iterable[Vector]] = specimens) -> None:
    """Write a new set from today's specification, without raw files: export unpacks them."""
    with new_folder(target) as part:
        for vector in cases():
            write(judge(vector), part / vector.name)


def stored(folder: Path) -> dict[str, Array]:
    """All tensors of a case, inputs and expected, in the dtypes of their files."""
    return read_safetensors(folder / "inputs.safetensors")[0] | read_safetensors(folder / "expected.safetensors")[0]


def unpack(tensors: Mapping[str, Array], folder: Path) -> None:
    """One raw file a tensor."""
    folder.mkdir(parents=True)
    for name, value in tensors.items():
        (folder / f"{name}.{suffix_of(value)}").write_bytes(as_bytes(value))


def suffix_of(value: Array) -> str:
    """The ending of a raw file: the kind and the bits of its numbers."""
    return f"{value.dtype.kind}{8 * value.dtype.itemsize}"


def as_bytes(value: Array) -> bytes:
    return np.ascontiguousarray(value, SUFFIXES[suffix_of(value)]).tobytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
