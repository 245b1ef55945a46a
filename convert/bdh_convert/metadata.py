"""What a file of ours says of itself, in whichever corner its container has for that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bdh_convert.raw import SMALL
from bdh_spec import checkpoint
from bdh_spec.config import BDHConfig
from bdh_spec.errors import CheckpointError

BY_FORMAT = {"mlx": "mlx", checkpoint.INT8_FORMAT: "int8"}  # the dialect of a file that does not name it


def about(config: BDHConfig, dialect: str, tokenizer: str | None) -> dict[str, str]:
    """The canonical metadata, the dialect that the names and layouts follow, and the tokenizer if tokens are no bytes."""
    kind = checkpoint.INT8_FORMAT if dialect == "int8" else checkpoint.FORMAT
    return checkpoint.metadata(config, kind) | {"dialect": dialect} | ({"tokenizer": tokenizer} if tokenizer else {})


def said_of_itself(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, dialect and tokenizer among a file's metadata, and whose it is, as fields of Contents."""
    metadata = {key: value for key, value in found.items() if isinstance(value, str)}
    if metadata.get("format") == checkpoint.STATE_FORMAT:
        raise CheckpointError(f"{path} is a saved recurrent state and holds no weights: name the checkpoint it came from")
    theirs = metadata.get("spec_version", checkpoint.SPEC_VERSION)
    if theirs.split(".")[0] != checkpoint.SPEC_VERSION.split(".")[0]:
        raise CheckpointError(
            f"{path} follows specification {theirs}, this is {checkpoint.SPEC_VERSION}: use a release that reads it"
        )
    dialect = metadata.get("dialect", BY_FORMAT.get(metadata.get("format", "")))
    ours = "spec_version" in metadata
    if ours and "config" not in metadata:
        raise CheckpointError(f"{path} follows specification {theirs} and holds no configuration: convert it again")
    return {
        "config": parse_config(path, metadata["config"]) if ours else _of_others(metadata),
        "dialect": dialect,
        "tokenizer": metadata.get("tokenizer") if ours else None,
        "is_ours": ours,
    }


def _of_others(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """A configuration that others wrote among a file's metadata, under whichever name; the first that tells of layers."""
    for text in metadata.values():
        if text.startswith("{") and ("n_layer" in text or "num_hidden_layers" in text):
            with suppress(ValueError, RecursionError):
                return dict(json.loads(text))
    return None


def parse_config(path: Path, text: str | bytes) -> dict[str, Any]:
    """A configuration written as a JSON object."""
    if len(text) > SMALL:
        raise CheckpointError(f"the configuration in {path} has {len(text):,} characters: mend or remove it")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the configuration in {path} is no JSON ({error}): mend or remove it") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"the configuration in {path} is no JSON object: mend or remove it")
    return config
