"""Hugging Face folders, the paper's listing, burn's records, and what a configuration can say."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bdh_spec
from bdh_convert.checkpoint import open_checkpoint, read
from bdh_convert.configs import complete
from bdh_convert.convert import Settings, convert
from bdh_convert.steps import Wishes
from bdh_spec import BDHConfig, BDHError, CheckpointError, ConfigError, Params, ParamsError
from bdh_spec.files import read_safetensors, write_safetensors
from bdh_spec.params import shapes

Weights = Callable[[BDHConfig], Params]


def same(found: Params, wanted: Params) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))


def backbone(params: Params) -> dict[str, Any]:
    """The tensors of bdh-transformers, with its head on its side."""
    named = {f"backbone.{name}": value for name, value in params._asdict().items() if name not in ("embed", "lm_head")}
    return {**named, "backbone.embed.weight": params.embed, "lm_head.weight": params.lm_head.T.copy()}


def hf_config(config: BDHConfig, **more: Any) -> dict[str, Any]:
    """config.json as transformers 4.57 writes it for bdh-transformers."""
    return {
        "architectures": ["BDHForCausalLM"],
        "bdh_attn_implementation": "bdh_recurrent",
        "bos_token_id": 0,
        "dropout": config.dropout,
        "dtype": "float32",
        "eos_token_id": 0,
        "hidden_size": config.n_embd,
        "max_position_embeddings": 4096,
        "mlp_internal_dim_multiplier": config.mlp_internal_dim_multiplier,
        "model_type": "bdh",
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "pad_token_id": 1,
        "sliding_window": None,
        "transformers_version": "4.57.0",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    } | more


def folder(path: Path, tensors: dict[str, Any], config: dict[str, Any]) -> Path:
    path.mkdir()
    write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_folder_of_transformers_is_read(config: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", backbone(weights(config)), hf_config(config))
    for name in (path, path / "model.safetensors"):
        found, described = read(name)
        assert described == config
        assert same(found, weights(config))


def test_a_written_folder_says_what_transformers_needs(
    small: BDHConfig, weights: Weights, canonical: Callable[[BDHConfig], Path], tmp_path: Path
) -> None:
    convert(canonical(small), "hf", tmp_path / "m", Settings(dtype="bf16"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bdh", ["BDHForCausalLM"])
    assert config["tie_word_embeddings"] is False
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]) == (1, 8, 2)
    tensors, about = read_safetensors(tmp_path / "m" / "model.safetensors")
    assert set(tensors) == set(backbone(weights(small)))
    assert about["format"] == "pt"  # transformers refuses anything else


def test_shards_are_read_as_one(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    tensors, where = backbone(weights(small)), {}
    for i, name in enumerate(tensors):
        shard = f"model-{i % 2 + 1:05}-of-00002.safetensors"
        where[name] = shard
    for shard in set(where.values()):
        write_safetensors(path / shard, {name: tensors[name] for name in tensors if where[name] == shard}, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_text(json.dumps(hf_config(small)))
    assert same(read(path)[0], weights(small))
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors does not exist"):
        read(path)


@pytest.mark.parametrize("content", ['{"weight_map": {}}', '{"weight_map": {"a": "../secret"}}', "{", "[]"])
def test_an_index_in_ruins_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read(tmp_path)


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True}], ids=["silent", "tied"])
def test_an_absent_head_is_the_embedding_where_transformers_ties(
    said: dict[str, Any], weights: Weights, small: BDHConfig, tmp_path: Path
) -> None:
    tensors = backbone(weights(small))
    del tensors["lm_head.weight"]
    path = folder(tmp_path / "m", tensors, hf_config(small, **said))
    found, _ = read(path)
    assert np.array_equal(found.lm_head, weights(small).embed.T)
    assert "the head is tied to the embedding" in open_checkpoint(path).notes[0]
    convert(path, "hf", tmp_path / "again", Settings())
    assert "lm_head.weight" in read_safetensors(tmp_path / "again" / "model.safetensors")[0]


def test_an_absent_head_that_is_not_tied_is_missing(weights: Weights, small: BDHConfig, tmp_path: Path) -> None:
    tensors = backbone(weights(small))
    del tensors["lm_head.weight"]
    with pytest.raises(ParamsError, match=r"no tensor is named lm_head\.weight"):
        read(folder(tmp_path / "m", tensors, hf_config(small, tie_word_embeddings=False)))


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(
    weights: Weights, small: BDHConfig, tmp_path: Path
) -> None:
    given = weights(small)
    with pytest.raises(ParamsError, match=r"config\.json ties the head to the embedding, but lm_head\.weight differs"):
        read(folder(tmp_path / "different", backbone(given), hf_config(small, tie_word_embeddings=True)))
    tied = given._replace(lm_head=given.embed.T.copy())
    assert same(read(folder(tmp_path / "same", backbone(tied), hf_config(small, tie_word_embeddings=True)))[0], tied)


def test_the_papers_listing_is_read_by_rank_and_not_by_name(config: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    given = weights(config)
    listing = {
        "wte.weight": given.embed,
        "encoder": given.decoder,
        "decoder_x": given.encoder,
        "decoder_y": given.encoder_v,
        "readout": given.lm_head,
    }
    torch.save({name: torch.from_numpy(value) for name, value in listing.items()}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt", Wishes(n_layer=config.n_layer))
    assert checkpoint.dialect == "paper"
    assert same(read(tmp_path / "m.pt", config.n_layer)[0], given)
    listing["encoder"] = given.encoder  # by name the listing's, by rank not
    torch.save({name: torch.from_numpy(value) for name, value in listing.items()}, tmp_path / "m.pt")
    with pytest.raises(BDHError):
        read(tmp_path / "m.pt", config.n_layer)


def whole(value: int) -> bytes:
    """A whole number as bincode 2 writes it."""
    if value < 251:
        return bytes([value])
    tag, width = (251, 2) if value < 2**16 else (252, 4) if value < 2**32 else (253, 8)
    return bytes([tag]) + value.to_bytes(width, "little")


def string(text: str) -> bytes:
    return whole(len(text)) + text.encode()


def burn_record(params: Params, dtype: str = "f32", version: str = "0.19.0") -> bytes:
    """A record byte by byte: recorder, five None for sizes, then parameters among the None of dropout and attention."""
    recorder = "burn_core::record::file::BinFileRecorder<burn_core::record::settings::FullPrecisionSettings>"
    out = b"".join(map(string, (dtype, "i32", recorder, version, "FullPrecisionSettings")))
    for name, nones in zip(Params._fields, (5, 7, 0, 0, 0), strict=True):
        value = getattr(params, name)
        data = value.tobytes()
        shape = whole(value.ndim) + b"".join(map(whole, value.shape))
        out += b"\0" * nones + string("ABCDEFGHIJKLM") + whole(len(data)) + data + shape + whole(1)
    return out


def test_a_record_of_burn_is_read(config: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(burn_record(weights(config)))
    overrides = config.as_dict() | {"rotary_embedding": "rope", "fused_kernels": True, "block_size": None}
    del overrides["vocab_size"]  # that is its tokenizer's
    (tmp_path / "config.json").write_text(json.dumps({"run_name": "quirky", "block_size": 512, "overrides": overrides}))
    assert open_checkpoint(tmp_path / "model.bin").dialect == "burn"
    found, described = read(tmp_path / "model.bin")
    assert described == config
    assert same(found, weights(config))


def test_a_record_of_burn_in_half_precision_is_read(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    half = Params(*(weight.astype(np.float16) for weight in weights(small)))
    (tmp_path / "model.bin").write_bytes(burn_record(half, "half::binary16::f16"))
    (tmp_path / "config.json").write_text(json.dumps({"overrides": {"n_layer": 1, "rotary_embedding": "rope"}}))
    assert same(read(tmp_path / "model.bin")[0], half)


@pytest.mark.parametrize("overrides", [{"rotary_embedding": "alibi"}, {"rotary_embedding": "pope"}, {"use_alibi": True}, {}])
def test_a_record_of_burn_with_other_positions_is_refused(
    overrides: dict[str, Any], small: BDHConfig, weights: Weights, tmp_path: Path
) -> None:
    (tmp_path / "model.bin").write_bytes(burn_record(weights(small)))
    (tmp_path / "config.json").write_text(json.dumps({"overrides": {"n_layer": 1, **overrides}}))
    with pytest.raises(ConfigError, match=r"rotary_embedding = '(alibi|pope)', which BDH has not|burn's default is alibi"):
        read(tmp_path / "model.bin")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="burn's default is alibi"):
        read(tmp_path / "model.bin", 1)


def test_a_record_of_burn_is_read_where_alibi_is_off(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(burn_record(weights(small)))
    (tmp_path / "config.json").write_text(json.dumps({"overrides": {"n_layer": 1, "use_alibi": False}}))
    assert same(read(tmp_path / "model.bin")[0], weights(small))


def test_a_record_of_burn_that_is_cut_or_another_models_is_refused(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    record = burn_record(weights(small))
    for content in (
        record[:-30],
        record[:200],
        record + string("ABCDEFGHIJKLM") + whole(4) + b"abcd" + whole(1) + whole(1) + whole(1),
    ):
        (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(CheckpointError):
            read(tmp_path / "model.bin", 1)
    (tmp_path / "model.bin").write_bytes(burn_record(weights(small), "i8"))
    with pytest.raises(CheckpointError, match="was recorded in another type"):
        read(tmp_path / "model.bin", 1)


def test_big_endian_numbers_of_torch_are_read(small: BDHConfig, weights: Weights, tmp_path: Path) -> None:
    given = weights(small)
    named = given._asdict()
    torch.save(
        {"embed.weight": torch.from_numpy(named.pop("embed"))} | {k: torch.from_numpy(v) for k, v in named.items()},
        tmp_path / "m.pt",
    )
    with zipfile.ZipFile(tmp_path / "m.pt") as archive, zipfile.ZipFile(tmp_path / "big.pt", "w") as big:
        for name in archive.namelist():
            data = archive.read(name)
            if "/data/" in name:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            big.writestr(name, b"big" if name.endswith("byteorder") else data)
    assert same(read(tmp_path / "big.pt", 1)[0], given)


def test_shapes_tell_every_size_but_the_number_of_layers(config: BDHConfig) -> None:
    found, _ = complete({"dropout": config.dropout}, shapes(config), config.n_layer, None)
    assert (found.n_neurons, found.n_head, found.n_embd, found.vocab_size) == (
        config.n_neurons,
        config.n_head,
        config.n_embd,
        config.vocab_size,
    )
    assert found.mlp_internal_dim_multiplier == config.mlp_internal_dim_multiplier


def test_where_several_multipliers_give_one_width_the_smallest_is_taken() -> None:
    wide = BDHConfig(n_layer=1, n_embd=2, n_head=5, mlp_internal_dim_multiplier=6)  # 6 * 2 // 5 = 5 * 2 // 5 = 2
    found, _ = complete({}, shapes(wide), 1, 0.0)
    assert found.mlp_internal_dim_multiplier == 5
    assert shapes(found)[:4] == shapes(wide)[:4]
    kept, _ = complete(wide.as_dict(), shapes(wide))
    assert kept == wide


def test_a_width_that_no_multiplier_gives_is_refused() -> None:
    config = BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    odd = shapes(config)._replace(encoder=(2, 8, 14))
    with pytest.raises(ConfigError, match="no multiple of n_embd = 8 divides into that"):
        complete({}, odd, 1, 0.0)


@pytest.mark.parametrize("bad", [{"n_layer": "six"}, {"n_layer": 0}, {"n_layer": 2.0}, {"dropout": 1.5}, {"n_layer": True}])
def test_a_number_that_describes_no_model_is_refused(bad: dict[str, Any], small: BDHConfig) -> None:
    with pytest.raises(ConfigError):
        complete(small.as_dict() | bad, shapes(small))


def test_bdh_spec_loads_every_dialect_through_this_reader(
    small: BDHConfig, canonical: Callable[[BDHConfig], Path], tmp_path: Path
) -> None:
    source = canonical(small)
    wanted = bdh_spec.load(source, "numpy").generate(b"\1", 5, seed=1)
    for target, name in (("torch", "m.pt"), ("mlx", "m.npz"), ("hf", "m"), ("jax", "m.safetensors")):
        convert(source, target, tmp_path / name, Settings())
        model = bdh_spec.load(tmp_path / name, "numpy")
        assert model.config == small
        assert model.generate(b"\1", 5, seed=1) == wanted
    assert math.isfinite(model.loss(np.array([[1, 2, 3]]), np.array([[2, 3, 4]])))
