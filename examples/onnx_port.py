"""A model as a file of ONNX that onnxruntime reads, and as a port for the suite: forward, of any number of texts of any length.

python examples/onnx_port.py checkpoint.safetensors model.onnx
bdh-conform examples.onnx_port:OnnxBackend --tier smoke

Needs onnx, onnxscript and onnxruntime: pip install 'bdh-spec[onnx]'.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import bdh_spec
from bdh_spec import Backend, BDHError, Capabilities, Model
from bdh_spec.model import forward
from bdh_torch import BDH
from bdh_torch.backend import filled

OPSET = 20


class Forward(nn.Module):
    """Tokens (B, T) to logits (B, T, V), and nothing else."""

    def __init__(self, model: BDH) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.trace(tokens)


def exported(params: bdh_spec.Params, config: bdh_spec.BDHConfig, dtype: str = "float32") -> Any:
    """A model as a program of ONNX, for any number of texts of any length."""
    model = Forward(filled(lambda: BDH(config, kernel="plain"), params, "cpu", dtype)).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says of its own code
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        return torch.onnx.export(
            model,
            (torch.zeros(2, 3, dtype=torch.long),),
            input_names=["tokens"],
            output_names=["logits"],
            dynamic_shapes={"tokens": sizes},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )


def session(program: bytes | str) -> onnxruntime.InferenceSession:
    """A program that is ready to run: its bytes, or the name of its file."""
    return onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])


class OnnxModel(Model):
    """A program of ONNX behind the protocol."""

    def __init__(self, params: bdh_spec.Params, config: bdh_spec.BDHConfig, **how: Any) -> None:
        super().__init__(config, **how)
        self.session = session(exported(params, config, self.dtype).model_proto.SerializeToString())

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
    exported(params, config).save(file, external_data=False)
    tokens = np.frombuffer(b"The small smooth-skinned dragon", np.uint8).astype(np.int64)[None] % config.vocab_size
    (found,) = session(str(file)).run(["logits"], {"tokens": tokens})
    expected = forward(tokens, params, config)
    worst = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    print(f"{file}: {file.stat().st_size:,} bytes, worst row {worst.max():.1e} from the specification")


if __name__ == "__main__":
    main()
