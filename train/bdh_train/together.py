"""A run on several processes or devices: what they share, and that one of them writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bdh_spec import BDHConfig, Params, Spread, Team
from bdh_train.checkpoint import Checkpoint
from bdh_train.config import TrainConfig, TrainError
from bdh_train.run_folder import RunFolder, working_in


def spread_of(config: TrainConfig, team: Team) -> Spread | None:
    """How the model lies on the processes of a team, or on devices of one process; None where nothing is shared."""
    neurons, what = config.neuron_parallel, "processes" if team.places == team.size else "their devices"
    data = config.data_parallel or max(team.places // neurons, 1)
    if team.size > 1 and data * neurons != team.places:
        raise TrainError(
            f"data_parallel {data} x neuron_parallel {neurons} is not {team.places}, the number of {what}: start as many,"
            " or leave data_parallel out"
        )
    if config.batch_size % data:
        raise TrainError(f"batch_size is {config.batch_size}, which does not divide among {data}: give a multiple")
    if config.rows(config.longest) % data:
        raise TrainError(
            f"{config.rows(config.longest)} windows of long_block_size are in a batch, which do not divide among {data}: give a"
            " larger --batch-size, or a smaller --long-block-size"
        )
    spread = Spread(data, neurons, config.shard_weights)
    return spread if spread.size > 1 else None


@contextmanager
def folder_for(path: Path, resume: bool, team: Team) -> Iterator[RunFolder]:
    """The folder of a run, in which the first process works and the others look on."""
    if not team.is_first:
        yield Onlooker(path)
        return
    with working_in(path, resume) as folder:
        yield folder


@contextmanager
def in_turn(team: Team) -> Iterator[None]:
    """What the first process does before the others do, who then find what it has written."""
    if not team.is_first:
        team.wait()
    yield
    if team.is_first:
        team.wait()
    team.wait()  # until the others have read it


class Onlooker(RunFolder):
    """The folder of a run for a process that reads there and writes nothing."""

    def clear(self) -> None: ...

    def clear_parts(self) -> None: ...

    def write(self, path: Path, text: str) -> None: ...

    def begin(self, config: TrainConfig) -> None: ...

    def rewind(self, step: int) -> None: ...

    def note(self, line: dict[str, Any]) -> None: ...

    def keep_best(self, step: int, params: Params, config: BDHConfig) -> None: ...

    def save(self, found: Checkpoint, config: BDHConfig, keep: int) -> Path:
        return self.checkpoint(found.progress.step)
