"""What --inspect tells of a file, sound or not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdh_convert.convert import Settings, convert
from bdh_convert.inspect import report
from bdh_convert.verify import SENTENCE
from bdh_spec import BDHConfig, Params
from bdh_spec.files import write_safetensors
from bdh_spec.params import count

Weights = Callable[[BDHConfig], Params]
Run = Callable[..., subprocess.CompletedProcess[str]]


def upstream(params: Params) -> dict[str, Any]:
    named = params._asdict()
    return {"embed.weight": named.pop("embed"), **named}


@pytest.mark.parametrize(
    ("target", "name", "container"),
    [("torch", "m.pt", "pt"), ("mlx", "m.npz", "npz"), ("hf", "m", "hf"), ("jax", "m.safetensors", "safetensors")],
)
def test_a_sound_file_is_described_and_nothing_is_suspicious(
    target: str,
    name: str,
    container: str,
    small: BDHConfig,
    weights: Weights,
    canonical: Callable[[BDHConfig], Path],
    tmp_path: Path,
    call: Run,
) -> None:
    convert(canonical(small), target, tmp_path / name, Settings())
    done = call("--inspect", name, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert list(found) == [
        "path",
        "container",
        "dialect",
        "config",
        "config_as_written",
        "tokenizer",
        "parameters",
        "bytes",
        "loss",
        "tensors",
        "suspicious",
    ]
    assert (found["container"], found["dialect"], found["config"]) == (container, target, small.as_dict())
    assert found["parameters"] == count(small)
    assert found["suspicious"] == (["lm_gate is left out: no equation uses it"] if target == "mlx" else [])
    encoder = next(tensor for tensor in found["tensors"] if tensor["name"].endswith("encoder"))
    values = weights(small).encoder.astype(np.float64)
    assert (encoder["shape"], encoder["dtype"], encoder["bytes"]) == ([2, 8, 16], "float32", 1024)
    assert (encoder["min"], encoder["max"], encoder["nonfinite"]) == (values.min(), values.max(), 0)
    assert encoder["mean"] == pytest.approx(values.mean())
    assert encoder["std"] == pytest.approx(values.std())


def test_people_get_a_table(small: BDHConfig, canonical: Callable[[BDHConfig], Path], call: Run) -> None:
    done = call("--inspect", canonical(small).name)
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("numpy in safetensors", "n_layer 1", "944 parameters", "encoder_v", "2x8x16", "float32", "nothing suspicious"):
        assert part in done.stdout


def spoilt(params: Params, config: BDHConfig, what: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Tensors and a configuration with one thing wrong."""
    tensors, described = upstream(params), config.as_dict()
    if what == "nan":
        params.decoder[:2] = np.nan
    if what == "freqs":
        tensors["attn.freqs"] = np.full((1, 1, 1, config.n_neurons), 0.1, np.float32)
    if what == "head":
        tensors["lm_head"] = params.lm_head.T.copy()
    if what == "zeros":
        params.encoder_v[:] = 0
    if what == "unknown":
        tensors["memory_bank"] = np.zeros(3, np.float32)
    if what == "missing":
        del tensors["decoder"]
    if what == "switch":
        described["k_sparse"] = 8
    if what == "gate":
        tensors["lm_gate"] = np.ones((config.n_embd, 1), np.float32)
    if what == "dropout":
        del described["dropout"]
    return tensors, None if what == "config" else described


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("nan", "decoder holds 16 values that are not finite"),
        ("freqs", "attn.freqs differs from BDH's frequency table by up to "),
        ("head", "lm_head has shape (11, 8), its dialect stores (8, 11): it is transposed"),
        ("zeros", "encoder_v is 0.0 everywhere"),
        ("unknown", "the file holds memory_bank, which no dialect of BDH has"),
        ("missing", "no tensor is named decoder"),
        ("switch", "the configuration has k_sparse = 8, which BDH has not"),
        ("gate", "lm_gate is left out"),
        ("dropout", "nothing tells dropout"),
        ("config", "no configuration tells n_layer"),
    ],
)
def test_everything_suspicious_is_named_and_is_no_refusal(
    what: str, line: str, small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    tensors, described = spoilt(weights(small), small, what)
    write_safetensors(tmp_path / "m", tensors, {})
    if described is not None:
        (tmp_path / "config.json").write_text(json.dumps(described))
    found = report(tmp_path / "m")
    assert [said for said in found["suspicious"] if said.startswith(line)], found["suspicious"]
    assert {tensor["name"] for tensor in found["tensors"]} == set(tensors)
    json.dumps(found, allow_nan=False)


def test_a_square_head_on_its_side_shows_in_the_loss(weights: Weights, tmp_path: Path) -> None:
    config = BDHConfig(n_layer=1, n_embd=64, n_head=1, mlp_internal_dim_multiplier=1, vocab_size=64)
    given = weights(config)
    rng = np.random.default_rng(3)
    embed = rng.normal(size=(64, 64)).astype(np.float32)
    # A model that predicts the sentence: its head maps each token's embedding to the token that follows in it.
    text = np.frombuffer(SENTENCE, np.uint8).astype(int) % 64
    head = np.zeros((64, 64), np.float32)
    for now, following in pairwise(text):
        head[:, following] += embed[now]
    quiet = given._replace(embed=embed, encoder=given.encoder * 0 + np.float32(1e-3), lm_head=head)
    for lm_head, suspicious in ((head, False), (head.T.copy(), True)):
        write_safetensors(tmp_path / "m", upstream(quiet._replace(lm_head=lm_head)), {})
        (tmp_path / "config.json").write_text(json.dumps(config.as_dict()))
        lines = report(tmp_path / "m")["suspicious"]
        assert any(line.startswith("lm_head looks transposed") for line in lines) is suspicious


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, call: Run) -> None:
    (tmp_path / "m").write_text("words")
    done = call("--inspect", "m", "--json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
