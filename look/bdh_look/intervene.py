"""What if: neurons silenced or forced, synapses added to or cut, and the text that comes of it.

There are two ways, with the same numbers where both lead somewhere. ``silence`` and ``amplify`` change weights and load them
again, so that they run on the model's own port. ``Intervened`` is the specification with a hand on its neurons: it can also
force a neuron to a value, which no weight can do, and act in some layers only, which share all weights. States are changed
where they are NumPy, on the way out of a port and back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

import bdh_spec
from bdh_look.errors import LookError
from bdh_spec import Backend, BDHConfig, Model, Params, RecurrentState, State
from bdh_spec import model as spec
from bdh_spec.dtypes import WIDE
from bdh_spec.numpy_backend import NumpyModel
from bdh_spec.params import Array, cast
from bdh_spec.rope import rope, rotation


class Neuron(NamedTuple):
    """A neuron: all layers share it, because they share the weights."""

    head: int
    neuron: int  # below N


class Synapse(NamedTuple):
    """An entry of the state."""

    layer: int
    head: int
    neuron: int
    feature: int


def check_neurons(neurons: Iterable[tuple[int, int]], config: BDHConfig) -> list[Neuron]:
    """Neurons that the model has."""
    found = [Neuron(*each) for each in neurons]
    for head, neuron in found:
        if not (0 <= head < config.n_head and 0 <= neuron < config.n_neurons):
            raise LookError(
                f"there is no neuron {neuron} of head {head}: the model has heads below {config.n_head} and neurons below"
                f" {config.n_neurons} in each"
            )
    return found


def scaled(params: Params, neurons: Iterable[tuple[int, int]], by: float, config: BDHConfig) -> Params:
    """Weights in which some neurons are ``by`` times as active; 0 silences them. Their part in the decoder's sum scales alike.

    A relu is proportional to its column for every factor that is not negative.
    """
    if not (by >= 0 and np.isfinite(by)):
        raise LookError(f"neurons times {by}: a relu takes finite factors of at least 0")
    encoder = np.array(params.encoder)
    decoder = np.array(params.decoder)
    for head, neuron in check_neurons(neurons, config):
        encoder[head, :, neuron] *= by
        if by == 0:  # it would be multiplied by zeros anyway: the weights say so
            decoder[head * config.n_neurons + neuron] = 0
    return params._replace(encoder=encoder, decoder=decoder)


def reloaded(model: Model, params: Params, backend: Backend | None = None) -> Model:
    """Other weights on the port of a model, as it was loaded; ``backend`` for a port that is not registered."""
    port = backend or bdh_spec.get_backend(model.backend)
    return port.load(params, model.config, device=model.device, dtype=model.dtype, phase=model.phase)


def silence(model: Model, neurons: Iterable[tuple[int, int]], *, backend: Backend | None = None) -> Model:
    """The model without some neurons (head, neuron), on its own port.

    >>> quiet = silence(bdh_spec.load(backend="numpy"), [(0, 5)])
    >>> float(quiet.trace([[84, 104]])["layers.0.x_sparse"][0, 0, :, 5].max())
    0.0
    """
    return reloaded(model, scaled(model.params(), neurons, 0.0, model.config), backend)


def amplify(model: Model, neurons: Iterable[tuple[int, int]], by: float, *, backend: Backend | None = None) -> Model:
    """The model with some neurons ``by`` times as active, on its own port."""
    return reloaded(model, scaled(model.params(), neurons, by, model.config), backend)


@dataclass(frozen=True)
class Intervention:
    """What is done to ``x_sparse``, in some layers or in all."""

    silence: Collection[Neuron] = ()
    force: Mapping[Neuron, float] = field(default_factory=lambda: MappingProxyType({}))
    layers: Collection[int] | None = None  # all

    def check(self, config: BDHConfig) -> None:
        """Refuse what the model does not have."""
        check_neurons([*self.silence, *self.force], config)
        for value in self.force.values():
            if not (value >= 0 and np.isfinite(value)):
                raise LookError(f"a neuron forced to {value}: a relu gives finite numbers of at least 0")
        if missing := sorted(set(self.layers or ()) - set(range(config.n_layer))):
            raise LookError(f"there is no layer {missing[0]}: the model has layers below {config.n_layer}")

    def apply(self, x_sparse: Array, layer: int) -> Array:
        """The activity (B, h, T, N) of one layer with what is done to it."""
        if self.layers is not None and layer not in self.layers:
            return x_sparse
        changed = x_sparse.copy()
        for head, neuron in self.silence:
            changed[:, head, :, neuron] = 0
        for (head, neuron), value in self.force.items():
            changed[:, head, :, neuron] = value
        return changed


class Intervened(NumpyModel):
    """The specification with a hand on its neurons: ``forward``, ``advance`` and ``trace``, so that it also generates."""

    def __init__(self, model: Model, intervention: Intervention) -> None:
        dtype = model.dtype if model.dtype in WIDE else "float32"
        super().__init__(cast(model.params(), dtype), model.config, device="cpu", dtype=dtype, phase=model.phase)
        intervention.check(model.config)
        self.backend, self.intervention = "numpy", intervention

    def _layers(self, tokens: Array, start: int, memories: tuple[Array, ...]) -> tuple[Array, list[spec.Stages], Any]:
        """All layers on tokens (B, T) from a position on: the last x, the stages of each, the memories after them."""
        params, table = self._params, spec.frequencies_of(self.config)
        cos, sin = rotation(start, tokens.shape[1], table, params.encoder.dtype, self.phase)
        x, stages, after = spec.embed(tokens, params), [], []
        for i, memory in enumerate(memories):
            stages.append(self._layer(i, x, cos, sin, memory))
            after.append(spec.write(memory, stages[-1].rotated, x))
            x = stages[-1].x
        return x, stages, RecurrentState(start + tokens.shape[1], tuple(after))

    def _layer(self, i: int, x: Array, cos: Array, sin: Array, memory: Array) -> spec.Stages:
        """``bdh_spec.model.layer`` with the intervention after R3."""
        x_sparse = self.intervention.apply(spec.relu(x[:, None] @ self._params.encoder), i)  # B h T N
        rotated = rope(x_sparse, cos, sin)
        similar = spec.scores(rotated)  # B h T T
        attention = similar @ x[:, None] + spec.read(memory, rotated)  # B h T D
        yKV = spec.layer_norm(attention)
        y_sparse = spec.relu(yKV @ self._params.encoder_v)
        xy_sparse = x_sparse * y_sparse
        decoded = spec.merge_heads(xy_sparse) @ self._params.decoder  # B T D
        y = spec.layer_norm(decoded)
        return spec.Stages(x_sparse, rotated, similar, attention, yKV, y_sparse, xy_sparse, decoded, y, spec.layer_norm(x + y))

    def _forward(self, tokens: Array) -> Array:
        return self._trace(tokens)["logits"]

    def _trace(self, tokens: Array) -> dict[str, Array]:
        empty = self._init_state(tokens.shape[0]).layers
        x, layers, _ = self._layers(tokens, 0, empty)
        stages = {f"layers.{i}.{name}": value for i, kept in enumerate(layers) for name, value in kept._asdict().items()}
        return {"embed": spec.embed(tokens, self._params), **stages, "logits": spec.readout(x, self._params)}

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        x, _, after = self._layers(tokens, position, native.layers)
        return spec.readout(x, self._params), after

    def _loss(self, tokens: Array, targets: Array) -> float:
        return spec.loss(self._forward(tokens), targets)

    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        raise self._lacks("gradients")

    def _optimizer(self, settings: Any) -> Any:
        raise self._lacks("train")


def intervene(
    model: Model,
    *,
    silence: Collection[tuple[int, int]] = (),
    force: Mapping[tuple[int, int], float] | None = None,
    layers: Collection[int] | None = None,
) -> Intervened:
    """The model with neurons (head, neuron) silenced or forced to a value of ``x_sparse``, in some layers or in all.

    >>> model = bdh_spec.load(backend="numpy")
    >>> held = intervene(model, force={(1, 7): 2.0}, layers=[0])
    >>> held.trace([[84, 104]])["layers.0.x_sparse"][0, 1, :, 7]
    array([2., 2.], dtype=float32)
    """
    wishes = {Neuron(*neuron): float(value) for neuron, value in (force or {}).items()}
    return Intervened(model, Intervention([Neuron(*neuron) for neuron in silence], wishes, layers))


def add_to_synapses(model: Model, state: State, amounts: Mapping[tuple[int, int, int, int], float], *, text: int = 0) -> State:
    """A state with amounts added to some entries (layer, head, neuron, feature) of one text. The one given stays intact."""
    for synapse, amount in amounts.items():
        if not np.isfinite(amount):
            raise LookError(f"{amount} added to synapse {tuple(synapse)}: add a finite number")
    layers = copied(model, state, text)
    for synapse, amount in zip(check_synapses(amounts, model.config), amounts.values(), strict=True):
        layers[synapse.layer][(text, *synapse[1:])] += amount
    return model.import_state(RecurrentState(state.position, tuple(layers)))


def cut_synapses(model: Model, state: State, synapses: Iterable[tuple[int, int, int, int]], *, text: int = 0) -> State:
    """A state with some entries (layer, head, neuron, feature) of one text at zero. The one given stays intact."""
    layers = copied(model, state, text)
    for i, *rest in check_synapses(synapses, model.config):
        layers[i][(text, *rest)] = 0
    return model.import_state(RecurrentState(state.position, tuple(layers)))


def cut_neurons(
    model: Model, state: State, neurons: Iterable[tuple[int, int]], *, layers: Collection[int] | None = None, text: int = 0
) -> State:
    """A state without all that neurons (head, neuron) hold, in some layers or in all. The one given stays intact."""
    Intervention(layers=layers).check(model.config)
    memories, forgotten = copied(model, state, text), check_neurons(neurons, model.config)
    for i in range(len(memories)) if layers is None else layers:
        for head, neuron in forgotten:
            memories[i][text, head, neuron] = 0
    return model.import_state(RecurrentState(state.position, tuple(memories)))


def go_on(
    model: Model,
    state: State,
    prompt: str | bytes,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> bytes:
    """What the model writes after a state and what comes next in its text, the prompt. The state given stays intact."""
    own = model.import_state(model.export_state(state))  # stream takes it over
    steps = model.stream(prompt, max_new_tokens, temperature, top_k, seed, state=own)
    return bytes(int(token[0]) for token, _ in steps)


def copied(model: Model, state: State, text: int) -> list[Array]:
    """The matrices (B, h, N, D) of a state that holds this text, to be written to."""
    if not 0 <= text < state.batch:
        raise LookError(f"there is no text {text}: the state holds {state.batch}")
    return [np.array(layer) for layer in model.export_state(state).layers]


def check_synapses(synapses: Iterable[tuple[int, int, int, int]], config: BDHConfig) -> list[Synapse]:
    """Synapses that the model has."""
    sizes = (config.n_layer, config.n_head, config.n_neurons, config.n_embd)
    found = [Synapse(*synapse) for synapse in synapses]
    for synapse in found:
        if not all(0 <= at < size for at, size in zip(synapse, sizes, strict=True)):
            raise LookError(f"there is no synapse {tuple(synapse)}: layer, head, neuron and feature run below {sizes}")
    return found
