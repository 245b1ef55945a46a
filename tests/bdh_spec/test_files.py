"""Checkpoints and states on disk: whole or not at all, and refused with a reason."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import bdh_spec
from bdh_conformance.yardstick.cases import CONFIGS, Case
from bdh_spec import CheckpointError, ConfigError, ParamsError, checkpoint, fingerprint, model, safetensors_writer
from bdh_spec.files import write_safetensors
from bdh_spec.params import Array, cast

CASE = Case(CONFIGS["three_heads"], seed=1)
STATE = model.advance(model.init_state(2, CASE.config), CASE.tokens, cast(CASE.params, np.float32), CASE.config)[1]
PENDING = CASE.tokens[:, -1:]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path, dtype: type) -> None:
    params = cast(CASE.params, dtype)
    bdh_spec.save(tmp_path / "model.safetensors", params, CASE.config)
    read, config = checkpoint.read(tmp_path / "model.safetensors")
    assert config == CASE.config
    for written, back in zip(params, read, strict=True):
        assert back.dtype == dtype
        assert back.tobytes() == written.tobytes()
    assert fingerprint(read) == fingerprint(params)


def test_an_array_that_is_not_contiguous_is_written_as_what_it_says(tmp_path: Path) -> None:
    params = cast(CASE.params, np.float32)
    turned = params._replace(lm_head=np.asfortranarray(params.lm_head))
    bdh_spec.save(tmp_path / "model.safetensors", turned, CASE.config)
    assert np.array_equal(checkpoint.read(tmp_path / "model.safetensors")[0].lm_head, params.lm_head)


def fill(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape).astype(dtype)


tensors = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
    st.builds(
        fill,
        st.sampled_from(list(safetensors_writer.DTYPES.values())),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
    ),
    max_size=6,
)


@given(tensors, st.sampled_from([{}, {"format": "bdh"}]))
def test_a_file_is_byte_for_byte_what_safetensors_writes_where_it_has_one_order(
    tensors: dict[str, Array], metadata: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_safetensors(Path(folder) / "f", tensors, metadata)
        assert (Path(folder) / "f").read_bytes() == safetensors.numpy.save(tensors, metadata or None)


SAVE = (
    "import sys; import bdh_spec\n"
    "from bdh_spec import checkpoint, model\n"
    "from bdh_spec.files import write_safetensors\n"
    "params, config = bdh_spec.read()\n"
    "bdh_spec.save(sys.argv[1] + '/m', params, config)\n"
    "state = model.advance(model.init_state(1, config), bdh_spec.protocol.as_tokens('The '), params, config)[1]\n"
    "checkpoint.save_state(sys.argv[1] + '/s', state, config, 'x', bdh_spec.protocol.as_tokens('T'))\n"
    "about = {key: key for key in set('format spec_version config dialect tokenizer'.split())}  # in any order\n"
    "write_safetensors(bdh_spec.checkpoint.Path(sys.argv[1]) / 't', params._asdict(), about)\n"
)


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / seed)], check=True, env=environment)
    for name in ("m", "s", "t"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_what_safetensors_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="encoder is complex128, which safetensors cannot hold"):
        write_safetensors(tmp_path / "f", {"encoder": np.zeros(2, complex)}, {})
    assert not list(tmp_path.iterdir())


def test_big_endian_numbers_are_written_as_the_format_wants_them(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "f", {"x": np.arange(3, dtype=">f4")}, {})
    assert np.array_equal(safetensors.numpy.load_file(tmp_path / "f")["x"], np.arange(3, dtype="<f4"))


def test_the_fingerprint_tells_values_and_places_apart() -> None:
    params = cast(CASE.params, np.float32)
    moved = params._replace(encoder=params.encoder_v, encoder_v=params.encoder)
    assert len({fingerprint(params), fingerprint(moved), fingerprint(cast(params, np.float16))}) == 3
    assert fingerprint(cast(cast(params, np.float16), np.float64)) == fingerprint(cast(params, np.float16))


def test_the_fingerprint_is_what_the_specification_says() -> None:
    digest = hashlib.sha256()
    for name, weight in CASE.params._asdict().items():
        digest.update(f"{name}({', '.join(map(str, weight.shape))})".encode() + weight.astype("<f4").tobytes())
    assert fingerprint(CASE.params) == digest.hexdigest()


def half_a_file_then(error: BaseException) -> Callable[[Array], memoryview]:
    written: list[Array] = []

    def raw_bytes(values: Array) -> memoryview:
        written.append(values)
        if len(written) == 3:
            raise error
        return memoryview(values.tobytes())

    return raw_bytes


def test_a_file_in_place_of_a_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        bdh_spec.save(tmp_path / "file" / "model.safetensors", CASE.params, CASE.config)


def test_a_file_is_as_readable_as_the_user_wants_files_to_be(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    bdh_spec.save(tmp_path / "model.safetensors", CASE.params, CASE.config)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    bdh_spec.save(path, CASE.params, CASE.config)
    before = path.read_bytes()

    monkeypatch.setattr(safetensors_writer, "raw_bytes", half_a_file_then(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match=r"could not be written \(No space left on device\)"):
        bdh_spec.save(path, CASE.params, CASE.config)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writer, "raw_bytes", half_a_file_then(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        bdh_spec.save(tmp_path / "model.safetensors", CASE.params, CASE.config)
    assert not list(tmp_path.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def garble_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + b"x" * 50)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "does not exist"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
    "truncated": (truncate, "is no whole safetensors file"),
    "garbled": (garble_header, "is no whole safetensors file"),
    "text": (lambda p: p.write_text("hello, I am not a checkpoint at all"), "is no whole safetensors file"),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_spoiled_file_is_refused_with_its_reason(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "model.safetensors"
    bdh_spec.save(path, CASE.params, CASE.config)
    SPOILED[spoil][0](path)
    with pytest.raises(CheckpointError, match=SPOILED[spoil][1]):
        checkpoint.read(path)


def rewrite(path: Path, **changes: str) -> None:
    write_safetensors(path, CASE.params._asdict(), checkpoint.metadata(CASE.config) | changes)


def test_other_formats_versions_and_configurations_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    rewrite(path, format="pt")
    with pytest.raises(CheckpointError, match="format 'pt', wanted 'bdh'"):
        checkpoint.read(path)
    rewrite(path, spec_version="2.0")
    with pytest.raises(CheckpointError, match=r"follows specification 2.0, this is 1\.\d"):
        checkpoint.read(path)
    rewrite(path, config=json.dumps(CASE.config.as_dict() | {"window": 3}))
    with pytest.raises(ConfigError, match="unknown configuration keys window"):
        checkpoint.read(path)
    rewrite(path, config=json.dumps({"n_embd": 8}))
    with pytest.raises(ConfigError, match="no n_layer"):
        checkpoint.read(path)
    rewrite(path, config=json.dumps(CASE.config.as_dict() | {"vocab_size": 10}))
    with pytest.raises(ParamsError, match=r"embed has shape \(9, 8\), config asks for \(10, 8\)"):
        checkpoint.read(path)


def test_r13_a_state_comes_back_with_its_position_and_model(tmp_path: Path) -> None:
    path, ours = tmp_path / "s.safetensors", fingerprint(CASE.params)
    checkpoint.save_state(path, STATE, CASE.config, ours, PENDING)
    read, pending = checkpoint.read_state(path, CASE.config, ours)
    assert read.position == STATE.position == CASE.time
    assert all(np.array_equal(a, b) for a, b in zip(read.layers, STATE.layers, strict=True))
    assert np.array_equal(pending, PENDING)


def test_r13_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    checkpoint.save_state(path, STATE, CASE.config, "0" * 64, PENDING)
    with pytest.raises(CheckpointError, match="is a state of model 000000000000, this is model"):
        checkpoint.read_state(path, CASE.config, fingerprint(CASE.params))
    bdh_spec.save(path, CASE.params, CASE.config)
    with pytest.raises(CheckpointError, match="format 'bdh', wanted 'bdh-state'"):
        checkpoint.read_state(path, CASE.config, fingerprint(CASE.params))
