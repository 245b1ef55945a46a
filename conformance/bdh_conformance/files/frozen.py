"""The published vectors, judged for a port in this process: what ports in other languages are judged by."""

from __future__ import annotations

from functools import cache

import numpy as np

from bdh_conformance.files import vectors
from bdh_conformance.files.vectors import Judged, Vector
from bdh_spec import Model
from bdh_spec.params import Array


@cache
def published() -> tuple[Judged, ...]:
    """The newest set with states by pairs of neurons, of which this suite's ports run the texts with exact phases."""
    folders = vectors.case_folders(vectors.PUBLISHED / vectors.VERSION)
    return tuple(vectors.in_pairs(judged) for judged in map(vectors.read, folders) if judged.vector.phase == "exact")


def logits(model: Model, vector: Vector) -> dict[str, Array]:
    return {"logits": model.forward(vector.tokens)}


def traces(model: Model, vector: Vector) -> dict[str, Array]:
    return model.trace(vector.tokens)


def loss(model: Model, vector: Vector) -> dict[str, Array]:
    return {"loss": np.array([model.loss(vector.tokens, vector.targets)])}


def gradients(model: Model, vector: Vector) -> dict[str, Array]:
    _, slopes = model.gradients(vector.tokens, vector.targets)
    return {f"gradients.{name}": slope for name, slope in slopes._asdict().items()}


def decode(model: Model, vector: Vector) -> dict[str, Array]:
    """The texts that are read on from a state: for ports that import one."""
    texts = {start: vectors.decode(model, vector, start) for start in vector.starts}
    return vectors.paired({f"decode.{start}.{name}": value for start, text in texts.items() for name, value in text.items()})
