"""A model as a file of ONNX that onnxruntime reads, and as a port for the suite: forward, of any number of texts of any length.

python examples/onnx_port.py checkpoint.safetensors model.onnx
bdh-conform examples.onnx_port:OnnxBackend --tier smoke

Needs onnx, onnxscript and onnxruntime: pip install 'bdh-spec[onnx]'.
"""

from __future__ import annotations

import logging
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import bdh_spec
from bdh_spec import Backend, BDHError, Capabilities, Model
from bdh_spec.model import forward
from bdh_torch import BDH
from bdh_torch.backend import NAMES

OPSET = 20


class Trace(BDH):
    """Tokens (B, T) to logits (B, T, V) by the parallel form, for texts of any length."""

    def forward(self, idx: Tensor) -> Tensor:  # type: ignore[override]  # there is no loss
        return self.trace(idx)


class Forward(nn.Module):
    """The same of any weights, which come in beside the tokens."""

    def __init__(self, config: bdh_spec.BDHConfig) -> None:
        super().__init__()
        self.model = Trace(config, kernel="plain")

    def forward(
        self, tokens: Tensor, embed: Tensor, encoder: Tensor, encoder_v: Tensor, decoder: Tensor, lm_head: Tensor
    ) -> Tensor:
        weights = (embed, encoder, encoder_v, decoder, lm_head)
        return torch.func.functional_call(self.model, dict(zip(NAMES, weights, strict=True)), (tokens,))


@lru_cache
def exported(config: bdh_spec.BDHConfig) -> onnx.ModelProto:
    """The program of all models of these sizes: tokens of texts of any number and length, and the five weights, to logits."""
    model = Forward(config).eval()
    given = [model.model.get_parameter(name) for name in NAMES]
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says of its own code
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, dtype=torch.long), *given),
            input_names=["tokens", *bdh_spec.Params._fields],
            output_names=["logits"],
            dynamic_shapes={"tokens": sizes, **dict.fromkeys(bdh_spec.Params._fields)},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    return program.model_proto


def with_weights(params: bdh_spec.Params, config: bdh_spec.BDHConfig) -> onnx.ModelProto:
    """The program of one model, which takes tokens alone."""
    program = onnx.ModelProto()
    program.CopyFrom(exported(config))
    (tokens,) = [given for given in program.graph.input if given.name == "tokens"]
    del program.graph.input[:]
    program.graph.input.append(tokens)
    for name, weight in params._asdict().items():
        program.graph.initializer.append(onnx.numpy_helper.from_array(np.array(weight, np.float32), name))
    return program


def session(program: bytes | str) -> onnxruntime.InferenceSession:
    """A program that is ready to run: its bytes, or the name of its file."""
    return onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])


class OnnxModel(Model):
    """A program of ONNX behind the protocol."""

    def __init__(self, params: bdh_spec.Params, config: bdh_spec.BDHConfig, **how: Any) -> None:
        super().__init__(config, **how)
        self.session = session(with_weights(params, config).SerializeToString())

    def _forward(self, tokens: np.ndarray) -> np.ndarray:
        (logits,) = self.session.run(["logits"], {"tokens": tokens})
        return logits


class OnnxBackend(Backend):
    """The port named ``onnxruntime``."""

    name = "onnxruntime"
    capabilities = Capabilities(dtypes=("float32",), phases=("exact",), verbs=("forward", "frequencies"))

    def version(self) -> str:
        return f"onnxruntime {onnxruntime.__version__}"

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def _load(self, params: bdh_spec.Params, config: bdh_spec.BDHConfig, **how: Any) -> Model:
        return OnnxModel(params, config, **how)


def main() -> None:
    """Write a checkpoint as a program, read it back, and hold it to the specification on a sentence."""
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/onnx_port.py CHECKPOINT MODEL.onnx")
    checkpoint, file = map(Path, sys.argv[1:])
    if file.exists():
        sys.exit(f"{file} exists: choose another name")
    try:
        params, config = bdh_spec.read(checkpoint)
    except (BDHError, OSError) as error:
        sys.exit(str(error))
    onnx.save(with_weights(params, config), file)
    tokens = np.frombuffer(b"The small smooth-skinned dragon", np.uint8).astype(np.int64)[None] % config.vocab_size
    (found,) = session(str(file)).run(["logits"], {"tokens": tokens})
    expected = forward(tokens, params, config)
    worst = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    print(f"{file}: {file.stat().st_size:,} bytes, worst row {worst.max():.1e} from the specification")


if __name__ == "__main__":
    main()
