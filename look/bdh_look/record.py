"""Everything that a model did while it read one text, as arrays whose axes have names.

From ``trace`` and the recurrent state of the protocol alone, so it works with any port.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from bdh_look.errors import LookError
from bdh_spec import BDHConfig, Model
from bdh_spec.checks import check_tokens
from bdh_spec.model import log_softmax
from bdh_spec.params import Array
from bdh_spec.protocol import as_tokens


@dataclass(frozen=True, eq=False)
class Named:
    """An array whose axes have names.

    >>> Named("loss", ("time",), np.array([2.0, 1.0]), "nats").at(time=1).values
    array(1.)
    """

    name: str
    axes: tuple[str, ...]
    values: Array
    unit: str = ""

    def __post_init__(self) -> None:
        if self.values.ndim != len(self.axes):
            raise LookError(f"{self.name} has shape {self.values.shape} and {len(self.axes)} names for its axes: name each")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.values.shape, strict=True))
        return f"<{self.name} ({sizes}){self.unit and f' in {self.unit}'}>"

    def at(self, **where: int) -> Named:
        """The part at an index of some axes, without these axes."""
        if unknown := set(where) - set(self.axes):
            raise LookError(f"{self.name} has no axis {', '.join(sorted(unknown))}: it has {', '.join(self.axes)}")
        key = tuple(where.get(axis, slice(None)) for axis in self.axes)
        rest = tuple(axis for axis in self.axes if axis not in where)
        return Named(self.name, rest, np.asarray(self.values[key]), self.unit)

    def to_xarray(self) -> Any:
        """The same as an ``xarray.DataArray`` (extra ``xarray``)."""
        return _xarray().DataArray(self.values, dims=self.axes, name=self.name, attrs={"units": self.unit} if self.unit else {})


@dataclass(frozen=True, eq=False)
class Record:
    """What a model did at each byte of one text.

    A byte is predicted before it is read: ``loss`` at t is that of the byte at t, given those before it, and ``next_byte`` at t
    is what the model expects at t + 1. The first byte is predicted by nobody, so its loss is NaN.
    """

    config: BDHConfig
    tokens: Named  # time
    loss: Named  # time, nats
    next_byte: Named  # time byte, probability
    x_sparse: Named  # layer head time neuron  R3
    rotated: Named  # layer head time neuron  R4: what reads the state, and is written to it
    scores: Named  # layer head time earlier  R5
    y_sparse: Named  # layer head time neuron  R7
    xy_sparse: Named  # layer head time neuron  R7: what goes on to the decoder
    x: Named  # layer time feature: what each layer starts from, and writes as values
    state_norm: Named  # layer head time: the 2-norm of the state once the byte at t is written
    state: Named  # layer head neuron feature: the state after the whole text

    def __len__(self) -> int:
        return len(self.tokens.values)

    @property
    def text(self) -> bytes:
        """The text that was read, where tokens are bytes."""
        return bytes(self.tokens.values.astype(np.uint8))

    def arrays(self) -> dict[str, Named]:
        """Every array by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}

    def state_after(self, time: int) -> Named:
        """The state (layer, head, neuron, feature) once the byte at ``time`` is written: the sum of what all so far wrote."""
        q, x = self.rotated.values[:, :, : time + 1], self.x.values[:, None, : time + 1]
        return Named("state", self.state.axes, q.swapaxes(-1, -2) @ x)

    def to_xarray(self) -> Any:
        """All arrays as one ``xarray.Dataset`` (extra ``xarray``)."""
        return _xarray().Dataset(
            {name: value.to_xarray() for name, value in self.arrays().items()}, attrs=self.config.as_dict()
        )


def record(model: Model, tokens: str | bytes | Array) -> Record:
    """Read one text, and keep what happened at each of its bytes.

    ``tokens`` is text, or whole numbers (T,) or (1, T). Takes memory for three arrays (layer, head, time, neuron) and one
    (layer, head, time, time), beside the trace of the port.

    >>> import bdh_spec
    >>> record(bdh_spec.load(backend="numpy"), "The dragon").loss
    <loss (time 10) in nats>
    """
    given = as_tokens(tokens)
    ids = check_tokens(given[None] if np.ndim(given) == 1 else given, model.config)
    if ids.shape[0] != 1:
        raise LookError(f"tokens of {ids.shape[0]} texts: a record is of one text, so record each by itself")
    stages = model.trace(ids)
    log_p = log_softmax(stages["logits"][0].astype(np.float64))  # T V
    layers = range(model.config.n_layer)
    starts = [stages["embed"][0], *(stages[f"layers.{i}.x"][0] for i in layers[:-1])]
    x = Named("x", ("layer", "time", "feature"), np.stack(starts))

    def stacked(name: str, *axes: str) -> Named:
        return Named(name, ("layer", *axes), np.stack([stages.pop(f"layers.{i}.{name}")[0] for i in layers]))

    of_neurons = {name: stacked(name, "head", "time", "neuron") for name in ("x_sparse", "rotated", "y_sparse", "xy_sparse")}
    scores = stacked("scores", "head", "time", "earlier")
    _, state = model.advance(model.init_state(), ids, donate=True)
    memory = np.stack([layer[0] for layer in model.export_state(state).layers])
    return Record(
        config=model.config,
        tokens=Named("tokens", ("time",), ids[0]),
        loss=Named("loss", ("time",), losses(log_p, ids[0]), "nats"),
        next_byte=Named("next_byte", ("time", "byte"), np.exp(log_p)),
        scores=scores,
        x=x,
        state_norm=Named("state_norm", ("layer", "head", "time"), norms(scores.values, of_neurons["rotated"].values, x.values)),
        state=Named("state", ("layer", "head", "neuron", "feature"), memory),
        **of_neurons,
    )


def losses(log_p: Array, tokens: Array) -> Array:
    """The loss (T,) of each token by the log-probabilities (T, V) after the one before it; NaN for the first."""
    return np.concatenate([[np.nan], -log_p[np.arange(len(tokens) - 1), tokens[1:]]])


def norms(scores: Array, rotated: Array, x: Array) -> Array:
    """The 2-norm (L, nh, T) of the state after each byte, out of what was written.

    The state is a sum of outer products, so the square of its norm grows by 2 sum_s (q_t q_s) (x_t x_s) + |q_t|^2 |x_t|^2,
    and the scores are the q_t q_s of all earlier s.
    """
    found = np.empty(rotated.shape[:-1])  # L h T
    for i, (similar, q, values) in enumerate(zip(scores, rotated, x, strict=True)):
        wide = values.astype(np.float64)
        alike = wide @ wide.T  # T T
        own = np.sum(q.astype(np.float64) ** 2, -1) * np.diagonal(alike)
        found[i] = np.cumsum(2 * np.einsum("hts,ts->ht", similar, alike) + own, axis=-1)
    return np.sqrt(np.maximum(found, 0))


def _xarray() -> Any:
    try:
        import xarray
    except ModuleNotFoundError:
        raise LookError("xarray is not installed: pip install 'bdh-spec[xarray]'") from None
    return xarray
