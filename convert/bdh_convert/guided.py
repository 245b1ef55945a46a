"""The fuzzer under the guidance of coverage, as the child process that ``bdh_convert.fuzz --guided`` starts."""

from __future__ import annotations

import json
import random
import sys
import time
import types
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import atheris

from bdh_convert import fuzz

MODULES = (
    "bdh_convert.",
    "bdh_spec.",
    "bdh_conformance.files.",
    "zipfile",
    "json.decoder",
    "pickletools",
    "numpy.lib._format_impl",
)
EVERY = 1.0  # seconds between two reports


def main() -> None:
    """Fuzz one reader until its runs or its time are over."""
    name, told, runs, start, seconds = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    warnings.simplefilter("ignore")
    reader, figures, values = fuzz.readers()[name], fuzz.Figures(), fuzz.made_up(start)
    due = 0.0
    with fuzz.sound(reader, told.parent) as (file, path):
        data = file.read_bytes()

        def mutated(held: bytes, most: int, drawn_from: int) -> bytes:
            change = fuzz.drawn(random.Random(drawn_from), values)
            try:
                return reader.mutate(held, change)[:most]
            except Exception:  # noqa: BLE001  what is no longer of its kind has no structure to change
                return reader.mutate(data, change)[:most]

        def once(held: bytes) -> None:
            nonlocal due
            known = len(figures.faults)
            file.write_bytes(held)
            fuzz.attempt(reader, path, figures)
            if time.monotonic() > due or figures.runs == runs or len(figures.faults) > known:
                told.write_text(json.dumps(asdict(figures)))
                due = time.monotonic() + EVERY

        for function in functions():
            with suppress(Exception):  # what has no code of its own is not followed
                atheris.instrument_func(function)
        corpus = path.parent / ".corpus"
        corpus.mkdir()
        (corpus / "sound").write_bytes(data)
        limits = [f"-runs={runs}", f"-max_total_time={seconds}", f"-max_len={2 * len(data) + 4096}", f"-seed={start + 1}"]
        atheris.Setup([sys.argv[0], *limits, "-verbosity=0", str(corpus)], once, custom_mutator=mutated)
        atheris.Fuzz()


def functions() -> Iterator[Any]:
    """What coverage is measured of: the readers, and those parts of the libraries below them that are written in Python."""
    for name, module in sorted(sys.modules.items()):
        if name.startswith(MODULES) and name not in (__name__, fuzz.__name__):
            for held in list(vars(module).values()):
                inside = vars(held).values() if isinstance(held, type) and held.__module__ == name else ()
                yield from (
                    each for each in (held, *inside) if isinstance(each, types.FunctionType) and each.__module__ == name
                )


if __name__ == "__main__":
    main()
