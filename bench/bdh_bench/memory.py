"""Whether decoding takes the same memory at every position: the peaks of a process with the embedded model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
from rich.table import Table

from bdh_bench import machine
from bdh_bench.sides import find_port
from bdh_bench.worker import Worker
from bdh_spec import RecurrentState, read

FAR = 100_000
FEW = 50
SECONDS = 600.0


def memory(ports: Sequence[str], more: int) -> Table:
    """Megabytes before, after a few tokens at position 10 and at a far one, and after many more."""
    table = Table("port", "MB before", "at 10", f"at {FAR:,}", f"{more:,} tokens later")
    for port in ports:
        with Worker(peaks, port, more) as worker:
            table.add_row(port, *(f"{peak / 2**20:.1f}" for peak in worker.answer(time.monotonic() + SECONDS)))
    return table


def peaks(pipe: Connection, port: str, more: int) -> None:
    """Send the peaks of this process."""
    model = find_port(port).load(*read(), device="cpu")
    _, state = model.advance(model.init_state(1), np.frombuffer(b"The dragon", np.uint8)[None])
    far = model.import_state(RecurrentState(FAR, model.export_state(state).layers))
    found = [machine.most_so_far()]
    for start, tokens in ((state, FEW), (far, FEW), (far, more)):
        here = model.import_state(model.export_state(start))
        for _ in model.stream(b"x", tokens, seed=1, state=here):
            pass
        found.append(machine.most_so_far())
    pipe.send(found)
