"""What is measured: the rows of the table, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, get_args

from bdh_spec import BDHError

Kind: TypeAlias = Literal["forward", "prefill", "train", "decode", "transformers", "convert"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LENGTHS = (128, 512, 2048, 8192, 32768)
STEPS = ((2, 256), (4, 512), (1, 2048), (1, 8192))
ACCELERATOR_STEP = (32, 512)  # a batch that fills a GPU
CONTEXTS = (16, 512, 4096, 100_000)
BATCHES = (1, 8, 64)
WIDTHS = (64, 128, 256)  # D of the models whose generate is measured
NEW = 32  # tokens that one generate writes
FILES = ("verified", "unverified")


class RowsError(BDHError, ValueError):
    """A filter that leaves nothing to measure."""


@dataclass(frozen=True)
class Row:
    """One line of the table. ``length`` counts tokens that are read, or those that were before the token that is decoded."""

    kind: Kind
    batch: int = 1
    length: int = 0
    variant: str = ""

    @property
    def name(self) -> str:
        """How the row is asked for.

        >>> Row("train", 4, 512).name, Row("decode", 1, 16).name
        ('train B=4 T=512', 'decode B=1 context=16')
        """
        match self.kind:
            case "forward" | "prefill":
                return f"{self.kind} T={self.length}"
            case "train":
                return f"train B={self.batch} T={self.length}"
            case "decode":
                return f"decode B={self.batch} context={self.length}"
            case "transformers":
                return f"transformers D={self.variant}"
            case "convert":
                return f"convert {self.variant}"

    @property
    def tokens(self) -> int:
        """The tokens of one run, for tokens per second; those of a conversion are none."""
        match self.kind:
            case "decode":
                return self.batch
            case "transformers":
                return NEW
            case "convert":
                return 0
            case _:
                return self.batch * self.length

    def smaller(self) -> Row | None:
        """Half the work, to extrapolate from: fewer tokens, and of a token that is decoded fewer texts."""
        if self.kind == "decode":
            return replace(self, batch=self.batch // 2) if self.batch > 1 else None
        return replace(self, length=self.length // 2) if self.length > 64 else None

    def shorter(self) -> Row | None:
        """Half the text, for a form that reads all of it again for each token."""
        return replace(self, length=self.length // 2) if self.length > 64 else None


def standard(kinds: Sequence[Kind], *, accelerated: bool = False) -> list[Row]:
    """The rows of these kinds, in the order of the table."""
    rows: dict[Kind, list[Row]] = {
        "forward": [Row("forward", 1, T) for T in LENGTHS],
        "prefill": [Row("prefill", 1, T) for T in LENGTHS],
        "train": [Row("train", B, T) for B, T in (*STEPS, *([ACCELERATOR_STEP] if accelerated else []))],
        "decode": [Row("decode", B, T) for B in BATCHES for T in CONTEXTS],
        "transformers": [Row("transformers", 1, NEW, str(D)) for D in WIDTHS],
        "convert": [Row("convert", variant=variant) for variant in FILES],
    }
    return [row for kind in KINDS if kind in kinds for row in rows[kind]]


def chosen(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose names match a pattern, such as ``forward*`` or ``decode B=1 context=16``; all, without patterns."""
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise RowsError(f"no row matches {pattern!r}: there are {', '.join(row.name for row in rows)}")
    return [row for row in rows if not patterns or any(fnmatchcase(row.name, pattern) for pattern in patterns)]
