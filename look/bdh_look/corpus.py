"""A text as labels: of which kinds its bytes are, to ask neurons about. Every label is a rule that anybody can apply again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bdh_look.errors import LookError
from bdh_spec.files import check_readable, reading
from bdh_spec.params import Array

CODE_MARKS = b"()[]{}<>=:;_*/\\|`"
CODE_SHARE = 0.08  # of a line's bytes that are marks of code, from which on the line counts as code


def read_text(path: Path, most: int | None = None) -> bytes:
    """The first bytes of a file, at least two."""
    check_readable(path)
    with reading(path), path.open("rb") as file:
        text = file.read() if most is None else file.read(most)
    if len(text) < 2:
        raise LookError(f"{path} has {len(text)} bytes: nothing can be predicted in less than 2")
    return text


def windows(text: bytes, size: int, batch: int = 4) -> Iterator[Array]:
    """The text in windows (B, size) of a batch at a time, each a text of its own; a last part that fills none is left out.

    >>> [some.shape for some in windows(b"abcdefghij", 3, batch=2)]
    [(2, 3), (1, 3)]
    """
    if not 1 < size <= len(text):
        raise LookError(f"windows of {size} bytes in a text of {len(text)}: choose from 2 to its length")
    whole = np.frombuffer(text, np.uint8)[: len(text) // size * size].reshape(-1, size)
    for start in range(0, len(whole), batch):
        yield whole[start : start + batch]


def labels(text: bytes) -> dict[str, Array]:
    """For each kind of byte whether each byte of the text is of it, (T,) booleans.

    >>> {name: "".join("x" if one else "." for one in where) for name, where in labels(b'To "1"').items()}["word start"]
    'x.....'
    """
    ids = np.frombuffer(text, np.uint8)

    def among(some: bytes) -> Array:
        return np.isin(ids, np.frombuffer(some, np.uint8))

    lower, upper, digit = (ids >= 97) & (ids <= 122), (ids >= 65) & (ids <= 90), (ids >= 48) & (ids <= 57)
    letter = lower | upper
    before = np.concatenate([[False], letter[:-1]])
    return {
        "lower case": lower,
        "upper case": upper,
        "vowel": among(b"aeiouAEIOU"),
        "digit": digit,
        "space": ids == 32,
        "newline": ids == 10,
        "quote": among(b"\"'`"),
        "bracket": among(b"()[]{}<>"),
        "punctuation": among(b".,;:!?"),
        "word start": letter & ~before,
        "inside quotes": inside_quotes(text),
        "line of code": lines_of_code(text),
    }


def inside_quotes(text: bytes) -> Array:
    """Between two double quotes of one line, without the quotes."""
    inside, open_ = np.zeros(len(text), bool), False
    for at, one in enumerate(text):
        if one in b'"\n':
            open_ = one == 34 and not open_
        else:
            inside[at] = open_
    return inside


def lines_of_code(text: bytes) -> Array:
    """In a line of which at least 8% are marks of code."""
    found = np.zeros(len(text), bool)
    start = 0
    for line in text.splitlines(keepends=True):
        share = sum(one in CODE_MARKS for one in line) / len(line)
        found[start : start + len(line)] = share >= CODE_SHARE
        start += len(line)
    return found
