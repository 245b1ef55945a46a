"""What a run is made of: sizes, data, recipe. The flags, a TOML file and Python say it in the same words."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import bdh_spec
from bdh_spec import AdamW, BDHConfig, BDHError
from bdh_spec.dtypes import dtype_name
from bdh_spec.files import shown
from bdh_spec.registry import Freqs

SIZES = {
    "hatchling": BDHConfig(n_layer=4, n_embd=64, n_head=4, mlp_internal_dim_multiplier=32),
    "small": BDHConfig(n_layer=4, n_embd=128, n_head=4, mlp_internal_dim_multiplier=64),
    "base": BDHConfig(),
    "large": BDHConfig(n_layer=8, n_embd=512, n_head=8, mlp_internal_dim_multiplier=128),
}
RATE_OF_WIDTH = 0.256  # the wider a model, the smaller its steps
TEMPLATES = ("system", "instruction", "both", "full")
SCHEDULES = ("cosine", "constant")
FREQS = typing.get_args(Freqs)
MODEL = bdh_spec.config.SIZES
MAY_CHANGE = (  # at --resume
    *("backend", "device", "data_parallel", "neuron_parallel", "shard_weights"),
    *("max_steps", "patience", "checkpoint_every", "keep", "sample_every", "out"),
)


class TrainError(BDHError, ValueError):
    """A run that cannot be: of no data, of an unknown word, or of a folder that holds another."""


def about(default: Any, says: str) -> Any:
    """A field and what a user reads of it."""
    return field(default=default, metadata={"help": says})


@dataclass(frozen=True)
class TrainConfig:
    """A run. What is None is filled in by ``resolve``: from the size, from the checkpoint to start from, or from the rest."""

    data: tuple[str, ...] = about((), "Files, folders, or the name of a dataset on the Hugging Face hub.")
    val: tuple[str, ...] = about((), "The same, to measure on.  [default: the last tenth of the data]")
    text_fields: tuple[str, ...] = about((), "Fields of a record (jsonl, parquet, datasets) that make its text.")
    template: str | None = about(None, "Which fields of an instruction record make its text: system, instruction, both, full.")
    shuffle_documents: bool = about(False, "Put files and records in a random order before they are split.")
    size: str | None = about(None, "hatchling, small, base (25 million parameters) or large.")
    n_layer: int | None = about(None, "Layers, which share their weights.")
    n_embd: int | None = about(None, "Width of the embedding.")
    n_head: int | None = about(None, "Heads.")
    mlp_internal_dim_multiplier: int | None = about(None, "Neurons of all heads, in widths.")
    dropout: float | None = about(None, "Share of neurons that a step drops.  [default: 0.1]")
    vocab_size: int | None = about(None, "Tokens; bytes are 256.")
    init_from: str | None = about(None, "Start from the weights of this checkpoint, of any dialect.")
    freqs: str | None = about(None, "Of frequencies in it that are not BDH's: keep them, or reset them to BDH's.")
    freeze: tuple[str, ...] = about((), "Weights that stay as they are: embed, encoder, encoder_v, decoder, lm_head.")
    backend: str = about("auto", "numpy, torch, mlx, jax, or auto: what suits this machine.")
    device: str | None = about(None, "Such as cpu, cuda, mps, gpu, tpu.  [default: the port's best]")
    data_parallel: int | None = about(
        None, "Processes or devices that share each batch.  [default: those that a launcher started, over neuron_parallel]"
    )
    neuron_parallel: int = about(1, "Processes or devices that share each layer, by its neurons.")
    shard_weights: bool = about(False, "Share weights and moments too, among those that share batches.")
    dtype: str = about("float32", "Of weights and products; bfloat16 keeps float32 masters.")
    block_size: int = about(256, "Bytes of a window.")
    min_block_size: int | None = about(
        None, "Windows of mixed length: halves of block_size down to this one, as many bytes in each step."
    )
    long_block_size: int | None = about(None, "Longer windows, which the last steps read.")
    long_steps: int | None = about(None, "How many steps read them.  [default: a tenth of all]")
    batch_size: int = about(8, "Windows of a batch.")
    accumulate: int = about(1, "Batches of a step.")
    max_steps: int = about(1000, "Steps of the optimiser.")
    learning_rate: float | None = about(None, "The highest rate.  [default: 0.256 / n_embd, 0.001 for base]")
    schedule: str = about("cosine", "cosine or constant, after the warm-up.")
    warmup_steps: int | None = about(None, "Steps until the highest rate.  [default: a tenth of all, 100 at most]")
    final_rate: float = about(0.05, "Where a cosine ends, as a share of the highest rate.")
    weight_decay: float = about(0.1, "AdamW's, decoupled.")
    beta1: float = about(0.9, "AdamW's mean of slopes.")
    beta2: float = about(0.95, "AdamW's mean of squares.")
    eps: float = about(1e-8, "AdamW's.")
    grad_clip: float = about(1.0, "Largest norm of all slopes together; 0 clips nothing.")
    seed: int = about(0, "Of weights, batches, dropout and samples.")
    eval_every: int = about(100, "Steps between measures on held-out text.")
    eval_batches: int = about(20, "Batches of a measure.")
    patience: int = about(0, "Measures without a better one after which the run ends; 0 never ends it.")
    sample_every: int = about(500, "Steps between sample texts; 0 writes none on the way.")
    prompt: str = about("The ", "What a sample begins with.")
    checkpoint_every: int = about(100, "Steps between checkpoints.")
    keep: int = about(3, "Checkpoints to keep beside the best.")
    out: str = about("bdh-run", "The run's folder.")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, coerced(f.name, getattr(self, f.name), hints()[f.name]))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        one_of("size", self.size, tuple(SIZES))
        one_of("template", self.template, TEMPLATES)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("freqs", self.freqs, FREQS)
        for name in (
            "block_size",
            "batch_size",
            "accumulate",
            "max_steps",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep",
            "neuron_parallel",
        ):
            at_least(name, getattr(self, name), 1)
        if self.data_parallel is not None:
            at_least("data_parallel", self.data_parallel, 1)
        for name in ("patience", "sample_every", "seed", "warmup_steps", "final_rate", "grad_clip"):
            at_least(name, getattr(self, name) or 0, 0)
        if self.min_block_size is not None and not 2 <= self.min_block_size <= self.block_size:
            raise TrainError(f"min_block_size is {self.min_block_size}: give a number from 2 to block_size, {self.block_size}")
        if self.long_block_size is not None and self.long_block_size <= self.block_size:
            raise TrainError(f"long_block_size is {self.long_block_size}: give more than block_size, {self.block_size}")
        if self.long_steps is not None:
            at_least("long_steps", self.long_steps, 1)
            if self.long_block_size is None:
                raise TrainError("long_steps is given: say how long their windows are with long_block_size")
        if self.seed >= 2**63:
            raise TrainError(f"seed is {self.seed}: give a number below 2^63")
        self.adamw()

    @property
    def model(self) -> BDHConfig:
        """The sizes of the model, once they are resolved. Frequencies of its own come with its weights."""
        return BDHConfig(**{name: getattr(self, name) for name in MODEL})

    @property
    def longest(self) -> int:
        """Bytes of the longest windows."""
        return self.long_block_size or self.block_size

    @property
    def tokens_per_step(self) -> int:
        """Bytes of a step that is not one of the long ones."""
        return self.batch_size * self.block_size * self.accumulate

    def is_long(self, step: int) -> bool:
        """Whether a step, counted from 1, reads the longest windows."""
        return self.long_block_size is not None and step > self.max_steps - (self.long_steps or 0)

    def rows(self, length: int) -> int:
        """Windows of this length in a batch: as many bytes as ``batch_size`` of ``block_size``, or one window."""
        return max(self.batch_size * self.block_size // length, 1)

    def tokens_of(self, step: int) -> int:
        """Bytes that a step reads, counted from 1."""
        return self.rows(self.longest) * self.longest * self.accumulate if self.is_long(step) else self.tokens_per_step

    def tokens_after(self, step: int) -> int:
        """Bytes that all steps read after this one."""
        left = max(self.max_steps - step, 0)
        long = min(left, self.long_steps or 0)
        return (left - long) * self.tokens_per_step + long * self.tokens_of(self.max_steps)

    def adamw(self) -> AdamW:
        """The settings of the optimiser (R16)."""
        return AdamW(
            learning_rate=self.learning_rate or 0.0,
            weight_decay=self.weight_decay,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            clip=self.grad_clip or None,
            seed=self.seed,
            frozen=self.freeze,
        )


def hints() -> dict[str, Any]:
    """The types of the fields."""
    return typing.get_type_hints(TrainConfig)


def coerced(name: str, value: Any, kind: Any) -> Any:
    """A value in its field's type, or the sentence that says what it should be."""
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if value is None:
            return None
    if typing.get_origin(kind) is tuple:
        words = (value,) if isinstance(value, (str, Path)) else value
        if isinstance(words, (list, tuple)) and all(isinstance(word, (str, Path)) for word in words):
            return tuple(map(str, words))
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is str and isinstance(value, Path):
        return str(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}.get(kind, "a list of words")
    raise TrainError(f"{name} is {value!r}: give {words}")


def one_of(name: str, value: str | None, words: tuple[str, ...]) -> None:
    if value is not None and value not in words:
        raise TrainError(f"{name} is {value!r}: choose from {', '.join(words)}")


def at_least(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise TrainError(f"{name} is {value}: give a number of at least {least}")


def from_mapping(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings by the fields' names, - and _ alike; a word that none has is an error."""
    known, found = hints(), {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {close[0]}?" if close else "bdh-train --help lists them"
            raise TrainError(f"{where} has the unknown setting {shown(key, 60)}: {advice}")
        found[name] = value
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file."""
    try:
        return from_mapping(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainError(shown(f"{path} is no TOML ({error}): write lines such as max_steps = 1000")) from None
    except OSError as error:
        raise TrainError(f"{path} cannot be read ({error.strerror}): check the path") from None


def as_toml(config: TrainConfig) -> str:
    """A configuration as a TOML file; what is not set is left out. A string of JSON is one of TOML."""
    values = {name: value for name, value in vars(config).items() if value is not None}
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=True)}\n" for name, value in values.items())


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with everything filled in that follows from the rest."""
    if not config.data:
        raise TrainError("no data: name files, folders or a dataset with --data")
    given = {name: getattr(config, name) for name in MODEL if getattr(config, name) is not None}
    if config.init_from is not None:
        theirs = read_initial(config)[1].as_dict()
        differ = [n for n, v in given.items() if v != theirs[n] and n != "dropout"]
        if config.size or differ:
            what = "size" if config.size else differ[0]
            raise TrainError(f"{what} is given, and {config.init_from} brings sizes of its own: leave {what} out")
        sizes = BDHConfig(**(theirs | given))
    else:
        sizes = BDHConfig(**(SIZES[config.size or "base"].as_dict() | given))
    if sizes.vocab_size < 256:
        raise TrainError(f"vocab_size is {sizes.vocab_size}: text is bytes, which are 256")
    warmup = min(100, config.max_steps // 10) if config.warmup_steps is None else config.warmup_steps
    rate = RATE_OF_WIDTH / sizes.n_embd if config.learning_rate is None else config.learning_rate
    long = max(config.max_steps // 10, 1) if config.long_block_size and config.long_steps is None else config.long_steps
    return dataclasses.replace(config, **sizes.as_dict(), warmup_steps=warmup, learning_rate=rate, long_steps=long)


def read_initial(config: TrainConfig) -> tuple[bdh_spec.Params, BDHConfig]:
    """The checkpoint to start from: its weights, and its sizes with frequencies of its own, if it brings any."""
    assert config.init_from is not None
    return bdh_spec.read(Path(config.init_from), config.n_layer, cast("Freqs | None", config.freqs))


def differing(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """The fields in which two configurations are runs that cannot go on from one another."""
    return [
        f.name
        for f in dataclasses.fields(ours)
        if getattr(ours, f.name) != getattr(theirs, f.name) and f.name not in MAY_CHANGE
    ]
