"""The raw weights as ``nn.Linear`` modules, one for each head: what libraries look for that store weights or adapt them.

Axes: h head (nh of them), N neurons per head, D embedding width.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from bdh_torch.layer import Linears, Weights

Tensors: TypeAlias = dict[str, Tensor]
NAMES = ("encoder", "encoder_v", "decoder")
QUANTISERS = ("torchao", "bitsandbytes")  # those that BDH was run with


def joined(encoder: Any, encoder_v: Any, decoder: Any) -> Weights | Linears:
    """The weights that every layer applies: raw parameters, or a module for each head."""
    return (Weights if isinstance(encoder, Tensor) else Linears)(encoder, encoder_v, decoder)


def give_linears(body: Any, nh: int) -> None:
    """Put a module for each head in the place of each raw parameter, with the same values."""
    for name in NAMES:
        weight = getattr(body, name)
        delattr(body, name)
        setattr(body, name, nn.ModuleList(map(_linear, by_head(name, weight, nh))))


def _linear(weight: Tensor) -> nn.Linear:
    """A module that multiplies by a weight (out, in)."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=weight.requires_grad)
    return linear


def by_head(name: str, weight: Tensor, nh: int) -> tuple[Tensor, ...]:
    """A raw weight as each head's (out, in): the encoders' (N, D), the decoder's (D, N)."""
    heads = torch.unflatten(weight, 0, (nh, -1)) if name == "decoder" else weight
    return heads.mT.unbind()


def to_linear_names(raw: Tensors, nh: int) -> Tensors:
    """The tensors of a state dict of raw parameters, as modules have them."""
    named: Tensors = {}
    for name, tensor in raw.items():
        last = name.rpartition(".")[2]
        if last in NAMES:
            named |= {f"{name}.{h}.weight": weight.contiguous() for h, weight in enumerate(by_head(last, tensor, nh))}
        else:
            named[name] = tensor
    return named


def to_raw_names(linear: Tensors, nh: int) -> Tensors:
    """The opposite: what each head had by itself as one tensor again, as every file of BDH has it."""
    raw: Tensors = {}
    for name, tensor in linear.items():
        if not is_of_a_head(name):
            raw[name] = tensor
            continue
        place = name.rsplit(".", 2)[0]
        if place not in raw:
            heads = torch.stack([linear[f"{place}.{h}.weight"].mT for h in range(nh)])  # h in out
            raw[place] = heads.flatten(0, 1) if place.endswith("decoder") else heads
    return raw


def is_of_a_head(name: str) -> bool:
    """Whether a tensor is of a module of one head: backbone.encoder.0.weight."""
    return len(parts := name.split(".")) > 2 and parts[-3] in NAMES


def check_quantiser(wanted: Any, *, has_head: bool) -> None:
    """Refuse ways to store weights that BDH was never run with: of a configuration, or of what config.json says of one."""
    if not has_head:  # transformers leaves the last module of a model as it is, which is a head of the decoder there
        raise ValueError("a BDHModel is not quantised by itself: load it as AutoModelForCausalLM, and take its backbone")
    options = wanted if isinstance(wanted, dict) else vars(wanted)
    name = str(getattr(options.get("quant_method"), "value", options.get("quant_method")))
    if name not in QUANTISERS:
        raise ValueError(
            f"BDH was never run with weights stored by {name}: give a TorchAoConfig, or a BitsAndBytesConfig of 8 bits"
        )
    if any(options.get(key) for key in ("load_in_4bit", "_load_in_4bit")) and not torch.cuda.is_available():
        raise ValueError(
            "on a CPU bitsandbytes packs weights of 4 bits again as they are first read, and saves what cannot be loaded:"
            " take load_in_8bit=True, or torchao's IntxWeightOnlyConfig"
        )


def try_torchao(wanted: Any, model: Any) -> None:
    """Refuse, in torchao's words, what it cannot do on this machine: it shows when one head is stored and read."""
    kind = getattr(wanted, "quant_type", None)
    if kind is None or hasattr(kind, "fqn_to_config"):  # by name: some may be left as they are
        return
    torchao = import_module("torchao.quantization")  # by name: code that is saved beside weights does without it
    for name in ("encoder", "decoder"):
        weight = by_head(name, getattr(model, name), model.config.num_attention_heads)[0]
        linear = _linear(weight.detach().clone().requires_grad_(False))
        try:
            torchao.quantize_(linear, kind)
            linear(weight.new_zeros(1, weight.shape[1]))
        except (RuntimeError, ImportError, AssertionError, ValueError, TypeError) as error:
            raise ValueError(
                f"torchao's {type(kind).__name__} does not work on this machine's {weight.device.type} in {weight.dtype}:"
                f" {error}"
            ) from error


def check_stored(model: Any) -> None:
    """Refuse what a quantiser has passed by without a word, as torchao does where no group of numbers fits a row."""
    kept, config = model.hf_quantizer.modules_to_not_convert, model.hf_quantizer.quantization_config
    for name, weight in model.named_parameters():
        if is_of_a_head(name) and not is_narrow(weight) and should_convert_module(name, kept):
            raise ValueError(
                f"{type(getattr(config, 'quant_type', config)).__name__} has left {name} {tuple(weight.shape)} in"
                f" {weight.dtype}: choose groups that fit a row, or name it where modules are left as they are"
            )


def is_narrow(weight: Tensor) -> bool:
    """Whether a weight is stored as anything but the floating-point numbers that it stands for."""
    return type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point()


def is_of_torchao(weight: Any) -> bool:
    """Whether torchao stores a weight; it need not be installed."""
    return type(weight) not in (Tensor, nn.Parameter) and type(weight).__module__.startswith("torchao.")


def check_weights(weights: Weights | Linears, *, learns: bool) -> None:
    """Refuse what torchao's tensors would compute wrongly, or not at all; ``learns`` says that gradients will be asked for."""
    if isinstance(weights, Weights):
        if any(map(is_of_torchao, weights)):
            raise ValueError(
                "torchao has quantised raw parameters, which no kernel of BDH reads: call model.to_linear() before quantize_,"
                " which then finds an nn.Linear for each head"
            )
    elif learns and any(rounds_activations(head.weight) for heads in weights for head in heads):
        raise ValueError(
            "weights that round what they multiply as well pass no gradient on: learn on those of Int8WeightOnlyConfig"
        )


def rounds_activations(weight: Any) -> bool:
    """Whether torchao also rounds what is multiplied by this weight."""
    return any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))


def refuse_head_alone(head: Any) -> None:
    """Refuse a model of which torchao stores the head, and passed by all that is large."""
    if is_of_torchao(head):
        raise ValueError(
            "quantize_ has found lm_head alone, and left encoder, encoder_v and decoder, which are raw parameters, as they"
            " were: call model.to_linear() before it"
        )


def demand_plain(tensors: Tensors) -> None:
    """Refuse to save what torchao stores and transformers has not been told of."""
    if any(map(is_of_torchao, tensors.values())):
        raise ValueError(
            "quantize_ has not told transformers what it did, which therefore cannot save it: take from_pretrained(...,"
            " quantization_config=TorchAoConfig(...)), or torch.save(model.state_dict())"
        )
