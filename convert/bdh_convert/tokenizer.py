"""Whose tokens a checkpoint reads: bytes, unless it names ByT5's tokenizer, whose ids are bytes and 3."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from bdh_convert.metadata import parse_config
from bdh_convert.raw import read_small
from bdh_convert.tensors import Contents

FILE, KEY = "tokenizer_config.json", "tokenizer_class"  # where transformers says it, if not in config.json
BYT5 = "ByT5Tokenizer"
NOTE = (
    "its tokens are ByT5's: byte b is id b + 3, after 0 for padding, 1 for the end and 2 for the unknown; text for it and from"
    " it goes through AutoTokenizer of transformers"
)


def with_tokenizer(contents: Contents, folder: Path) -> Contents:
    """A checkpoint of ByT5's tokens says so in what transformers saved beside the weights, if not in its own metadata."""
    beside = folder / FILE
    said = parse_config(beside, read_small(beside)).get(KEY) if beside.is_file() else (contents.config or {}).get(KEY)
    return replace(contents, tokenizer=BYT5) if said == BYT5 else contents


def notes(tokenizer: str | None) -> list[str]:
    """What the user should know of the tokens."""
    return [NOTE] if tokenizer == BYT5 else []


def write(part: Path, tokenizer: str | None) -> None:
    """Name the tokenizer in a folder where AutoTokenizer looks; ByT5's needs no more than its name."""
    if tokenizer is not None:
        (part / FILE).write_text(json.dumps({KEY: tokenizer}, indent=2) + "\n")
