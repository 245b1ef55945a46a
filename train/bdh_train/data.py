"""Text to learn from: files that stay on the disk, read as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bdh_spec.params import Array
from bdh_train.config import TrainConfig, TrainError
from bdh_train.records import SUFFIXES, extracted, named_on_the_hub

BETWEEN = np.frombuffer(b"\n", np.uint8)  # of two documents
PROBES, PROBE = 256, 1 << 16  # places that a fingerprint looks at, and bytes at each
VAL_SHARE = 10  # one part of this many is held out


@dataclass(frozen=True)
class Text:
    """Bytes that lie in many places, as one array: memory-mapped, so that they may be more than memory holds."""

    parts: tuple[Array, ...]

    @cached_property
    def ends(self) -> Array:
        return np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def read(self, start: int, length: int) -> Array:
        """``length`` bytes from ``start`` on."""
        i, pieces = int(np.searchsorted(self.ends, start, side="right")), []
        offset = start - int(self.ends[i]) + len(self.parts[i])
        while length:
            pieces.append(self.parts[i][offset : offset + length])
            i, offset, length = i + 1, 0, length - len(pieces[-1])
        return np.concatenate(pieces)

    def cut(self, start: int, stop: int) -> Text:
        """The bytes from start up to stop, still where they lie."""
        kept, begin = [], 0
        for part in self.parts:
            kept.append(part[max(start - begin, 0) : max(stop - begin, 0)])
            begin += len(part)
        return Text(tuple(part for part in kept if len(part)))

    def fingerprint(self) -> str:
        """The SHA-256 of the length and of the bytes: all of them up to 16 MB, of more at as many places."""
        digest, n = hashlib.sha256(str(len(self)).encode()), len(self)
        starts = range(0, n, PROBE) if n <= PROBES * PROBE else np.linspace(0, n - PROBE, PROBES).astype(np.int64).tolist()
        for start in starts:
            digest.update(self.read(start, min(PROBE, n - start)).tobytes())
        return digest.hexdigest()


def open_data(config: TrainConfig, folder: Path) -> tuple[Text, Text]:
    """What to train on, and what to measure on. Texts of records are written to ``folder`` once, and read from there."""
    whole = gather(config.data, config, folder / "data")
    if config.val:
        training, held_out = whole, gather(config.val, config, folder / "val")
    else:
        border = len(whole) - len(whole) // VAL_SHARE
        training, held_out = whole.cut(0, border), whole.cut(border, len(whole))
    for text, what in ((training, "to train on"), (held_out, "held out")):
        if len(text) <= config.longest:
            which = "long-block-size" if config.long_block_size else "block-size"
            raise TrainError(
                f"{len(text):,} bytes are {what}, and a window of {which.replace('-', '_')} takes {config.longest + 1:,}:"
                f" give more text, a smaller --{which}" + (" or --val" if what == "held out" and not config.val else "")
            )
    return training, held_out


def gather(names: Sequence[str], config: TrainConfig, folder: Path) -> Text:
    """All documents under these names, in the order of the names, or in a random one."""
    documents = list(find(names, config, folder))
    if config.shuffle_documents:
        order = np.random.Generator(np.random.Philox(key=config.seed)).permutation(len(documents))
        documents = [documents[i] for i in order]
    parts = [part for document in documents if len(document) for part in (document, BETWEEN)]
    if not parts:
        raise TrainError(f"{', '.join(names)} holds no text: name a file that is not empty")
    return Text(tuple(parts[:-1]))


def find(names: Sequence[str], config: TrainConfig, folder: Path) -> Iterator[Array]:
    """The documents under each name: files as they are, records as the text that their fields make."""
    for number, name in enumerate(names):
        path = Path(name)
        if not path.exists():
            yield from extracted(named_on_the_hub(name), config, folder / f"{number}.bin")
        for file in files_of(path):
            if file.suffix.lower() in SUFFIXES:
                stem = "-".join(file.relative_to(path).parts) if path.is_dir() else file.name
                yield from extracted(file, config, folder / f"{number}-{stem}.bin")
            else:
                yield mapped(file)


def files_of(path: Path) -> list[Path]:
    """A file; or all files in a folder and below, by name, but for hidden ones."""
    if not path.is_dir():
        return [path] if path.exists() else []
    inside = (file for file in sorted(path.rglob("*")) if file.is_file())
    return [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def mapped(path: Path) -> Array:
    """The bytes of a file, which stay there until they are read."""
    try:
        if not path.is_file():
            raise TrainError(f"{path} is no regular file: save its text first")
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    except OSError as error:
        raise TrainError(f"{path} cannot be read ({error.strerror}): check it") from None
