"""Files that no trainer writes: each gets one short sentence in plain characters, soon, in little memory, and nothing runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdh_convert import fuzz, pickle_file
from bdh_convert.checkpoint import open_checkpoint, read
from bdh_convert.convert import Settings, convert
from bdh_convert.inspect import report
from bdh_convert.steps import Wishes
from bdh_convert.tensors import Tensor
from bdh_spec import BDHConfig, BDHError, CheckpointError, Params, checkpoint, safetensors_writer
from bdh_spec.files import read_safetensors, shown, write_safetensors
from bdh_spec.int8 import rounded
from bdh_spec.model import init_state

Canonical = Callable[[BDHConfig], Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
Made = dict[str, bytes]  # files by name

SMALL = BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, dropout=0.25)
RNG = np.random.default_rng(7)
WEIGHTS = {
    "embed.weight": RNG.normal(size=(11, 8)).astype(np.float32),
    "encoder": RNG.normal(size=(2, 8, 16)).astype(np.float32),
    "encoder_v": RNG.normal(size=(2, 8, 16)).astype(np.float32),
    "decoder": RNG.normal(size=(32, 8)).astype(np.float32),
    "lm_head": RNG.normal(size=(8, 11)).astype(np.float32),
}
CONFIG = {"config.json": json.dumps(SMALL.as_dict()).encode()}
DEEP = 100_000


def entry(**changes: Any) -> dict[str, Any]:
    """What a safetensors header says of an encoder."""
    return {"dtype": "F32", "shape": [2, 8, 16], "data_offsets": [0, 1024]} | changes


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def whole(about: dict[str, str] | None = None, **changes: Any) -> bytes:
    """A sound safetensors file but for what is changed."""
    header: dict[str, Any] = {"__metadata__": about} if about else {}
    data = b""
    for name, values in (WEIGHTS | changes).items():
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [len(data), len(data) + values.nbytes]}
        data += values.tobytes()
    return safetensors(header, data)


def of_safetensors() -> Iterator[tuple[str, Made]]:
    headers: dict[str, Any] = {
        "no object": b'{"',
        "an empty object": {},
        "deep": b'{"a":' + b"[" * DEEP,
        "no UTF-8": b'{"\xff\xfe": 1}',
        "an entry of null": {"encoder": None},
        "an entry of a number": {"encoder": 1},
        "no offsets": {"encoder": {"dtype": "F32", "shape": [2]}},
        "an unknown dtype": {"encoder": entry(dtype="F33")},
        "a dtype of a list": {"encoder": entry(dtype=[])},
        "a negative shape": {"encoder": entry(shape=[-2, -8, 16])},
        "a shape of floats": {"encoder": entry(shape=[2.0, 8, 16])},
        "a shape of text": {"encoder": entry(shape="abc")},
        "a shape of 100 axes": {"encoder": entry(shape=[1] * 100 + [256])},
        "a shape that overflows": {"encoder": entry(shape=[2**63, 2**63, 2])},
        "a huge number": b'{"encoder":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        "offsets beyond the file": {"encoder": entry(data_offsets=[0, 2**50])},
        "offsets backwards": {"encoder": entry(data_offsets=[1024, 0])},
        "overlapping tensors": {"encoder": entry(), "encoder_v": entry()},
        "metadata of numbers": {"__metadata__": {"format": 1}},
        "metadata of a list": {"__metadata__": []},
    }
    for what, header in headers.items():
        yield what, {"m": safetensors(header, bytes(1024))} | CONFIG
    yield "the length of a header beyond the file", {"m": struct.pack("<Q", 2**62) + b"{" * 50}
    yield "a header of 5 MB", {"m": safetensors(b"{" + b" " * (5 << 20))}
    yield "one byte", {"m": b"{"}
    yield "100 axes", {"m": whole(encoder=WEIGHTS["encoder"].reshape(*[1] * 60, 2, 8, 16))} | CONFIG
    yield "a name of 1 MB", {"m": whole(**{"x" * 1_000_000: np.zeros(3, np.float32)})} | CONFIG
    yield "a name that moves the cursor", {"m": whole(**{"\x1b[2J\x1b[31m\u202e": np.zeros(3, np.float32)})} | CONFIG
    yield "10,000 tensors", {"m": whole(**{f"t{i}": np.zeros(0, np.float32) for i in range(10_000)})} | CONFIG
    yield "no axes", {"m": whole(embed=np.float32(1))} | CONFIG
    yield "an embedding of no axes", {"m": whole(**{"embed.weight": np.zeros((), np.float32)})} | CONFIG
    yield "no values", {"m": whole(encoder=np.zeros((0, 8, 16), np.float32))} | CONFIG
    about = {"format": "bdh", "spec_version": "1.0"}
    yield "no configuration where one is due", {"m": whole(about)}
    for what, text in {
        "a configuration of ruins": "{",
        "a configuration of a list": "[]",
        "a deep configuration": "[" * DEEP,
        "a configuration of 2 MB": "{" + " " * (2 << 20) + "}",
        "a version of nothing": "",
    }.items():
        key = "spec_version" if what == "a version of nothing" else "config"
        yield what, {"m": whole({**about, "config": json.dumps(SMALL.as_dict()), key: text})}


def configs() -> Iterator[tuple[str, Made]]:
    sizes = SMALL.as_dict()
    values: dict[str, Any] = {
        "of n_layer no number": {"n_layer": "\x1b[2Jsix"},
        "of n_layer infinity": {"n_layer": float("inf")},
        "of n_layer nothing but a list": {"n_layer": [[]]},
        "of dropout NaN": {"dropout": float("nan")},
        "of n_embd minus": {"n_embd": -8},
        "of n_embd truth": {"n_embd": True},
        "of n_head nought": {"n_head": 0},
        "of the multiplier a googol": {"mlp_internal_dim_multiplier": 10**100},
        "of a long word": {"activation": "x" * 500_000},
        "of control characters": {"\x1b]0;title\x07": "\x1b[31m"},
        "of nested lists": {"window": [[[[[[[[[[1]]]]]]]]]]},
        "of no model": {"overrides": {"config": {"model": {"k_sparse": 3}}}},
    }
    for what, more in values.items():
        yield f"a configuration {what}", {"m": whole(), "config.json": json.dumps(sizes | more).encode()}
    for what, text in {
        "empty": b"",
        "no UTF-8": b"\xff\xfe{}",
        "deep": b'{"a":' * DEEP,
        "with a number of 5,000 digits": b'{"n_layer": ' + b"9" * 5000 + b"}",
        "of 2 MB": b"{" + b" " * (2 << 20) + b"}",
        "of a string": b'"six"',
    }.items():
        yield f"a configuration that is {what}", {"m": whole(), "config.json": text}
    yield "a tokenizer in ruins", {"m": whole(), "tokenizer_config.json": b"{"} | CONFIG


def npy(descr: str, shape: str, data: bytes = bytes(64), version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def zipped(files: Made, comment: bytes = b"", packed: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.comment = comment
    return out.getvalue()


def npz(files: Made, comment: bytes = b"", packed: bool = False) -> bytes:
    """An archive with sound weights but for what is changed."""
    sound = {}
    for name, values in WEIGHTS.items():
        out = io.BytesIO()
        np.save(out, values)
        sound[f"{name}.npy"] = out.getvalue()
    return zipped(sound | files, comment, packed)


def of_npz() -> Iterator[tuple[str, Made]]:
    for what, descr, shape in [
        ("strings of no length", "'|S0'", "(99999999999,)"),
        ("strings", "'<U5'", "(2, 8, 16)"),
        ("bytes", "'|S4'", "(2, 8, 16)"),
        ("dates", "'<M8[s]'", "(2, 8, 16)"),
        ("time spans", "'<m8[ns]'", "(2, 8, 16)"),
        ("long doubles", "'<f16'", "(2, 8, 16)"),
        ("complex numbers", "'<c8'", "(2, 8, 16)"),
        ("void", "'|V8'", "(2, 8, 16)"),
        ("records", "[('a', '<f4'), ('b', '<f4')]", "(2, 8, 16)"),
        ("objects", "'|O'", "(2, 8, 16)"),
        ("truths", "'|b1'", "(2, 8, 16)"),
        ("whole numbers", "'<i8'", "(2, 8, 16)"),
        ("no dtype", "'<q9'", "(2, 8, 16)"),
        ("a dtype of code", "__import__('os').mkdir('witness')", "(2, 8, 16)"),
        ("a negative shape", "'<f4'", "(-2, -8, 16)"),
        ("a shape of floats", "'<f4'", "(2.0, 8, 16)"),
        ("a shape of text", "'<f4'", "'abc'"),
        ("a shape of 100 axes", "'<f4'", f"({'1,' * 100})"),
        ("more than there is", "'<f4'", "(2, 8, 99999999999)"),
        ("a number of 5,000 digits", "'<f4'", f"({'9' * 5000},)"),
        ("deep brackets", "'<f4'", "(" * 3000),
    ]:
        yield f"an array of {what}", {"m": npz({"encoder.npy": npy(descr, shape)})} | CONFIG
    yield "an array of no header", {"m": npz({"encoder.npy": b"\x93NUMPY\x01\x00\xff\xff"})} | CONFIG
    yield "an array of another version", {"m": npz({"encoder.npy": npy("'<f4'", "(2,)", version=b"\x09\x00")})} | CONFIG
    yield "an array that is empty", {"m": npz({"encoder.npy": b""})} | CONFIG
    yield "a comment of ruins", {"m": npz({}, b"{")}
    yield "a comment of another release", {"m": npz({}, b'{"spec_version": "9.0", "config": "{}"}')}
    yield "a comment of numbers", {"m": npz({}, b'{"spec_version": "1.0", "config": 1}')}
    huge = npy("'<f4'", "(2, 8, 16)", bytes(300 << 20))
    yield "an array packed a thousand times", {"m": npz({"encoder.npy": huge}, packed=True)} | CONFIG
    named = npz({"q.npy": b""})
    flagged = named.replace(b"q.npy", b"\xff.npy")
    flags = flagged.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x00\x08")
    yield "names that are no UTF-8", {"m": flags} | CONFIG
    yield (
        "a method of packing that there is not",
        {"m": named.replace(b"PK\x03\x04\x14\x00\x00\x00\x00\x00", b"PK\x03\x04\x14\x00\x00\x00\x63\x00")} | CONFIG,
    )


class Bomb:
    """What runs when it is unpickled, and makes a folder to show it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("witness",)


def program(*parts: bytes) -> bytes:
    """A pickle of sound weights and a configuration as the keys of one mapping, and what else it says."""
    tensors = [Tensor.of(name, values) for name, values in WEIGHTS.items()]
    state = pickle_file.pickled(tensors)[2:-1]
    return b"\x80\x02}(X\x05\x00\x00\x00model" + state + b"".join(parts) + b"u."


def said(key: str, value: Any) -> bytes:
    """A key and its value, as a pickle puts them on its stack."""
    return (
        b"X"
        + struct.pack("<I", len(key))
        + key.encode()
        + (value if isinstance(value, bytes) else pickle.dumps(value, 2)[2:-1])
    )


def pt(data: bytes, more: Made | None = None) -> bytes:
    storages = {f"m/data/{i}": values.tobytes() for i, values in enumerate(WEIGHTS.values())}
    return zipped({"m/data.pkl": data, **storages, **(more or {})})


def state_of(value: bytes) -> bytes:
    """The pickle of sound weights but for an encoder of this value."""
    tensors = [Tensor.of(name, values) for name, values in WEIGHTS.items()]
    return pickle_file.pickled(tensors)[:-2] + said("encoder", value) + b"u."


def tensor_of(
    storage: str = "FloatStorage",
    count: int = 256,
    shape: bytes = b"K\x02K\x08K\x10\x87",
    stride: bytes = b"K\x80K\x10K\x01\x87",
) -> bytes:
    """The opcodes of one tensor."""
    kind = f"ctorch\n{storage}\n".encode()
    pid = b"(X\x07\x00\x00\x00storage" + kind + b"X\x01\x00\x00\x001X\x03\x00\x00\x00cpu" + pickle.dumps(count, 2)[2:-1] + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K\x00" + shape + stride + b"\x89}tR"


def circular() -> list[Any]:
    circle: list[Any] = []
    circle += [circle, circle]
    return circle


def shared(depth: int = 60) -> list[Any]:
    """Lists of lists whose text would have 2^depth words."""
    level: list[Any] = [1]
    for _ in range(depth):
        level = [level, level]
    return level


def of_pt() -> Iterator[tuple[str, Made]]:
    bomb = pickle.dumps(Bomb(), 2)[2:-1]
    sound = said("config", SMALL.as_dict())
    programs: dict[str, bytes] = {
        "no pickle": b"hello",
        "nothing": b"",
        "a number": pickle.dumps(3, 2),
        "a list": pickle.dumps([1, 2], 2),
        "text": pickle.dumps("\x1b[2J", 2),
        "no end": b"\x80\x02}(",
        "an end at once": b".",
        "a memo of 2^28": b"\x80\x02}r\x00\x00\x00\x10.",
        "a memo of less than nothing": b"\x80\x02}p-5\n.",
        "1,500,000 mappings": b"\x80\x02(" + b"}" * 1_500_000 + b"l.",
        "2,000 classes": b"\x80\x02(" + b"".join(b"cm\nc%d\n" % i for i in range(2000)) + b"l.",
        "a class of 1 MB": b"\x80\x02c" + b"m" * 1_000_000 + b"\nn\n.",
        "deep lists": b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
        "an extension": b"\x80\x02\x82\x01.",
        "a frame beyond the end": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
        "text beyond the end": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00}.",
        "a bomb": pickle.dumps(Bomb(), 2),
        "a bomb as a key": b"\x80\x02}(" + bomb + b"K\x01u.",
        "a bomb as the weights": b"\x80\x02}(" + said("model", bomb) + b"u.",
        "a bomb as the encoder": state_of(bomb),
        "a bomb as the configuration": program(said("config", bomb)),
        "a bomb of protocol 0": b"cos\nmkdir\n(S'witness'\ntR.",
        "a bomb of INST": b"(S'witness'\nios\nmkdir\n.",
        "a bomb of OBJ": b"(cos\nmkdir\nS'witness'\no.",
        "a bomb of NEWOBJ": b"\x80\x02cos\nmkdir\nX\x07\x00\x00\x00witness\x85\x81.",
        "a bomb of STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x07witness\x85R.",
        "a bomb of BUILD": b"\x80\x02cos\nmkdir\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nmkdir\nsb.",
        "a bomb as a storage": state_of(b"ctorch._utils\n_rebuild_tensor_v2\n(" + bomb + b"K\x00))\x89}tR"),
        "a bomb as a persistent id": state_of(bomb + b"Q"),
        "a bomb as what rebuilds": state_of(
            b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\ncm\nn\nX\x07\x00\x00\x00witness\x85}tR"
        ),
        "a number as the encoder": state_of(b"K\x01"),
        "a mapping as the encoder": state_of(b"}"),
        "quantised numbers": state_of(tensor_of("QInt8Storage")),
        "whole numbers": state_of(tensor_of("LongStorage")),
        "a storage of less than nothing": state_of(tensor_of(count=-256)),
        "a storage of 2^70": state_of(tensor_of(count=2**70)),
        "a storage of text": state_of(tensor_of(count="abc")),
        "a shape of less than nothing": state_of(tensor_of(shape=b"J\xfe\xff\xff\xffK\x08K\x10\x87")),
        "a shape of text": state_of(tensor_of(shape=b"X\x01\x00\x00\x00aK\x08K\x10\x87")),
        "a shape of 100 axes": state_of(tensor_of(shape=b"(" + b"K\x01" * 100 + b"t", stride=b"(" + b"K\x01" * 100 + b"t")),
        "strides beyond the storage": state_of(tensor_of(stride=b"K\x80K\x10K\x7f\x87")),
        "steps of a googol": state_of(tensor_of(stride=b"\x8a\x2a" + b"\x7f" * 42 + b"K\x10K\x01\x87")),
        "a configuration that holds itself": program(said("config", {"n_layer": circular()})),
        "a configuration of shared lists": program(said("config", {"n_layer": 1, "window": shared()})),
        "a configuration of 5,000 digits": program(said("config", {"n_layer": 10**5000})),
        "a switch of 5,000 digits": program(said("config", {"n_layer": 1, "k_sparse": 10**5000})),
        "a configuration of control characters": program(said("config", {"n_layer": 1, "\x1b[2J": "\x07"})),
        "the weights twice": program(
            sound, said("again", pickle_file.pickled([Tensor.of(n, v) for n, v in WEIGHTS.items()])[2:-1])
        ),
    }
    for what, data in programs.items():
        yield f"a pickle of {what}", {"m": pt(data)}
    yield "a storage that is not there", {"m": zipped({"m/data.pkl": program(sound)})}
    yield "a storage that is short", {"m": pt(program(sound), {"m/data/1": b"abc"})}
    yield "what it says of itself in ruins", {"m": pt(program(), {"m/bdh.json": b"{"})}
    yield "what it says of itself without end", {"m": pt(program(), {"m/bdh.json": b" " * (2 << 20)})}
    yield "a pickle packed a thousand times", {"m": zipped({"m/data.pkl": b"N" * (20 << 20)}, packed=True)}
    yield "an archive of nothing", {"m": zipped({})}
    yield "an archive of text", {"m": zipped({"a": b""})}
    yield "an archive that is cut", {"m": pt(program(sound))[:-30]}
    yield "a bare pickle", {"m": pickle.dumps(Bomb(), 4)}


def of_burn() -> Iterator[tuple[str, Made]]:
    def text(value: bytes) -> bytes:
        return bytes([len(value)]) + value

    about = text(b"f32") + text(b"i32") + text(b"burn recorder") + text(b"0.19") + text(b"full")
    for what, data in {
        "nothing more": b"",
        "names that are no text": b"\xfe" * 40,
        "nothing but empty fields": bytes(1 << 20),
        "a tensor of 2^64 bytes": b"\x01a" + b"\xfd" + b"\xff" * 8,
        "a tensor of 2^60 axes": b"\x01a" + b"\x04abcd" + b"\xfd" + b"\xff" * 7 + b"\x0f",
        "a tensor of 100 axes": b"\x01a" + b"\x04abcd" + bytes([100]) + b"\x01" * 102,
        "a tensor of another size": b"\x01a" + b"\x04abcd" + b"\x01\x09\x01",
    }.items():
        yield f"a record of {what}", {"m": about + data} | CONFIG
    yield "a record of no known type", {"m": text(b"\xff\xfe") + about[4:] + b"\x01a"} | CONFIG


def of_folders() -> Iterator[tuple[str, Made]]:
    index = "m/model.safetensors.index.json"
    for what, content in {
        "in ruins": b"{",
        "deep": b'{"weight_map":' * DEEP,
        "without weights": b"{}",
        "of a list": b'{"weight_map": []}',
        "that leads out": b'{"weight_map": {"encoder": "../../etc/passwd"}}',
        "that leads to the root": b'{"weight_map": {"encoder": "/etc/passwd"}}',
        "that leads nowhere": b'{"weight_map": {"encoder": "\\u001b[2Jnowhere"}}',
        "that leads to itself": b'{"weight_map": {"encoder": "model.safetensors.index.json"}}',
        "of numbers": b'{"weight_map": {"encoder": 3}}',
        "of 2 MB": b" " * (2 << 20),
    }.items():
        yield f"an index {what}", {index: content}
    yield "a folder of an empty file", {"m/model.safetensors": b""}
    yield "a folder of a configuration in ruins", {"m/model.safetensors": whole(), "m/config.json": b"["}
    yield "a folder of DeepSpeed that leads out", {"m/latest": b"../../etc"}
    yield "a folder of pieces by DeepSpeed", {"m/zero_pp_rank_0_mp_rank_00_model_states.pt": pt(program())}
    for what, data in {
        "nothing": b"",
        "no pickle": b"hello",
        "a bomb": pickle.dumps(Bomb(), 4),
        "a mapping": pickle.dumps({"state_dict_metadata": {}, "storage_data": {}}, 4),
        "a memo of 2^28": b"\x80\x02}r\x00\x00\x00\x10.",
        "no fields": b"\x80\x02cm\nn\n)\x81}b.",
        "mappings of numbers": b"\x80\x02cm\nn\n)\x81}("
        + said("state_dict_metadata", {"encoder": 1})
        + said("storage_data", {})
        + b"ub.",
        "places that are none": b"\x80\x02cm\nn\n)\x81}("
        + said("state_dict_metadata", {})
        + said("storage_data", {1: 2})
        + b"ub.",
    }.items():
        yield f"a description of {what}", {"m/.metadata": data}


def of_int8() -> Iterator[tuple[str, Made]]:
    """Weights in int8 (R17) whose scales, values or neighbours are none."""
    whole_weights = Params(*(weight.astype(np.float32) for weight in WEIGHTS.values()))
    sound = checkpoint.tensors_of(rounded(whole_weights))
    about = checkpoint.metadata(SMALL, checkpoint.INT8_FORMAT)
    changes: dict[str, dict[str, Any]] = {
        "a scale is missing": {"encoder.scale": None},
        "all scales are missing": {name: None for name in sound if name.endswith(".scale")},
        "a weight is missing": {"decoder": None},
        "all weights are missing": {name: None for name in sound if not name.endswith(".scale")},
        "a scale of another shape": {"encoder.scale": np.ones((2, 8), np.float32)},
        "a scale of a thousand axes": {"encoder.scale": np.ones((1,) * 32, np.float32)},
        "a scale of no axis": {"decoder.scale": np.ones((), np.float32)},
        "no scales": {"lm_head.scale": np.ones(0, np.float32)},
        "a scale of NaN": {"lm_head.scale": np.full(11, np.nan, np.float32)},
        "a scale below zero": {"lm_head.scale": np.full(11, -1, np.float32)},
        "an infinite scale": {"embed.scale": np.full(11, np.inf, np.float32)},
        "whole scales": {"embed.scale": np.ones(11, np.int32)},
        "a scale in int8": {"embed.scale": np.ones(11, np.int8)},
        "-128": {"encoder_v": np.full((2, 8, 16), -128, np.int8)},
        "a weight without sign": {"encoder_v": np.ones((2, 8, 16), np.uint8)},
        "a weight in float32": {"encoder_v": np.ones((2, 8, 16), np.float32)},
        "a weight of another shape": {"encoder_v": np.ones((2, 16, 8), np.int8)},
        "a weight of one axis": {"encoder": np.ones(256, np.int8)},
        "a zero point": {"encoder.zero_point": np.ones((2, 16), np.int8)},
        "int8 in an unknown place": {"router": np.ones((2, 16), np.int8)},
        "frequencies in int8": {"freqs": np.ones(16, np.int8)},
    }
    for what, changed in changes.items():
        tensors = {name: value for name, value in (sound | changed).items() if value is not None}
        header: dict[str, Any] = {"__metadata__": about}
        data = b""
        for name, value in tensors.items():
            kind = safetensors_writer.NAMES[value.dtype]
            header[name] = {"dtype": kind, "shape": value.shape, "data_offsets": [len(data), len(data) + value.nbytes]}
            data += value.tobytes()
        yield what, {"m": safetensors(header, data)}


CORPUS: dict[str, Made] = {}
for _kind, _made in {
    "safetensors": of_safetensors,
    "int8": of_int8,
    "config": configs,
    "npz": of_npz,
    "pt": of_pt,
    "burn": of_burn,
    "folder": of_folders,
}.items():
    CORPUS |= {f"{_kind}: {_what}": _files for _what, _files in _made()}

MOST_SECONDS, MOST_BYTES = 3.0, 64 << 20


def place(files: Made, folder: Path) -> int:
    """Write files, and say how large the largest is."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return max(map(len, files.values()))


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 100


@pytest.mark.parametrize("what", CORPUS)
def test_a_hostile_file_is_one_sentence(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    size = place(CORPUS[what], tmp_path)
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(BDHError) as refused:
        read(Path("m"))
    took, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sentence = str(refused.value)
    assert sentence.isprintable()
    assert len(sentence) < 700
    assert peak < MOST_BYTES + size
    assert took < 4 * MOST_SECONDS  # tracing makes everything several times slower
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("what", CORPUS)
def test_a_report_on_a_hostile_file_is_short_and_plain(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place(CORPUS[what], tmp_path)
    begun = time.process_time()
    try:
        found = json.dumps(report(Path("m")), allow_nan=False)
    except BDHError as error:
        found = str(error)
    assert time.process_time() - begun < MOST_SECONDS
    assert found.isprintable()
    assert len(found) < 100_000
    assert not (tmp_path / "witness").exists()


def saved_state(folder: Path) -> Path:
    path = folder / "s.safetensors"
    checkpoint.save_state(path, init_state(1, SMALL), SMALL, "0" * 64, np.zeros((1, 2), np.int64))
    return path


STATES: dict[str, tuple[dict[str, str | None], dict[str, Any]]] = {
    "of no format": ({"format": None}, {}),
    "of no version": ({"spec_version": None}, {}),
    "of no model": ({"model": None}, {}),
    "of a model of control characters": ({"model": "\x1b[2J" * 9}, {}),
    "of no position": ({"position": None}, {}),
    "of a position in words": ({"position": "three"}, {}),
    "of a position of 5,000 digits": ({"position": "9" * 5000}, {}),
    "of a position before the start": ({"position": "-1"}, {}),
    "of no pending tokens": ({}, {"pending": None}),
    "of pending tokens that are fractions": ({}, {"pending": np.zeros((1, 2), np.float32)}),
    "of pending tokens outside the vocabulary": ({}, {"pending": np.full((1, 2), 11)}),
    "of pending tokens of two texts": ({}, {"pending": np.zeros((2, 2), np.int64)}),
    "of pending tokens without texts": ({}, {"pending": np.zeros((), np.int64)}),
    "of no layers": ({}, {"layers.0.state": None}),
    "of layers by another name": ({}, {"layers.0.state": None, "layers.1.state": np.zeros((1, 2, 16, 8), np.float32)}),
    "of whole numbers": ({}, {"layers.0.state": np.zeros((1, 2, 16, 8), np.int32)}),
    "of another shape": ({}, {"layers.0.state": np.zeros((1, 2, 8, 16), np.float32)}),
    "of no axes": ({}, {"layers.0.state": np.zeros((), np.float32)}),
}


@pytest.mark.parametrize("what", STATES)
def test_a_hostile_state_is_one_sentence(what: str, tmp_path: Path) -> None:
    path = saved_state(tmp_path)
    tensors, about = read_safetensors(path)
    said, held = STATES[what]
    about = {key: value for key, value in (about | said).items() if value is not None}
    write_safetensors(path, {key: value for key, value in (tensors | held).items() if value is not None}, about)
    with pytest.raises(BDHError) as refused:
        checkpoint.read_state(path, SMALL, "0" * 64)
    assert str(refused.value).isprintable()


def test_a_state_that_is_sound_is_read(tmp_path: Path) -> None:
    state, pending = checkpoint.read_state(saved_state(tmp_path), SMALL, "0" * 64)
    assert (state.position, pending.tolist()) == (0, [[0, 0]])


def test_weights_in_the_place_of_a_state_are_told_where_they_belong(tmp_path: Path, canonical: Canonical) -> None:
    with pytest.raises(CheckpointError, match="weights are named as the checkpoint"):
        checkpoint.read_state(canonical(SMALL), SMALL, "0" * 64)
    with pytest.raises(CheckpointError, match="name the weights that it was saved with"):
        checkpoint.read(saved_state(tmp_path))


def test_numbers_with_the_high_byte_first_are_read_from_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **{name: values.astype(values.dtype.newbyteorder(">")) for name, values in WEIGHTS.items()})
    found, _ = read(tmp_path / "m.npz", 1)
    assert found.encoder.dtype == np.float32
    assert np.array_equal(found.encoder, WEIGHTS["encoder"])
    convert(tmp_path / "m.npz", "torch", tmp_path / "m.pt", Settings(Wishes(n_layer=1)))


@pytest.mark.parametrize("dtype", ["<f16", "<U5", "|S4", "<M8[s]", "<m8[ns]", "|V8", "<c8", "|b1", "<i4"])
def test_an_array_that_is_no_float_of_a_framework_is_no_weight(dtype: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **WEIGHTS | {"encoder": np.zeros((2, 8, 16), dtype)})
    with pytest.raises(BDHError, match=r"encoder has dtype .*: weights are float64, float32, float16 or bfloat16"):
        read(tmp_path / "m.npz", 1)


@pytest.mark.parametrize("n_layer", [10**9, 2**31])
def test_a_model_that_claims_many_layers_is_run_through_some(n_layer: int, tmp_path: Path, call: Run) -> None:
    place({"m.safetensors": whole(), "config.json": json.dumps(SMALL.as_dict() | {"n_layer": n_layer}).encode()}, tmp_path)
    done = call("--to", "numpy", "m.safetensors")
    assert done.returncode == 0, done.stderr
    assert f"by the first 100 of {n_layer:,} layers" in done.stdout


def test_a_report_of_many_tensors_is_cut(tmp_path: Path) -> None:
    place({"m": whole(**{f"t{i}": np.zeros(1, np.float32) for i in range(5000)})} | CONFIG, tmp_path)
    found = report(tmp_path / "m")
    assert len(found["tensors"]) == 200
    assert "4,805 more tensors are not listed" in found["suspicious"]


def test_control_characters_of_a_file_reach_no_terminal(tmp_path: Path, call: Run) -> None:
    place({"m": whole(**{"\x1b[2J\x1b[31m": np.zeros(3, np.float32)})} | CONFIG, tmp_path)
    for words in (("--inspect", "m"), ("--inspect", "m", "--json"), ("--to", "numpy", "m")):
        done = call(*words)
        assert "\x1b" not in done.stdout + done.stderr
        assert "x1b[2J" in done.stdout + done.stderr


def test_what_is_shown_keeps_its_beginning_and_its_end() -> None:
    assert shown("a\x1b\n\u202e\ud800é") == "a\\x1b\\n\\u202e\\ud800é"
    assert shown("begin" + "x" * 5000 + "end").startswith("beginxxx")
    assert shown("begin" + "x" * 5000 + "end").endswith("xxxend")
    assert len(shown("x" * 5000)) < 700


def test_an_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place({"m": whole()} | CONFIG, tmp_path)
    weights = open_checkpoint(tmp_path / "m").weights

    def fails(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("bdh_convert.raw.read_numbers", fails)
    with pytest.raises(CheckpointError, match=r"m could not be read \(Input/output error\)"):
        weights.embed.load()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    with pytest.raises(CheckpointError, match="is no regular file"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_few_hundred_mutations_find_nothing(name: str) -> None:
    figures = fuzz.fuzz(name, 300)
    assert figures.runs >= 250  # where files are small, some changes make the same one
    assert not figures.faults
    assert figures.refused > 0
    assert figures.read > 0


BOMB = pickle.dumps(Bomb(), 2)[2:-1]  # the opcodes that leave what the bomb returns on the stack
MKDIR, NAME = b"cos\nmkdir\n", b"X\x07\x00\x00\x00witness"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x001X\x03\x00\x00\x00cpuM\x00\x01tQ"
SHAPE, STRIDE = b"K\x02K\x08K\x10\x87", b"K\x80K\x10K\x01\x87"


def stored_as(
    kind: bytes = b"ctorch\nFloatStorage\n", key: bytes = b"X\x01\x00\x00\x001", place: bytes = b"X\x03\x00\x00\x00cpu"
) -> bytes:
    return TENSOR + b"((X\x07\x00\x00\x00storage" + kind + key + place + b"M\x00\x01tQK\x00" + SHAPE + STRIDE + b"\x89}tR"


def of_numpy(dtype: bytes, data: bytes) -> bytes:
    return b"cnumpy._core.multiarray\nscalar\n(" + dtype + data + b"tR"


F8 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR"
IN_A_CONFIGURATION = {
    "REDUCE": BOMB,
    "INST": b"(" + NAME + b"ios\nmkdir\n",
    "OBJ": b"(" + MKDIR + NAME + b"o",
    "NEWOBJ": MKDIR + NAME + b"\x85\x81",
    "NEWOBJ_EX": MKDIR + NAME + b"\x85}\x92",
    "STACK_GLOBAL": b"X\x02\x00\x00\x00osX\x05\x00\x00\x00mkdir\x93" + NAME + b"\x85R",
    "a name with dots": b"X\x02\x00\x00\x00osX\x0e\x00\x00\x00path.os.system.\x93" + NAME + b"\x85R",
    "a memo": MKDIR + b"q\x01" + NAME + b"\x85q\x020h\x01h\x02R",
    "EXT1": b"\x82\x01" + NAME + b"\x85R",
    "EXT4": b"\x84\x01\x00\x00\x00" + NAME + b"\x85R",
    "BUILD": b"cm\nn\n)\x81}X\x0c\x00\x00\x00__setstate__" + MKDIR + b"sb",
    "BUILD with slots": b"cm\nn\n)\x81N}X\x09\x00\x00\x00__class__" + BOMB + b"s\x86b",
    "the state of an object": b"cm\nn\n)\x81" + BOMB + b"b",
    "an item of an object": b"cm\nn\n)\x81(K\x01" + BOMB + b"u",
    "what is appended to an object": b"cm\nn\n)\x81(" + BOMB + b"e",
    "the argument of an object": b"cm\nn\n" + BOMB + b"\x85R",
    "eval": b"cbuiltins\neval\nX\x1c\x00\x00\x00__import__('os').mkdir('witness'\x85R"[:-2] + b"\x85R",
    "getattr": b"cbuiltins\ngetattr\n(cos\nmkdir\nX\x08\x00\x00\x00__call__tR" + NAME + b"\x85R",
    "a number of NumPy's": of_numpy(BOMB, b"C\x08" + bytes(8)),
    "the bytes of a number of NumPy's": of_numpy(F8, BOMB),
    "the state of a dtype": of_numpy(F8 + BOMB + b"b", b"C\x08" + bytes(8)),
    "an encoding": b"c_codecs\nencode\n(" + BOMB + b"X\x06\x00\x00\x00latin1tR",
    "the name of an encoding": b"c_codecs\nencode\n(" + NAME + BOMB + b"tR",
    "an OrderedDict": b"ccollections\nOrderedDict\n(" + BOMB + b"tR",
    "a Size": b"ctorch\nSize\n(" + BOMB + b"tR",
    "a persistent id": BOMB + b"Q",
    "a persistent id of text": b"Pwitness\n",
}
AS_THE_ENCODER = {
    "the type of a storage": stored_as(kind=BOMB),
    "the key of a storage": stored_as(key=BOMB),
    "the place of a storage": stored_as(place=BOMB),
    "a storage": TENSOR + b"(" + BOMB + b"K\x00" + SHAPE + STRIDE + b"\x89}tR",
    "a shape": TENSOR + b"(" + STORAGE + b"K\x00" + BOMB + STRIDE + b"\x89}tR",
    "a stride": TENSOR + b"(" + STORAGE + b"K\x00" + SHAPE + BOMB + b"\x89}tR",
    "hooks": TENSOR + b"(" + STORAGE + b"K\x00" + SHAPE + STRIDE + b"\x89" + BOMB + b"tR",
    "flags": TENSOR + b"(" + STORAGE + b"K\x00" + SHAPE + STRIDE + b"\x89}" + BOMB + b"tR",
    "a parameter": b"ctorch._utils\n_rebuild_parameter\n(" + BOMB + b"\x88}tR",
    "the state of a parameter": b"ctorch._utils\n_rebuild_parameter_with_state\n(" + stored_as() + b"\x88}" + BOMB + b"tR",
    "what rebuilds a tensor of a type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + MKDIR + b"cm\nn\n" + NAME + b"\x85}tR",
    "the type of a tensor": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + TENSOR + MKDIR + NAME + b"\x85}tR",
    "the state of a tensor of a type": b"ctorch._tensor\n_rebuild_from_type_v2\n("
    + TENSOR
    + b"cm\nn\n("
    + STORAGE
    + b"K\x00"
    + SHAPE
    + STRIDE
    + b"\x89}t"
    + BOMB
    + b"tR",
}
FILES: dict[str, Made] = {
    **{f"a configuration by {what}": {"m": pt(program(said("config", value)))} for what, value in IN_A_CONFIGURATION.items()},
    **{f"an encoder by {what}": {"m": pt(state_of(value))} for what, value in AS_THE_ENCODER.items()},
    "a key": {"m": pt(b"\x80\x02}(" + BOMB + b"K\x01u.")},
    "the format of torch before 1.6": {"m": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(Bomb(), 2)},
    "a bare pickle of protocol 0": {"m": pickle.dumps(Bomb(), 0)},
    "an array of objects": {"m": npz({"encoder.npy": npy("'|O'", "(2,)", pickle.dumps(Bomb(), 2))})},
    "a random state in an npz": {"m": npz({"rng.npy": npy("'|O'", "()", pickle.dumps(Bomb(), 2))})} | CONFIG,
    "a description of pieces": {"m/.metadata": pickle.dumps(Bomb(), 4)},
    "transformers' pickle": {"m/pytorch_model.bin": pt(pickle.dumps(Bomb(), 2))},
    "transformers' arguments": {"m/model.safetensors": whole(), "m/training_args.bin": pickle.dumps(Bomb(), 2)},
    "accelerate's random states": {"m/model.safetensors": whole(), "m/random_states_0.pkl": pickle.dumps(Bomb(), 2)},
    "DeepSpeed's": {"m/mp_rank_00_model_states.pt": pt(pickle.dumps(Bomb(), 2))},
    "one among many files": {"m/a.pkl": pickle.dumps(Bomb(), 4), "m/b.pt": pt(program(said("optimizer", BOMB)))},
}


@pytest.mark.parametrize("what", FILES)
def test_a_payload_is_never_executed_wherever_it_stands(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place(FILES[what], tmp_path)
    for use in (lambda: read(Path("m"), 1), lambda: json.dumps(report(Path("m")))):
        with suppress(BDHError):
            use()
        assert not (tmp_path / "witness").exists()


def test_payloads_are_payloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = set()
    for what, value in (IN_A_CONFIGURATION | {"BUILD of a bomb": BOMB}).items():
        with suppress(Exception):
            pickle.loads(b"\x80\x04" + value + b".")
        if (tmp_path / "witness").exists():
            ran.add(what)
            (tmp_path / "witness").rmdir()
    assert {"REDUCE", "INST", "OBJ", "STACK_GLOBAL", "a memo", "getattr", "an encoding", "an OrderedDict"} <= ran
    assert len(FILES) >= 50
