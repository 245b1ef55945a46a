"""What every port can be asked, in NumPy: load once, run many.

A port subclasses ``Backend`` and ``Model`` and writes the verbs with a leading underscore. The public verbs here check
their input first, so that the same mistake gets the same sentence on every port, and nothing runs before it is checked.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, overload

import numpy as np

from bdh_spec.checks import (
    check_ids_of_targets,
    check_optimizer_state,
    check_recurrent_state,
    check_targets,
    check_tokens,
)
from bdh_spec.config import BDHConfig
from bdh_spec.dtypes import dtype_name
from bdh_spec.errors import CapabilityError, OptimizerError, StateError, TokensError
from bdh_spec.int8 import check_int8, widened
from bdh_spec.model import IGNORE, RecurrentState
from bdh_spec.optimizer import AdamW, OptimizerState, check_rate
from bdh_spec.params import Array, Params, check_params
from bdh_spec.rope import MAX_POSITION, PHASES, Phase
from bdh_spec.sampling import Sampling, check_length, fresh_seed, sample, uniform
from bdh_spec.spread import Spread, Team

USUAL = ("forward", "advance", "loss", "gradients", "trace", "state", "train", "optimizer")
OPTIONAL = ("padded", "frequencies", "int8")  # a port that has one of these names it in its capabilities
VERBS = (*USUAL, *OPTIONAL)

NEXT_STEPS = {"padded": "read each text by itself with forward"}
PORT_OR_VERB = "ask a port that claims it, or write the verb and claim it in the capabilities"


@dataclass(frozen=True)
class Capabilities:
    """What a port claims. What is not declared is not claimed, and never counts as passed."""

    dtypes: tuple[str, ...] = ("float32",)
    phases: tuple[Phase, ...] = PHASES
    verbs: tuple[str, ...] = USUAL
    compiles: bool = False  # a program for each shape of tokens, which takes a second or more
    shares: tuple[str, ...] = ()  # among processes or devices: some of bdh_spec.spread.KINDS


class State:
    """A text as one model remembers it. What is inside belongs to the port."""

    def __init__(self, owner: Model, native: Any, position: int, batch: int) -> None:
        self.owner, self.native, self.position, self.batch = owner, native, position, batch
        self.donated = False

    def check(self, model: Model) -> Any:
        """The port's own state, if ``model`` may read it."""
        if self.donated:
            raise StateError("this state was donated and may have been overwritten: use the state that advance returned")
        if self.owner is not model:
            raise StateError("this state belongs to another model: carry it over with export_state and import_state")
        return self.native


class Optimizer:
    """An AdamW over the weights of one model (R16). What is inside belongs to the port."""

    def __init__(self, owner: Model, native: Any, settings: AdamW) -> None:
        self.owner, self.native, self.settings = owner, native, settings

    def check(self, model: Model) -> Any:
        """The port's own optimiser, if it moves the weights of ``model``."""
        if model is not self.owner:
            raise OptimizerError(
                "this optimiser belongs to another model: carry it over with export_optimizer and import_optimizer"
            )
        return self.native


class Batch(NamedTuple):
    """Texts that are read at once in a step of training."""

    tokens: Array  # B T
    targets: Array  # B T, -100 where they do not count
    share: float = 1.0  # of all targets of the step that count


class Model:
    """Weights on a device. Arrays go in and out as NumPy: float64 from a float64 model, float32 from any other.

    Any number of threads may use one model at once, each with states of its own or with states that nobody donates; while
    ``train_step`` runs, no other thread may use that model.
    """

    def __init__(self, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> None:
        self.config, self.device, self.dtype, self.phase = config, device, dtype, phase
        self.backend = ""  # the port's name, set by Backend.load

    def forward(self, tokens: Any) -> Array:
        """Tokens (B, T) to logits (B, T, V)."""
        return self._looked_at(self._forward(check_tokens(tokens, self.config)))

    def forward_padded(self, tokens: Any, lengths: Any) -> Array:
        """Tokens (B, T) to logits (B, T, V), where text b is the last ``lengths[b]`` tokens of row b, and is read alone.

        What stands before a text is padding: any ids of the vocabulary, which change nothing. Its logits are zero.
        """
        tokens = check_tokens(tokens, self.config)
        lengths = check_lengths(lengths, tokens)
        is_padding = np.arange(tokens.shape[1]) < tokens.shape[1] - lengths[:, None]  # B T
        return self._looked_at(np.where(is_padding[..., None], 0, self._forward_padded(tokens, lengths)))

    def init_state(self, batch: int = 1) -> State:
        """The state before the first token of ``batch`` texts."""
        if batch < 1:
            raise StateError(f"a state of {batch} texts: ask for 1 or more")
        return State(self, self._init_state(batch), 0, batch)

    def advance(self, state: State, tokens: Any, *, donate: bool = False) -> tuple[Array, State]:
        """Read tokens (B, T) on: their logits (B, T, V) and the state after them.

        The state given stays intact unless it is donated: then it may be updated in place, and using it again is an error.
        """
        tokens, native = check_tokens(tokens, self.config), state.check(self)
        if tokens.shape[0] != state.batch:
            raise StateError(f"tokens of {tokens.shape[0]} texts, a state of {state.batch}: they must be the same texts")
        if state.position + tokens.shape[1] > MAX_POSITION:
            raise StateError(f"the state is at position {state.position}: positions end at 2^63 - 1")
        state.donated = donate
        logits, native = self._advance(native, state.position, tokens, donate)
        return self._looked_at(logits), State(self, native, state.position + tokens.shape[1], state.batch)

    def loss(self, tokens: Any, targets: Any) -> float:
        """Mean cross entropy in nats (R12)."""
        tokens = check_tokens(tokens, self.config)
        return self._loss(tokens, check_targets(targets, tokens, self.config))

    def gradients(self, tokens: Any, targets: Any) -> tuple[float, Params]:
        """The loss and its slope in each weight (R15), without dropout."""
        tokens = check_tokens(tokens, self.config)
        return self._gradients(tokens, check_targets(targets, tokens, self.config))

    def trace(self, tokens: Any) -> dict[str, Array]:
        """Every stage of the parallel form by name, in order; SPEC.md lists them."""
        return self._trace(check_tokens(tokens, self.config))

    def export_state(self, state: State) -> RecurrentState:
        """The state in NumPy, for a file or for another port."""
        return RecurrentState(state.position, self._export_state(state.check(self)))

    def import_state(self, state: RecurrentState) -> State:
        """A state that this or another port exported."""
        check_recurrent_state(state, self.config)
        return State(self, self._import_state(state), state.position, state.batch)

    def optimizer(self, settings: AdamW) -> Optimizer:
        """The port's own AdamW over the five weights (R16)."""
        return Optimizer(self, self._optimizer(settings), settings)

    def train_step(self, optimizer: Optimizer, tokens: Any, targets: Any, *, rate: float | None = None) -> float:
        """Move the weights one step, at this rate or that of the settings; the loss before it, with dropout."""
        tokens = check_tokens(tokens, self.config)
        return self._step(optimizer, [Batch(tokens, check_targets(targets, tokens, self.config))], rate)

    def train_on(self, optimizer: Optimizer, batches: Sequence[tuple[Any, Any]], *, rate: float | None = None) -> float:
        """One step on the tokens and targets of several batches: on the mean over all targets that count, as if they were one.

        The batches are read one after the other, so that memory need hold one only, and may differ in their shapes.
        """
        return self._step(optimizer, as_batches(batches, self.config), rate)

    def export_optimizer(self, optimizer: Optimizer) -> OptimizerState:
        """What the optimiser remembers, in NumPy, for a file or for another port."""
        return self._export_optimizer(optimizer.check(self))

    def import_optimizer(self, state: OptimizerState) -> Optimizer:
        """An optimiser that goes on where the one that was exported, here or by another port, had stopped.

        ``masters`` are taken up by a model whose weights are what they round to; one of float32 is loaded with them instead.
        """
        check_optimizer_state(state, self.config)
        return Optimizer(self, self._import_optimizer(state), state.settings)

    def _step(self, optimizer: Optimizer, batches: list[Batch], rate: float | None) -> float:
        native = optimizer.check(self)
        return self._train_step(native, batches, optimizer.settings.learning_rate if rate is None else check_rate(rate))

    @overload
    def generate(
        self,
        prompt: str | bytes,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> bytes: ...

    @overload
    def generate(
        self,
        prompt: Array,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Array: ...

    def generate(
        self,
        prompt: str | bytes | Array,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> bytes | Array:
        """The prompt and its continuation: bytes for text, tokens (B, T + max_new_tokens) for tokens (B, T).

        One seed gives one text on every port (R14). Without a seed the text is a new one each time.
        """
        tokens = check_tokens(as_tokens(prompt), self.config)
        new = [step for step, _ in self.stream(tokens, max_new_tokens, temperature, top_k, seed)]
        whole = np.concatenate([tokens, *(step[:, None] for step in new)], axis=1)
        return bytes(whole[0].tolist()) if isinstance(prompt, (str, bytes)) else whole

    def stream(
        self,
        prompt: str | bytes | Array,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        *,
        state: State | None = None,
    ) -> Iterator[tuple[Array, State]]:
        """Each new token of every text, (B,), as soon as it is drawn, with the state before it was read.

        ``state`` continues a text, and is donated: the prompt is what comes next in it. To go on later, give the last state
        together with the last token as the prompt.
        """
        check_length(max_new_tokens)
        how = Sampling(temperature, top_k, fresh_seed() if seed is None else seed)
        tokens = check_tokens(as_tokens(prompt), self.config)
        state = self.init_state(tokens.shape[0]) if state is None else state
        for _ in range(max_new_tokens):
            logits, state = self.advance(state, tokens, donate=True)
            chosen = [sample(row, uniform(how.seed, state.position, b), how) for b, row in enumerate(logits[:, -1])]
            yield np.array(chosen), state
            tokens = np.array(chosen)[:, None]

    def _looked_at(self, logits: Array) -> Array:
        """Logits, with a word where float16 could not hold what led to them."""
        if self.dtype == "float16" and not np.isfinite(logits).all():
            warnings.warn(
                "logits are not finite: float16 holds numbers up to 65,504, and a long sum of this model may be larger, so load"
                " it in bfloat16 or float32",
                RuntimeWarning,
                stacklevel=3,
            )
        return logits

    def params(self) -> Params:
        """The weights as they are now: of a model that does not train, those it was loaded with."""
        raise self._lacks("params")

    # What a port writes, each as it claims the verb. PORTING.md tells what goes in and out.

    def _forward(self, tokens: Array) -> Array:
        raise self._lacks("forward")

    def _forward_padded(self, tokens: Array, lengths: Array) -> Array:
        """The logits of padding are nobody's concern."""
        raise self._lacks("padded")

    def _init_state(self, batch: int) -> Any:
        raise self._lacks("advance")

    def _advance(self, native: Any, position: int, tokens: Array, donate: bool) -> tuple[Array, Any]:
        raise self._lacks("advance")

    def _loss(self, tokens: Array, targets: Array) -> float:
        raise self._lacks("loss")

    def _gradients(self, tokens: Array, targets: Array) -> tuple[float, Params]:
        raise self._lacks("gradients")

    def _trace(self, tokens: Array) -> dict[str, Array]:
        raise self._lacks("trace")

    def _export_state(self, native: Any) -> tuple[Array, ...]:
        raise self._lacks("state")

    def _import_state(self, state: RecurrentState) -> Any:
        raise self._lacks("state")

    def _optimizer(self, settings: AdamW) -> Any:
        raise self._lacks("train")

    def _train_step(self, native: Any, batches: list[Batch], rate: float) -> float:
        raise self._lacks("train")

    def _export_optimizer(self, native: Any) -> OptimizerState:
        raise self._lacks("optimizer")

    def _import_optimizer(self, state: OptimizerState) -> Any:
        raise self._lacks("optimizer")

    def _lacks(self, verb: str) -> CapabilityError:
        return CapabilityError(f"the {self.backend} port has no {verb}: {NEXT_STEPS.get(verb, PORT_OR_VERB)}")


class Backend(ABC):
    """A port: where and in which precision it runs, and how weights get there."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    @abstractmethod
    def version(self) -> str:
        """The framework and its version."""

    @abstractmethod
    def devices(self) -> tuple[str, ...]:
        """The devices of this machine that it can use, the best first."""

    def memory(self, device: str) -> int | None:
        """The bytes of memory that a device has, where the port can tell; for a CPU those of the machine."""
        if device.startswith("cpu") and hasattr(os, "sysconf"):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return None

    def team(self) -> Team:
        """The processes that were started together with this one, by the port's own launcher."""
        return Team()

    def load(
        self,
        params: Params,
        config: BDHConfig,
        *,
        device: str | None = None,
        dtype: str | None = None,
        phase: Phase = "exact",
        spread: Spread | None = None,
    ) -> Model:
        """Put weights on a device: the first of ``devices()`` and float32 unless told otherwise.

        Weights in int8 (R17) are handed to a port that claims them as they are, and to any other as what they stand for. With a
        ``spread``, on that many devices, or processes, each of which asks for the same at the same time. Such a model is
        for training: every process gives it whole batches, and gets the same from it.
        """
        check_int8(check_params(params, config))
        device, dtype = device or self.devices()[0], dtype_name(dtype or "float32")
        self._demand("dtype", dtype, self.capabilities.dtypes)
        self._demand("phase", phase, self.capabilities.phases)
        self._demand("device", device.split(":")[0], self.devices())  # cuda:1 is a cuda
        if config.freqs is not None and "frequencies" not in self.capabilities.verbs:
            raise CapabilityError(
                f"the {self.name} port runs BDH's frequency table only, and this model brings its own: ask a port that claims"
                " frequencies, such as numpy"
            )
        if spread is not None or "int8" not in self.capabilities.verbs:
            params = widened(params, "float64" if dtype == "float64" else "float32")
        if spread is None:
            model = self._load(params, config, device=device, dtype=dtype, phase=phase)
        else:
            spread.check(config, self.capabilities.shares, self.name)
            model = self._load_spread(params, config, spread, device=device, dtype=dtype, phase=phase)
        model.backend = self.name
        return model

    @abstractmethod
    def _load(self, params: Params, config: BDHConfig, *, device: str, dtype: str, phase: Phase) -> Model: ...

    def _load_spread(
        self, params: Params, config: BDHConfig, spread: Spread, *, device: str, dtype: str, phase: Phase
    ) -> Model:
        raise CapabilityError(f"the {self.name} port shares nothing: load the model without a spread")

    def _demand(self, what: str, asked: str, offered: tuple[str, ...]) -> None:
        if asked not in offered:
            raise CapabilityError(f"the {self.name} port has no {what} {asked!r} here: choose from {', '.join(offered)}")


def check_lengths(lengths: Any, tokens: Array) -> Array:
    """Lengths as an int64 array (B,), each from 1 to T."""
    (B, T), found = tokens.shape, np.asarray(lengths)
    if found.shape != (B,):
        raise TokensError(f"lengths have shape {found.shape}, tokens {tokens.shape}: give one length per text")
    if found.dtype.kind not in "iu":
        raise TokensError(f"lengths are {found.dtype}: give whole numbers, such as int64")
    if (outside := (found < 1) | (found > T)).any():
        b = int(np.argmax(outside))
        raise TokensError(f"length {found[b]} of text {b} does not fit its row of {T} tokens: lengths run from 1 to {T}")
    return found.astype(np.int64)


def as_batches(batches: Sequence[tuple[Any, Any]], config: BDHConfig) -> list[Batch]:
    """The batches of one step, each with its share of the targets that count; those where none does are left out."""
    checked = [(ids := check_tokens(tokens, config), check_ids_of_targets(targets, ids, config)) for tokens, targets in batches]
    counts = [int((targets != IGNORE).sum()) for _, targets in checked]
    if not sum(counts):
        raise TokensError(f"no batch of this step has a target that counts: give one, other than {IGNORE}")
    return [Batch(*pair, n / sum(counts)) for pair, n in zip(checked, counts, strict=True) if n]


def own_texts(batches: Sequence[Batch], place: int, many: int) -> list[Batch]:
    """Of each batch the texts that are read at one of ``many`` places, with their share of all targets of the step."""
    found = []
    for tokens, targets, share in batches:
        if len(tokens) % many:
            raise TokensError(f"a batch of {len(tokens)} texts does not divide among {many}: give a multiple")
        counts = (targets != IGNORE).reshape(many, -1).sum(1)
        if not counts.all():
            raise TokensError(f"no text of part {int(counts.argmin())} of a batch has a target that counts: mix the texts")
        mine = slice(place * len(tokens) // many, (place + 1) * len(tokens) // many)
        found.append(Batch(tokens[mine], targets[mine], share * float(counts[place] / counts.sum())))
    return found


def as_tokens(prompt: str | bytes | Array) -> Array:
    """Text as one row of its bytes; tokens as they are."""
    if isinstance(prompt, (str, bytes)):
        text = prompt.encode() if isinstance(prompt, str) else prompt
        if not text:
            raise TokensError("the prompt is empty: a text begins with at least one byte")
        return np.frombuffer(text, np.uint8)[None]
    return prompt
