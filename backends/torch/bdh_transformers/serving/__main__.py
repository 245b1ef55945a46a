"""python -m bdh_transformers.serving: the command line of the server."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bdh_spec
from bdh_spec import BDHError
from bdh_spec.dtypes import dtype_name
from bdh_torch.backend import TorchBackend
from bdh_transformers import BDHConfig, BDHForCausalLM, BDHTokenizer
from bdh_transformers.batching import state_bytes

try:
    import uvicorn

    from bdh_transformers.serving.service import Limits, Service
except ModuleNotFoundError as missing:
    sys.exit(f"serving: {missing.name} is not installed: pip install 'bdh-spec[serve]'")

MISUSE, INTERRUPTED = 2, 130


def read(checkpoint: Path | None) -> tuple[BDHForCausalLM, Any]:
    """A model and its tokenizer: from a folder of transformers, from a file of any dialect, or the embedded one."""
    if checkpoint is not None and (checkpoint / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True)
        has_tokenizer = (checkpoint / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True) if has_tokenizer else BDHTokenizer()
    else:
        params, config = bdh_spec.read(checkpoint)
        model, tokenizer = BDHForCausalLM(BDHConfig.from_sizes(config)), BDHTokenizer()
        body, weights = model.backbone, params._replace(lm_head=params.lm_head.T)
        own = (body.embed.weight, body.encoder, body.encoder_v, body.decoder, model.lm_head.weight)
        for weight, value in zip(own, weights, strict=True):
            weight.data.copy_(torch.from_numpy(np.array(value, np.float32)))
    if not isinstance(model, BDHForCausalLM) or not isinstance(tokenizer, BDHTokenizer):
        raise click.UsageError(
            f"{checkpoint} has a {type(model).__name__} and a {type(tokenizer).__name__}: this server writes bytes, by a"
            " BDHForCausalLM and a BDHTokenizer"
        )
    return model, tokenizer


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("--host", default="127.0.0.1", help="The address to listen at.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes any that is free.")
@click.option("--name", help="What clients call the model.  [default: the checkpoint's name]")
@click.option("--device", default="cpu", help="Such as cpu or cuda.")
@click.option("--dtype", default="float32", help="Of the weights.")
@click.option("--places", default=32, type=click.IntRange(1), help="Texts that are written at once.")
@click.option("--queue", "waiting", default=64, type=click.IntRange(0), help="Texts that may wait for a place.")
@click.option("--chunk", default=256, type=click.IntRange(1), help="Tokens of prompts that are read between two of a text.")
@click.option("--max-tokens", default=4096, type=click.IntRange(1), help="The longest text that is written.")
@click.option("--max-body", default=2**20, type=click.IntRange(1), help="The longest request, in bytes.")
@click.option("--drain", default=30, type=click.IntRange(0), help="Seconds that texts may go on after SIGTERM or Ctrl-C.")
def command(
    checkpoint: Path | None,
    host: str,
    port: int,
    name: str | None,
    device: str,
    dtype: str,
    places: int,
    waiting: int,
    chunk: int,
    max_tokens: int,
    max_body: int,
    drain: int,
) -> None:
    """Serve CHECKPOINT, a file or folder of any dialect; without one the small embedded model."""
    demand("device", device.split(":")[0], TorchBackend().devices())
    demand("dtype", dtype := dtype_name(dtype), TorchBackend.capabilities.dtypes)
    model, tokenizer = read(checkpoint)
    model = model.to(device, getattr(torch, dtype)).eval()
    name = name or (checkpoint.resolve().stem if checkpoint else "hatchling")
    service = Service(model, tokenizer, name, chunk, Limits(places, waiting, max_tokens, max_body))
    listening = socket.create_server((host, port))
    config = uvicorn.Config(service.app(), log_level="warning", timeout_graceful_shutdown=drain, lifespan="on")
    server = uvicorn.Server(config)
    service.when_broken = lambda: setattr(server, "should_exit", True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # which uvicorn raises again once all texts have ended
    address = f"http://{host}:{listening.getsockname()[1]}/v1"
    size = state_bytes(model.config) / 1e6
    print(f"{name} at {address}: {places} texts at once, {size:.1f} MB each", file=sys.stderr, flush=True)
    server.run(sockets=[listening])
    if service.writer.failure is not None:
        raise service.writer.failure


def demand(what: str, asked: str, offered: tuple[str, ...]) -> None:
    """Refuse what is not there."""
    if asked not in offered:
        raise click.UsageError(f"there is no {what} {asked!r} here: choose from {', '.join(offered)}")


def main() -> None:
    """Run the command: bad input is one sentence on stderr and exit status 2."""
    try:
        command.main(standalone_mode=False)
    except (click.ClickException, BDHError, OSError) as error:
        print(f"serving: {error.format_message() if isinstance(error, click.ClickException) else error}", file=sys.stderr)
        sys.exit(MISUSE)
    except (KeyboardInterrupt, click.Abort):
        print("serving: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
