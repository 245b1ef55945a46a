"""What a run found, and the form in which ``--json`` writes it.

A file is one object. Keys stay; new ones may come.

    schema      1
    machine     what a figure depends on: cpu, cores, memory, versions, settings of the environment
    config      the six numbers of the model
    settings    rounds, max_seconds, seed, rows asked for
    limits      one object per port and dtype: port, dtype, device, flops (of the best square product, a second), copy (bytes
                read and written, a second), available (bytes free at the start), facts (framework, device, threads)
    rows        one object per row, port and dtype:
        name kind batch length    which row; length counts tokens read, or those before the one that is decoded
        variant                   the width D of a transformers row, how a convert row is checked, or empty
        port dtype device
        needed_flop needed_bytes  what one run cannot do without (bdh_bench.counts), null where nobody counts it
        note                      why there is nothing, or empty
        sides                     one object per side, ours first:
            side                  ours, plain, compiled, again (reads the whole text for each token), bdh_torch or cp
            seconds               of one run, one number per round; empty where the side gave no figure
            first                 seconds of the first run, compilation included, or null
            median                of seconds, or null
            tokens_per_second     or null
            memory                peak bytes above the weights, or null
            of_peak of_copy       needed_flop and needed_bytes over median, as a share of the limits, or null
            error                 of the worst token's logits, or of the worst weight's slopes, against float64, or null
            extrapolated_from     the row that was really run, its seconds scaled by executed FLOP, or null
            note                  why there is no figure, or how it came about; may be empty
            failed                whether the side died, or was ended, or raised an error
        ratios                    by side: of_medians (that side's median over ours: above 1 ours is faster), and low and high,
                                  the quartiles of the ratios of each round
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bdh_bench.rows import Row
from bdh_bench.sides import OURS, BenchError
from bdh_bench.worker import Limits
from bdh_spec import BDHConfig
from bdh_spec.files import shown

SCHEMA = 1


@dataclass
class SideResult:
    """What one side of a row gave."""

    side: str
    seconds: list[float] = field(default_factory=list)
    first: float | None = None
    memory: int | None = None
    error: float | None = None
    extrapolated_from: str | None = None
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Ratio:
    """How many times as long as ours a side takes."""

    of_medians: float
    low: float
    high: float


@dataclass
class RowResult:
    """One row on one port in one dtype."""

    row: Row
    port: str
    dtype: str
    device: str
    sides: list[SideResult] = field(default_factory=list)
    note: str = ""
    needed_flop: int | None = None
    needed_bytes: int | None = None
    limits: Limits | None = None

    @property
    def ours(self) -> SideResult | None:
        return next((side for side in self.sides if side.side == OURS), None)

    @property
    def failed(self) -> bool:
        """Whether the port itself broke; what does not fit or does not exist has not."""
        return self.ours is not None and self.ours.failed

    def ratios(self) -> dict[str, Ratio]:
        """Each other side against ours."""
        ours = self.ours
        if ours is None or not ours.seconds:
            return {}
        return {side.side: ratio(side.seconds, ours.seconds) for side in self.sides if side.seconds and side is not ours}

    def tokens_per_second(self, side: SideResult) -> float | None:
        return self.row.tokens / side.median if side.median and self.row.tokens else None

    def of_peak(self, side: SideResult) -> float | None:
        if not side.median or self.needed_flop is None or self.limits is None:
            return None
        return self.needed_flop / side.median / self.limits.flops

    def of_copy(self, side: SideResult) -> float | None:
        if not side.median or self.needed_bytes is None or self.limits is None:
            return None
        return self.needed_bytes / side.median / self.limits.copy

    def as_json(self) -> dict[str, Any]:
        about = {"name": self.row.name, **asdict(self.row)}
        where = {"port": self.port, "dtype": self.dtype, "device": self.device}
        counts = {"needed_flop": self.needed_flop, "needed_bytes": self.needed_bytes, "note": self.note}
        sides = [self._side(side) for side in self.sides]
        return about | where | counts | {"sides": sides, "ratios": {name: asdict(r) for name, r in self.ratios().items()}}

    def _side(self, side: SideResult) -> dict[str, Any]:
        return {
            "side": side.side,
            "seconds": side.seconds,
            "first": side.first,
            "median": side.median,
            "tokens_per_second": self.tokens_per_second(side),
            "memory": side.memory,
            "of_peak": self.of_peak(side),
            "of_copy": self.of_copy(side),
            "error": side.error if side.error is None or side.error < float("inf") else "not finite",
            "extrapolated_from": side.extrapolated_from,
            "note": "; ".join(side.notes),
            "failed": side.failed,
        }


def ratio(theirs: list[float], ours: list[float]) -> Ratio:
    """Their time over ours: of the medians, and the quartiles over rounds.

    >>> ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])
    Ratio(of_medians=2.0, low=2.0, high=2.5)
    """
    of_medians = statistics.median(theirs) / statistics.median(ours)
    pairs = [a / b for a, b in zip(theirs, ours, strict=False)]
    if len(pairs) < 2:
        return Ratio(of_medians, pairs[0], pairs[0])
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(of_medians, low, high)


def write_json(path: Path, machine: dict[str, str], config: BDHConfig, settings: dict[str, Any], rows: list[RowResult]) -> None:
    """Write all of a run, as the head of this module says."""
    limits = {(r.port, r.dtype): asdict(r.limits) for r in rows if r.limits}
    found = {
        "schema": SCHEMA,
        "machine": machine,
        "config": config.as_dict(),
        "settings": settings,
        "limits": [{"port": port, "dtype": dtype, **values} for (port, dtype), values in limits.items()],
        "rows": [row.as_json() for row in rows],
    }
    path.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


class Found(NamedTuple):
    """What a file holds."""

    machine: dict[str, str]
    config: BDHConfig
    rows: list[RowResult]


def read_json(path: Path) -> Found:
    """What ``write_json`` wrote. BenchError where that is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        limits = {(about.pop("port"), about.pop("dtype")): Limits(**about) for about in found["limits"]}
        rows = [_row(about, limits.get((about["port"], about["dtype"]))) for about in found["rows"]]
        return Found(found["machine"], BDHConfig.from_dict(found["config"]), rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path} is no file that --json of this bdh-bench wrote: {shown(repr(error), 200)}") from error


def _row(about: dict[str, Any], limits: Limits | None) -> RowResult:
    row = Row(about["kind"], about["batch"], about["length"], about.get("variant", ""))
    counts = {name: about[name] for name in ("note", "needed_flop", "needed_bytes")}
    sides = [_read_side(side) for side in about["sides"]]
    return RowResult(row, about["port"], about["dtype"], about["device"], sides, limits=limits, **counts)


def _read_side(side: dict[str, Any]) -> SideResult:
    given = {name: side[name] for name in ("side", "seconds", "first", "memory", "extrapolated_from", "failed")}
    error = float("inf") if side["error"] == "not finite" else side["error"]
    return SideResult(**given, error=error, notes=[side["note"]] if side["note"] else [])
