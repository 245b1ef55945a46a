"""From what a checkpoint says of its model to the six numbers of a BDHConfig, or a refusal that names what is in the way."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bdh_convert.find import children, some
from bdh_convert.pickle_file import Foreign
from bdh_convert.raw import SMALL
from bdh_convert.tensors import Tensor
from bdh_convert.vocabulary import is_about_training
from bdh_spec.config import SIZES, BDHConfig
from bdh_spec.errors import ConfigError, ParamsError
from bdh_spec.files import shown
from bdh_spec.params import Params
from bdh_spec.rope import THETA

LARGEST = 2**31  # of the six numbers: no machine runs a model beyond
ALIASES = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head"}

# Switches that other models have, and the values at which they leave BDH as it is.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "rotary_embedding": ("rope",),
    "positional_encoding": ("rope",),
    "position_embedding_type": ("rope",),
    "positional": ("rope",),
    "pos_encoding": ("rope",),
    "use_rope": (True,),
    "rope": (True,),
    "rope_theta": (THETA,),
    "theta": (THETA,),
    "n_expert": (1,),
    "relu_threshold": (0,),
    "share_weights": (True,),
    "shared_weights": (True,),
    "weight_sharing": (True,),
    "share_layers": (True,),
    "layer_norm_eps": (1e-5,),
    "norm_eps": (1e-5,),
    "hidden_act": ("relu",),
    "activation": ("relu",),
    "causal": (True,),
    "is_decoder": (True, False),
    "model_type": ("bdh",),
    "model": ("bdh", "BDH"),
}

# What transformers writes beside the sizes, and what the function does not depend on. What only concerns training is known
# by its words.
HARMLESS = frozenset(
    """
    architectures auto_map torch_dtype dtype transformers_version _name_or_path use_cache max_position_embeddings
    bos_token_id eos_token_id pad_token_id sep_token_id tie_word_embeddings initializer_range return_dict
    attn_implementation _attn_implementation bdh_attn_implementation _attn_implementation_internal
    _attn_implementation_autoset chunk_size_feed_forward id2label label2id is_encoder_decoder tokenizer_class block_size
    init_std fused_kernels max_seq_len context_length generation_config steps epochs seed device
    _instantiator _target_
    temperature top_k top_p max_length min_length do_sample num_beams output_attentions output_hidden_states problem_type
    """.split()  # noqa: SIM905  one key a line would fill a page
)

CONTENT, VALUE = "_content", "_val"  # of OmegaConf
ENOUGH = 3  # of the six numbers, to know a configuration by

# Where a pickle keeps configurations, those of models before those of whole runs; and burn its changes.
CONFIGS = ("model_args", "model_config", "bdh_config", "config", "hyper_parameters", "hparams", "args")
NESTED = (*CONFIGS, "model", "overrides")


def written_in(tree: Mapping[Any, Any], home: Sequence[str]) -> dict[str, Any] | None:
    """The configuration in the mappings that lead to the weights; what an earlier one says counts."""
    levels: list[Any] = [tree]
    for key in home:
        levels.append(next(child for name, child in children(levels[-1]) or [] if str(name) == key))
    mappings = [level for level in levels if isinstance(level, Mapping)]
    found = [_fields(level[name]) for level in mappings for name in CONFIGS if name in level]
    found += [fields for level in mappings for fields in _by_what_they_hold(level)]
    return {key: value for fields in reversed(found) for key, value in fields.items()} or None


def _by_what_they_hold(level: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    """Configurations under other names, and what a mapping says itself: each tells most of a model's sizes."""
    plain = {str(key): value for key, value in level.items() if isinstance(value, (int, float, str))}
    others = (value for key, value in level.items() if key not in CONFIGS and not isinstance(value, Tensor))
    yield from filter(_tells_sizes, (*map(_fields, others), plain))


def _tells_sizes(fields: Mapping[str, Any]) -> bool:
    return bool(fields) and len({ALIASES.get(key, key) for key in _unnested(fields)} & set(SIZES)) >= ENOUGH


def is_a_configuration(name: str, tree: Mapping[Any, Any]) -> bool:
    """Whether something in a file is known for one, by its name or by what it holds."""
    return name in CONFIGS or (not isinstance(tree.get(name), Tensor) and _tells_sizes(_fields(tree.get(name))))


def unreadable_in(tree: Mapping[Any, Any]) -> list[str]:
    """The configurations of a pickle of which nothing can be read."""
    return [
        f"{name} (a {shown(tree[name].qualified, 80)})"
        for name in CONFIGS
        if isinstance(tree.get(name), Foreign) and not _fields(tree[name])
    ]


def _fields(config: Any) -> dict[str, Any]:
    """What a mapping, an object or a text in JSON says, by its keys."""
    values = config.attributes() if isinstance(config, Foreign) else config
    if isinstance(values, str) and values.startswith("{") and len(values) <= SMALL:
        with suppress(ValueError, RecursionError):
            values = json.loads(values)
    if not isinstance(values, Mapping):
        return {}
    # OmegaConf keeps its values in objects within an object
    inner = values[CONTENT] if isinstance(config, Foreign) and isinstance(values.get(CONTENT), Mapping) else values
    return {str(key): _value(value) for key, value in inner.items()}


def _value(value: Any) -> Any:
    return value.attributes().get(VALUE, value) if isinstance(value, Foreign) else value


def is_tied(raw: Mapping[str, Any] | None) -> bool | None:
    """Whether a configuration says that the head is the embedding; None where it says nothing."""
    said = (raw or {}).get("tie_word_embeddings")
    return None if said is None else bool(said)


def refuse_alibi(raw: Mapping[str, Any] | None) -> None:
    """burn's positions are alibi unless its configuration says otherwise."""
    said = _unnested(raw or {})
    if said.get("rotary_embedding") is None and said.get("use_alibi") is not False:
        raise ConfigError(
            "config.json does not say rotary_embedding = 'rope', and burn's default is alibi: this is another model"
        )


def complete(
    raw: Mapping[str, Any] | None, shapes: Params, n_layer: int | None = None, dropout: float | None = None
) -> tuple[BDHConfig, list[str]]:
    """The configuration that a file, its tensors' shapes and the command line give together, and what to tell the user.

    Shapes tell every size but the number of layers. What is said twice must be said the same.
    """
    said = sizes(raw or {})
    said = _merge(said, {"n_layer": n_layer, "dropout": dropout}, "the command line")
    said = _merge(said, _shown(shapes, said.get("mlp_internal_dim_multiplier")), "the shapes of the tensors")
    if "n_layer" not in said:
        raise ConfigError(
            "no configuration tells n_layer, and layers share weights so nothing else does: give --n-layer (in Python n_layer=)"
        )
    about_training = [key for key in _unnested(raw or {}) if is_about_training(key) and key not in HARMLESS]
    notes = [f"left alone in the configuration, being about training: {some(about_training)}"] if about_training else []
    if "dropout" not in said:
        said["dropout"] = BDHConfig.dropout
        notes.append(
            f"nothing tells dropout: {said['dropout']} is recorded, which acts in training only (--dropout says otherwise)"
        )
    return BDHConfig.from_dict(said), notes


def sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Those of our six numbers that a foreign configuration tells, if it describes no other model."""
    flat = {ALIASES.get(key, key): value for key, value in _unnested(raw).items()}
    for key, value in flat.items():
        if key not in SIZES and not _leaves_bdh_alone(key, value):
            raise ConfigError(
                f"the configuration has {shown(key, 80)} = {_spelt(value)}, which BDH has not: another model, or a key that can"
                " go"
            )
    return {key: _number(key, flat[key]) for key in SIZES if flat.get(key) is not None}


def _number(key: str, value: Any) -> float | int:
    if isinstance(value, (int, float)) and not abs(value) > LARGEST:
        return value
    raise ConfigError(f"the configuration has {key} = {_spelt(value)}: it must be a number up to {LARGEST:,}")


def _spelt(value: Any) -> str:
    """A value as Python writes it, however deep, long or circular it is."""
    if isinstance(value, int) and abs(value) > LARGEST**2:
        return f"a whole number of {value.bit_length():,} bits"
    return shown(reprlib.repr(value), 80)


def _unnested(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations within a configuration say the same as if they stood in it."""
    flat = dict(raw)
    for key in NESTED:
        flat |= _fields(flat.pop(key)) if _fields(flat.get(key)) else {}
    return flat


def _leaves_bdh_alone(key: str, value: Any) -> bool:
    if value is None or key in HARMLESS:
        return True
    if key in SWITCHES:
        return value in SWITCHES[key]
    is_a_path = isinstance(value, str) and "/" in value
    return is_a_path or is_about_training(key) or value in (False, 0, "", "none") or value in ([], {}, ())


def _merge(said: dict[str, Any], more: Mapping[str, Any], source: str) -> dict[str, Any]:
    for key, value in more.items():
        if value is not None and said.get(key, value) != value:
            raise ConfigError(f"the configuration has {key} = {_spelt(said[key])}, {source} {value!r}: find out which is right")
    return said | {key: value for key, value in more.items() if value is not None}


def _shown(shapes: Params, multiplier: int | None) -> dict[str, int]:
    """What the shapes of embed (V, D) and encoder (nh, D, N) tell."""
    if len(shapes.embed) != 2 or len(shapes.encoder) != 3 or 0 in shapes.embed + shapes.encoder:
        raise ParamsError(f"embed has shape {shapes.embed} and encoder {shapes.encoder}: they are (V, D) and (nh, D, N)")
    (V, D), (nh, _, N) = shapes.embed, shapes.encoder
    shown = {"vocab_size": V, "n_embd": D, "n_head": nh}
    return shown if multiplier is not None else shown | {"mlp_internal_dim_multiplier": _multiplier(N, nh, D)}


def _multiplier(N: int, nh: int, D: int) -> int:
    """The smallest m with m * D // nh == N: where several give the same N, they give the same model."""
    smallest = -(-N * nh // D)
    if smallest * D // nh != N:
        raise ConfigError(f"encoder has {N} neurons in each of {nh} heads: no multiple of n_embd = {D} divides into that")
    return smallest
