"""Mutated files for every reader, as long as you like: ``python -m bdh_convert.fuzz pt --runs 20000``.

A sound file is changed at random, byte by byte and in its structure: entries of archives with a right checksum, headers with
a right length, configurations and pickles of values that Hypothesis makes up. Whatever a reader then does is fine if it reads
the file or refuses it by an error of this project, soon, in little memory, runs nothing and writes nothing. With ``--guided``
the same changes are made to whatever reached new code before, by atheris. Hypothesis comes with the extra ``conformance``,
atheris from PyPI. Other packages add readers by the entry-point group ``bdh_spec.fuzzed``: the file that is changed, what makes
it, and what reads it.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bdh_convert import pickle_file
from bdh_convert.checkpoint import open_checkpoint
from bdh_convert.convert import Settings, convert
from bdh_convert.inspect import report
from bdh_convert.steps import Wishes
from bdh_convert.tensors import Tensor
from bdh_spec import checkpoint
from bdh_spec.config import BDHConfig
from bdh_spec.errors import BDHError
from bdh_spec.int8 import rounded
from bdh_spec.model import init_state
from bdh_spec.params import fingerprint, init

CONFIG = BDHConfig(n_layer=1, n_embd=4, n_head=2, mlp_internal_dim_multiplier=2, vocab_size=5)
PARAMS = init(CONFIG, np.random.default_rng(7))
MOST_SECONDS, MOST_BYTES = 1.0, 64 << 20
WITNESS = "executed"  # a folder that a payload would make

Mutate: TypeAlias = Callable[[bytes, "Change"], bytes]


class Payload:
    """What runs if it is ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (WITNESS,)


@dataclass(frozen=True)
class Change:
    """What Hypothesis makes up: where and how to edit, and a value to put in the place of another."""

    edits: list[tuple[float, int, bytes]]
    value: Any
    structured: bool


@dataclass(frozen=True)
class Reader:
    """A sound file, the ways to change it, and what reads it."""

    file: str  # the one that is changed
    make: Callable[[Path], object]
    mutate: Mutate
    use: Callable[[Path], object]


KEYS = ["config", "n_layer", "model", "shape"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 20)
    | st.floats()
    | st.text(max_size=20)
    | st.just(5000).map(lambda digits: 10**digits)
    | st.sampled_from(["\x1b[2J", "float32", "bdh", "1.0", "F32", "../x", [2, 4, 4], [0, 128]]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner),
    max_leaves=8,
)
IN_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # a disk takes longer than a reader
MADE_UP = 200  # values that Hypothesis makes up, to be used again and again: it takes far longer than a reader


def made_up(start: int) -> list[Any]:
    """Values of every kind."""
    values: list[Any] = []

    @seed(start)
    @settings(
        max_examples=MADE_UP, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(VALUES)
    def once(value: Any) -> None:
        values.append(value)

    once()
    return values


def drawn(chance: random.Random, values: list[Any]) -> Change:
    """One change."""
    edits = [
        (chance.random(), chance.randrange(6), chance.randbytes(chance.randrange(13))) for _ in range(chance.randint(1, 5))
    ]
    return Change(edits, chance.choice(values), chance.random() < 0.5)


def edited(data: bytes, change: Change) -> bytes:
    """Bytes flipped, written over, put in, left out, doubled or cut off."""
    for where, kind, more in change.edits:
        at = int(where * len(data))
        after = {
            0: bytes([data[at] ^ (more or b"\x01")[0]]) + data[at + 1 :] if at < len(data) else b"",
            1: more + data[at + len(more) :],
            2: more + data[at:],
            3: data[at + len(more) :],
            4: data[max(0, at - 16) :],
            5: b"",
        }[kind if kind < 5 or len(more) > 9 else 1]
        data = data[:at] + after
    return data


def replaced(tree: Any, change: Change) -> Any:
    """A JSON value with one of its parts put in place of another."""
    where = change.edits[0][0]
    if isinstance(tree, dict) and tree:
        key = list(tree)[int(where * (len(tree) - 1))]
        return {**tree, key: replaced(tree[key], Change([(where * 7 % 1, 0, b"")], change.value, True))}
    if isinstance(tree, list) and tree and where > 0.5:
        return [*tree[:-1], change.value]
    return change.value


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except ValueError:  # a number of more digits than Python likes to write
        return b'{"n_layer": ' + b"9" * 5000 + b"}"


def in_json(data: bytes, change: Change) -> bytes:
    """A changed configuration."""
    return as_json(replaced(json.loads(data), change)) if change.structured else edited(data, change)


def in_safetensors(data: bytes, change: Change) -> bytes:
    """A changed header, of which the file says the right length."""
    if not change.structured:
        return edited(data, change)
    length = int.from_bytes(data[:8], "little")
    text = as_json(replaced(json.loads(data[8 : 8 + length]), change))
    if change.edits[0][1] % 2:
        text = edited(text, change)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def in_zip(data: bytes, change: Change) -> bytes:
    """A changed entry, with the right checksum."""
    if not change.structured:
        return edited(data, change)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = names[int(change.edits[0][0] * (len(names) - 1))] if change.edits[0][1] else names[0]
        for name in names:
            content = old.read(name)
            if name == chosen:
                content = in_pickle(content, change) if name.endswith(".pkl") else edited(content, change)
            new.writestr(name, content)
        new.comment = (
            as_json(replaced(json.loads(old.comment), change)) if old.comment and change.edits[0][1] == 1 else old.comment
        )
    return out.getvalue()


def in_pickle(data: bytes, change: Change) -> bytes:
    """Changed opcodes, or a made-up value or a payload beside the weights, around them or among them."""
    kind = change.edits[0][1]
    if kind < 3:
        return edited(data, change)
    value = pickle.dumps([change.value, Payload()] if kind == 3 else change.value, 2)[2:-1]
    key = b"X\x06\x00\x00\x00config" if kind == 4 else b"X\x07\x00\x00\x00encoder"
    if kind == 5:
        return data[:-2] + key + value + b"u."
    return b"\x80\x02}(X\x05\x00\x00\x00model" + data[2:-1] + key + value + b"u."


def burn_record() -> bytes:
    """A record as burn writes it."""
    out = b"".join(bytes([len(text)]) + text for text in (b"f32", b"i32", b"burn", b"0.19", b"full"))
    for value in PARAMS:
        size = b"\xfb" + struct.pack("<H", value.nbytes)
        out += b"\0\0\x01a" + size + value.tobytes() + bytes([value.ndim, *value.shape]) + b"\x01"
    return out


def dcp_description() -> bytes:
    """The description of a folder of pieces, in the opcodes of its pickle."""

    def made(name: bytes, **fields: bytes) -> bytes:
        state = b"".join(b"X" + struct.pack("<I", len(key)) + key.encode() + value for key, value in fields.items())
        return b"cdcp\n" + name + b"\n)\x81}(" + state + b"ub"

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    kinds, places, at = b"}(", b"}(", 0
    for name, value in named().items():
        none, size = plain((0,) * value.ndim), plain(value.shape)
        chunks = b"](" + made(b"Chunk", offsets=none, sizes=size) + b"e"
        kinds += plain(name) + made(b"Tensor", properties=made(b"P", dtype=b"ctorch\nfloat32\n"), size=size, chunks=chunks)
        length = len(piece(value))
        where = made(b"Info", relative_path=plain("__0_0.distcp"), offset=plain(at), length=plain(length))
        places += made(b"Index", fqn=plain(name), offset=none) + where
        at += length
    return b"\x80\x02" + made(b"Metadata", state_dict_metadata=kinds + b"u", storage_data=places + b"u") + b"."


def named() -> dict[str, np.ndarray[Any, Any]]:
    weights = PARAMS._asdict()
    return {"embed.weight": weights.pop("embed"), **weights}


def piece(value: np.ndarray[Any, Any]) -> bytes:
    """One tensor as torch.save writes it, for a file of pieces."""
    state = pickle_file.pickled([Tensor.of("t", value)])
    start = state.index(b"ctorch._utils")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + state[start:-2] + b".")
        archive.writestr("archive/data/0", value.tobytes())
    return out.getvalue()


def converted(target: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        checkpoint.save(path.parent / "source.safetensors", PARAMS, CONFIG)
        convert(path.parent / "source.safetensors", target, path, Settings(verify=False))

    return make


def make_folder_of_pieces(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG.as_dict()))
    (path / "__0_0.distcp").write_bytes(b"".join(map(piece, named().values())))
    (path / ".metadata").write_bytes(dcp_description())


def make_burn(path: Path) -> None:
    path.write_bytes(burn_record())
    (path.parent / "config.json").write_text(json.dumps(CONFIG.as_dict() | {"rotary_embedding": "rope"}))


def make_canonical_int8(path: Path) -> None:
    checkpoint.save(path, rounded(PARAMS), CONFIG)


def make_state(path: Path) -> None:
    checkpoint.save_state(path, init_state(1, CONFIG), CONFIG, fingerprint(PARAMS), np.zeros((1, 2), np.int64))


def use_checkpoint(path: Path) -> None:
    """Read it in both ways: what one refuses the other has to describe."""
    problem: BDHError | None = None
    try:
        for weight in open_checkpoint(path, Wishes(n_layer=1)).weights:
            weight.load()
    except BDHError as error:
        problem = error
    found = json.dumps(report(path))
    if not found.isprintable() or len(found) > 200_000:
        raise AssertionError(f"a report of {len(found):,} characters")
    if problem:
        raise problem


def use_canonical(path: Path) -> None:
    checkpoint.read(path)


def use_state(path: Path) -> None:
    checkpoint.read_state(path, CONFIG, fingerprint(PARAMS))


READERS = {
    "safetensors": Reader("m.safetensors", converted("torch"), in_safetensors, use_checkpoint),
    "pt": Reader("m.pt", converted("torch"), in_zip, use_checkpoint),
    "npz": Reader("m.npz", converted("mlx"), in_zip, use_checkpoint),
    "burn": Reader("m.bin", make_burn, edited, use_checkpoint),
    "hf": Reader("m/model.safetensors", converted("hf"), in_safetensors, use_checkpoint),
    "hf-config": Reader("m/config.json", converted("hf"), in_json, use_checkpoint),
    "dcp": Reader("m/.metadata", make_folder_of_pieces, in_pickle, use_checkpoint),
    "dcp-pieces": Reader("m/__0_0.distcp", make_folder_of_pieces, edited, use_checkpoint),
    "int8": Reader("m.safetensors", converted("int8"), in_safetensors, use_checkpoint),
    "canonical-int8": Reader("c.safetensors", make_canonical_int8, in_safetensors, use_canonical),
    "state": Reader("s.safetensors", make_state, in_safetensors, use_state),
    "canonical": Reader("c.safetensors", lambda path: checkpoint.save(path, PARAMS, CONFIG), in_safetensors, use_canonical),
}


@dataclass
class Figures:
    """What came of the runs."""

    runs: int = 0
    read: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds of the processor, so that a busy machine accuses nobody
    grown: int = 0  # bytes by which the peak of the process rose at most
    faults: Counter[str] = field(default_factory=Counter)  # by where they came from

    def line(self, name: str) -> str:
        return (
            f"{name}: {self.runs:,} runs, {self.read:,} read, {self.refused:,} refused, {sum(self.faults.values()):,} faults;"
            f" slowest {self.slowest * 1000:.0f} ms, memory +{self.grown / 2**20:.0f} MB"
        )


def fuzz(name: str, runs: int, start: int = 0, seconds: float = math.inf) -> Figures:
    """Change a reader's file ``runs`` times, or as long as ``seconds`` last, and read it each time."""
    return fuzzed(readers()[name], runs, start, seconds)


def fuzzed(reader: Reader, runs: int, start: int = 0, seconds: float = math.inf) -> Figures:
    """The same of any reader."""
    figures = Figures()
    with sound(reader) as (file, path):
        data, values, chance = file.read_bytes(), made_up(start), random.Random(start)
        end = time.monotonic() + seconds
        for change in (drawn(chance, values) for _ in range(runs)):
            file.write_bytes(reader.mutate(data, change))
            attempt(reader, path, figures)
            if time.monotonic() > end:
                break
    return figures


@contextmanager
def sound(reader: Reader, within: Path | None = IN_MEMORY) -> Iterator[tuple[Path, Path]]:
    """A file that is sound, and the path by which it is read, in a folder where nothing else may appear."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(dir=within) as folder:
        file, path = Path(folder) / reader.file, Path(folder) / reader.file.split("/")[0]
        reader.make(path)
        reader.use(path)
        os.chdir(folder)
        try:
            yield file, path
        finally:
            os.chdir(here)


def readers() -> dict[str, Reader]:
    """Ours, and those that other packages name."""
    others = {point.name: point.load() for point in entry_points(group="bdh_spec.fuzzed")}
    return READERS | {name: of_others(*parts) for name, parts in sorted(others.items())}


def of_others(file: str, make: Callable[[Path], object], use: Callable[[Path], object]) -> Reader:
    """A reader of another package; how to change its file shows in the name."""
    return Reader(file, make, {".json": in_json, ".safetensors": in_safetensors}.get(Path(file).suffix, edited), use)


def attempt(reader: Reader, path: Path, figures: Figures) -> None:
    """Read a file once and count what comes of it."""
    figures.runs += 1
    there = listing()
    begun, before = time.process_time(), peak()
    try:
        reader.use(path)
        figures.read += 1
    except BDHError as error:
        figures.refused += 1
        if not str(error).isprintable() or len(str(error)) > 1000:
            figures.faults[f"a sentence of {len(str(error)):,} characters"] += 1
    except Exception as error:  # noqa: BLE001  this is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        figures.faults[f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:100]!r}"] += 1
    took = time.process_time() - begun
    figures.slowest, figures.grown = max(figures.slowest, took), max(figures.grown, peak() - before)
    if took > MOST_SECONDS:
        figures.faults["more than a second"] += 1
    if listing() != there:
        figures.faults["a payload was executed, or something was written"] += 1
        for made in listing() - there:
            Path(made).rmdir() if Path(made).is_dir() else Path(made).unlink()


def listing() -> set[str]:
    """What is in the working folder."""
    return set(os.listdir())  # noqa: PTH208  names are all that is wanted, thousands of times a second


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


@click.command()
@click.argument("names", nargs=-1, metavar="[READER]...")
@click.option("--runs", default=20_000, show_default=True, help="How many files for each reader.")
@click.option("--seed", "start", default=0, show_default=True, help="Other seeds make other files.")
@click.option("--guided", is_flag=True, help="Let coverage guide the changes; needs atheris.")
@click.option("--seconds", type=int, help="Go on to the next reader after this long.")
def command(names: tuple[str, ...], runs: int, start: int, guided: bool, seconds: int | None) -> None:
    """Read mutated files with each READER, or with all, and exit 1 if one does anything but read or refuse them."""
    warnings.simplefilter("ignore")
    if unknown := [name for name in names if name not in readers()]:
        raise click.UsageError(f"no reader is named {unknown[0]!r}: there are {', '.join(readers())}")
    if guided and find_spec("atheris") is None:
        raise click.UsageError("--guided needs atheris: pip install atheris")
    failed = False
    for name in names or readers():
        begun = time.monotonic()
        figures = guide(name, runs, start, seconds) if guided else fuzz(name, runs, start, seconds or math.inf)
        failed = failed or bool(figures.faults) or figures.grown > MOST_BYTES or not figures.runs
        click.echo(f"{figures.line(name)}; {figures.runs / (time.monotonic() - begun):,.0f} a second")
        for fault, times in figures.faults.most_common(10):
            click.echo(f"  {times:,} times {fault}")
    sys.exit(failed)


def guide(name: str, runs: int, start: int, seconds: int | None) -> Figures:
    """Change a reader's file under the guidance of coverage, in a process of its own, which ends when its fuzzer likes."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:  # also for the child, which leaves without tidying up
        told = Path(folder) / "figures.json"
        words = [name, str(told), str(runs), str(start), str(seconds or 0)]
        done = subprocess.run([sys.executable, "-m", "bdh_convert.guided", *words], capture_output=True, text=True, check=False)
        found = json.loads(told.read_text()) if told.exists() else {}
    figures = Figures(**found | {"faults": Counter(found.get("faults", {}))})
    if done.returncode:
        figures.faults[f"the process ended with {done.returncode}: {done.stderr[-300:]!r}"] += 1
    return figures


if __name__ == "__main__":
    command()
