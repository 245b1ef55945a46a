"""The ``.pt`` container: a zip archive with a pickle that describes tensors and one raw entry per storage.

Reading never imports or calls anything that a pickle names. Every name outside a handful of torch's own becomes an inert
object that remembers what was done to it, so that a pickled configuration can be read without its class.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from bdh_convert.metadata import parse_config, said_of_itself
from bdh_convert.raw import open_zip, raw_bytes, read_entry
from bdh_convert.tensors import BF16, F16, F32, F64, Contents, Tensor
from bdh_spec.errors import CheckpointError
from bdh_spec.params import Array

STORAGES = {
    "DoubleStorage": F64,
    "FloatStorage": F32,
    "HalfStorage": F16,
    "BFloat16Storage": BF16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "BoolStorage": np.dtype("?"),
}
WRAPPERS = ("model_state_dict", "state_dict", "model", "bdh_state_dict")
CONFIGS = ("config", "model_config", "bdh_config", "hyper_parameters")
ABOUT = "bdh.json"  # an entry of ours in the archive: torch reads past what it does not know
Order: TypeAlias = Literal["<", ">"]
ALIGNMENT = 64  # what torch gives its storages, so that they can be mapped


def looks_like(path: Path) -> bool:
    """Whether a zip archive is torch's: it holds a data.pkl."""
    with open_zip(path) as archive:
        return any(name.split("/")[-1] == "data.pkl" for name in archive.namelist())


def read(path: Path) -> Contents:
    """The state dict of a file, wherever it is wrapped, and the configuration beside it."""
    with open_zip(path) as archive:
        root = next(name for name in archive.namelist() if name.split("/")[-1] == "data.pkl").removesuffix("data.pkl")
        names = set(archive.namelist())
        big = root + "byteorder" in names and archive.read(root + "byteorder") == b"big"
        content = _unpickle(path, archive.read(root + "data.pkl"), root, ">" if big else "<")
        said = parse_config(path, archive.read(root + ABOUT)) if root + ABOUT in names else {}
    state, wrapping = _state_dict(path, content)
    tensors = {str(name): value.named(str(name)) for name, value in state.items() if isinstance(value, Tensor)}
    ignored = [str(name) for part in (wrapping, state) for name, value in part.items() if not isinstance(value, Tensor)]
    about = said_of_itself(path, said)
    config = about.pop("config") or _config(wrapping) or _config(state)
    known = {*WRAPPERS, *CONFIGS}
    return Contents(path, "pt", tensors, config, ignored=tuple(name for name in ignored if name not in known), **about)


def _state_dict(path: Path, content: Any) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
    """The mapping that holds tensors, and the one that wraps it (empty if nothing does)."""
    if isinstance(content, Foreign):
        raise CheckpointError(f"{path} is a pickled {content.qualified} object: save its state_dict() instead")
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}: a checkpoint is a state dict, or a dict around one")
    if any(isinstance(value, Tensor) for value in content.values()):
        return content, {}
    for name in WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, Foreign):
            raise CheckpointError(f"{path} holds a pickled {inner.qualified} object as {name!r}: save its state_dict() instead")
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return inner, content
    keys = ", ".join(map(str, content)) or "nothing"
    raise CheckpointError(f"{path} holds {keys}: looked for tensors there and under {', '.join(WRAPPERS)}")


def _config(wrapping: Mapping[Any, Any]) -> dict[str, Any] | None:
    for name in CONFIGS:
        found = wrapping.get(name)
        values = found.attributes() if isinstance(found, Foreign) else found
        if isinstance(values, Mapping):
            return {str(key): value for key, value in values.items()}
    return None


class Foreign:
    """An object of a class that nobody imports: whatever is done to it is remembered and has no effect."""

    qualified = ""
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def attributes(self) -> dict[str, Any]:
        """What the object's own fields were."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)  # (fields, slots) of a class with slots
        return {str(key): value for part in parts if isinstance(part, Mapping) for key, value in part.items()}


def _foreign(module: str, name: str) -> type[Foreign]:
    return type("Foreign", (Foreign,), {"qualified": f"{module}.{name}"})


@dataclass(frozen=True)
class Storage:
    """One raw entry of the archive."""

    dtype: np.dtype[Any]
    count: int
    fetch: Callable[[], Array]


class _Unpickler(pickle.Unpickler):
    """Builds nothing but plain values, tensors that are still in the file, and inert objects."""

    def __init__(self, path: Path, data: bytes, root: str, order: Order) -> None:
        super().__init__(io.BytesIO(data))
        self._path, self._root, self._order = path, root, order

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        return known.get((module, name)) or _foreign(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        _, dtype, key, _, count = pid
        if not isinstance(dtype, np.dtype):
            raise CheckpointError(
                f"{self._path} stores numbers as {dtype.qualified}: weights are floats, so dequantise it first"
            )
        stored, path, entry = dtype.newbyteorder(self._order), self._path, f"{self._root}data/{key}"
        return Storage(dtype, count, lambda: read_entry(path, entry, stored, count).astype(dtype, copy=False))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_tensor(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage, which must not reach beyond it."""
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"a tensor of shape {shape} and stride {stride}")
    count: int = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if count > storage.count or (count and last >= storage.count):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.count}")
    steps = tuple(step * storage.dtype.itemsize for step in stride)

    def view() -> Array:
        return np.lib.stride_tricks.as_strided(storage.fetch()[offset:], shape, steps, writeable=False)

    return Tensor("", tuple(shape), storage.dtype, view)


def _unpickle(path: Path, data: bytes, root: str, order: Order) -> Any:
    try:
        return _Unpickler(path, data, root, order).load()
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001  a hostile or damaged pickle can raise anything at all
        raise CheckpointError(f"{path} holds a pickle that describes no tensors ({error}): save the state dict again") from None


def write(part: Path, tensors: Iterable[Tensor], about: Mapping[str, str]) -> None:
    """A state dict as torch itself writes it, so that torch.load with weights_only reads it."""
    tensors = list(tensors)
    with zipfile.ZipFile(part, "w") as archive:
        for name, data in (("data.pkl", pickled(tensors)), ("byteorder", b"little"), (ABOUT, json.dumps(dict(about)).encode())):
            archive.writestr(_entry(archive, f"archive/{name}"), data)
        for i, tensor in enumerate(tensors):
            info = _entry(archive, f"archive/data/{i}")
            info.file_size = tensor.nbytes  # tells the archive whether it needs the large form
            with archive.open(info, "w") as file:
                file.write(raw_bytes(tensor.load()))
        archive.writestr(_entry(archive, "archive/version"), b"3\n")


def _entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """An entry whose data starts at a multiple of 64 bytes, padded by an extra field as torch does."""
    info = zipfile.ZipInfo(name)
    start = archive.start_dir + 30 + len(name) + 4  # a local header, its name and the field's own header
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    return info


def pickled(tensors: Iterable[Tensor]) -> bytes:
    """The pickle of an OrderedDict of tensors, opcode by opcode: the names in it are torch's, which is not imported."""
    names = {dtype: name for name, dtype in STORAGES.items()}
    out = io.BytesIO()
    out.write(pickle.PROTO + b"\x02" + _EMPTY_DICT + pickle.MARK)
    for i, tensor in enumerate(tensors):
        out.write(_text(tensor.name) + _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK)
        storage = _text("storage") + _global("torch", names[tensor.dtype]) + _text(str(i)) + _text("cpu")
        out.write(pickle.MARK + storage + _whole(math.prod(tensor.shape)) + pickle.TUPLE + pickle.BINPERSID)
        out.write(_whole(0) + _wholes(tensor.shape) + _wholes(_strides(tensor.shape)) + pickle.NEWFALSE + _EMPTY_DICT)
        out.write(pickle.TUPLE + pickle.REDUCE)
    out.write(pickle.SETITEMS + pickle.STOP)
    return out.getvalue()


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def _whole(value: int) -> bytes:
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


def _wholes(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(map(_whole, values)) + pickle.TUPLE


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


_EMPTY_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
