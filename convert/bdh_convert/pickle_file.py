"""The ``.pt`` container: a zip archive with a pickle that describes tensors and one raw entry per storage.

Reading never imports or calls anything that a pickle names. Every name outside a handful of torch's own becomes an inert
object that remembers what was done to it, so that a pickled configuration can be read without its class.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from bdh_convert.find import children
from bdh_convert.metadata import parse_config, said_of_itself
from bdh_convert.raw import SMALL, Archive, is_zip, raw_bytes
from bdh_convert.tensors import BF16, F16, F32, F64, Contents, Tensor, Unreadable
from bdh_spec.errors import CheckpointError
from bdh_spec.files import shown
from bdh_spec.params import Array

STORAGES = {
    "DoubleStorage": F64,
    "FloatStorage": F32,
    "HalfStorage": F16,
    "BFloat16Storage": BF16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
ABOUT = "bdh.json"  # an entry of ours in the archive: torch reads past what it does not know
Order: TypeAlias = Literal["<", ">"]
ALIGNMENT = 64  # what torch gives its storages, so that they can be mapped
LONGEST = 16 << 20  # bytes of a pickle
MOST_STEPS = 1 << 19  # of a pickle: each can make an object
MOST_REPEATED = 1 << 20  # numbers of a tensor that repeats those of its storage
MOST_NAMES = 1000  # of classes and functions in a pickle


def looks_like(path: Path) -> bool:
    """Whether a zip archive is torch's: it holds a data.pkl."""
    if not is_zip(path):
        return False
    with Archive(path).open() as archive:
        return _root(archive) is not None


def read(path: Path) -> Contents:
    """Whatever a file of torch's holds, and what it says of itself."""
    content, said = load(Archive(path))
    if isinstance(content, Foreign):
        raise CheckpointError(f"{path} is a pickled {shown(content.qualified, 80)} object: save its state_dict() instead")
    tree = dict(children(content) or []) if isinstance(content, (list, tuple)) else content
    if not isinstance(tree, Mapping) or (not tree and tree is not content):
        kind = type(content).__name__
        raise CheckpointError(f"{path} holds a {kind}: a checkpoint is a state dict, or a dict around one")
    return Contents(path, "pt", tree, **said_of_itself(path, parse_config(path, said) if said else {}))


def load(file: Archive) -> tuple[Any, bytes]:
    """What a file of torch's holds, its tensors still in the file, and what we wrote of it if it is ours."""
    with file.open() as archive:
        root = _root(archive) or ""
        names = set(archive.namelist())
        big = root + "byteorder" in names and file.small(archive, root + "byteorder", 100) == b"big"
        program = file.small(archive, root + "data.pkl", LONGEST)
        said = file.small(archive, root + ABOUT, SMALL) if root + ABOUT in names else b""
    return unpickled(file, program, root, ">" if big else "<"), said


def _root(archive: zipfile.ZipFile) -> str | None:
    found = (name.removesuffix("data.pkl") for name in archive.namelist() if name.split("/")[-1] == "data.pkl")
    return next(found, None)


class Foreign(Unreadable):
    """An object of a class that nobody imports: whatever is done to it is remembered and has no effect."""

    state: Any = None
    items: dict[Any, Any] | None = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items = self.items or {}
        self.items[key] = value

    def is_module(self) -> bool:
        """Whether it is a module of torch, which keeps its weights under this name."""
        return isinstance(self.state, Mapping) and "_parameters" in self.state

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def attributes(self) -> dict[str, Any]:
        """What the object's own fields were, and its items if it was a mapping."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)  # (fields, slots) of a class with slots
        parts = (*parts, self.items)
        return {str(key): value for part in parts if isinstance(part, Mapping) for key, value in part.items()}


@dataclass(frozen=True)
class Storage:
    """One raw entry of the archive; a dtype of None is one that no weight has."""

    dtype: np.dtype[Any] | None
    kind: str
    count: int
    fetch: Callable[[], Array]


class _Unpickler(pickle.Unpickler):
    """Builds nothing but plain values, tensors that are still in the file, and inert objects."""

    def __init__(self, file: Archive, program: bytes, root: str, order: Order) -> None:
        super().__init__(io.BytesIO(program))
        self._file, self._root, self._order = file, root, order
        self._classes: dict[str, type[Foreign]] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = KNOWN.get((module.replace("torch.cuda", "torch"), name))
        return known if known is not None else self._foreign(f"{module}.{name}")

    def _foreign(self, qualified: str) -> type[Foreign]:
        if len(self._classes) > MOST_NAMES:
            raise CheckpointError(f"{self._file.path} names more than {MOST_NAMES:,} classes: save the state dict alone")
        if qualified not in self._classes:
            self._classes[qualified] = type("Foreign", (Foreign,), {"qualified": qualified})
        return self._classes[qualified]

    def persistent_load(self, pid: Any) -> Storage:
        _, kind, key, _, count = pid
        if isinstance(kind, type):
            return Storage(None, getattr(kind, "qualified", "?"), count, np.empty(0).copy)
        stored, file, entry = kind.newbyteorder(self._order), self._file, f"{self._root}data/{key}"
        return Storage(kind, kind.name, count, lambda: file.numbers(entry, stored, count).astype(kind, copy=False))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_typed(rebuild: Any, kind: Any, arguments: tuple[Any, ...], *_: Any) -> Any:
    """A tensor with attributes of its own, or an object of a class derived from it, such as a piece of a tensor."""
    return rebuild(*arguments) if rebuild in (_rebuild_tensor, _rebuild_parameter) else kind()


def _rebuild_tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    flags: Any = None,
) -> Tensor | Unreadable:
    """A view of a storage, which must not reach beyond it."""
    if storage.dtype is None:
        return Quantised(storage.kind)
    if flags:  # such as that all values are to be taken negative
        return Quantised(f"{storage.kind} tensor with {shown(flags, 80)}")
    numbers = (offset, storage.count, *shape, *stride)
    if len(shape) != len(stride) or any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise CheckpointError(f"a tensor of shape {shown(shape, 80)} and stride {shown(stride, 80)}")
    count: int = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if count > max(storage.count, MOST_REPEATED) or (count and last >= storage.count):
        raise CheckpointError(f"a tensor of shape {shown(shape, 80)} reaches beyond its storage of {storage.count}")
    steps = tuple(step * storage.dtype.itemsize for step in stride)

    def view() -> Array:
        return np.lib.stride_tricks.as_strided(storage.fetch()[offset:], shape, steps, writeable=False)

    return Tensor("", tuple(shape), storage.dtype, view)


class Quantised(Unreadable):
    """A tensor of numbers that no weight is made of."""

    def __init__(self, kind: str) -> None:
        self.qualified = kind


class Described(Foreign):
    """A dtype of NumPy's: its letter and size, and then the order of its bytes."""

    letter = ""

    def __init__(self, letter: Any = "", *_: Any) -> None:
        self.letter = letter if isinstance(letter, str) else ""


def _scalar(described: Any, data: Any = b"") -> Any:
    """A number of NumPy's, as configurations and metrics hold them, or something inert."""
    dtype = SCALARS.get(described.letter) if isinstance(described, Described) else None
    order = described.state[1] if dtype and isinstance(described.state, tuple) and len(described.state) > 1 else "<"
    if dtype is None or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        return Quantised("number of NumPy's")
    return np.frombuffer(data, dtype.newbyteorder(">" if order == ">" else "<"))[0].item()


def _encoded(text: Any, codec: Any) -> bytes:
    """Bytes, as the older protocols spell them."""
    return str(text).encode("latin1") if codec == "latin1" else b""


SCALARS = {
    f"{kind}{size}": np.dtype(f"<{kind}{size}")
    for kind, sizes in {"f": "248", "i": "1248", "u": "1248"}.items()
    for size in sizes
} | {"b1": np.dtype("?")}

# What a pickle may name; a dtype stands for the storage of its numbers. All else is inert.
KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("_codecs", "encode"): _encoded,
    ("numpy", "dtype"): Described,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_typed,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


def unpickled(file: Archive, program: bytes, root: str, order: Order = "<") -> Any:
    """What a pickle describes, without running anything that it names."""
    try:
        _check_program(program)
        return _Unpickler(file, program, root, order).load()
    except Exception as error:  # noqa: BLE001  a hostile or damaged pickle can raise anything at all
        told = shown(error, 200)
        raise CheckpointError(
            f"{file.path} holds a pickle that describes no tensors ({told}): save the state dict again"
        ) from None


def _check_program(program: bytes) -> None:
    """Refuse a pickle that would need much memory: more objects than a checkpoint has, or a number for one that is far off."""
    if len(program) > LONGEST:
        raise CheckpointError(f"it has {len(program):,} bytes")
    for steps, (operation, argument, _) in enumerate(pickletools.genops(program)):
        if steps > MOST_STEPS:
            raise CheckpointError(f"it has more than {MOST_STEPS:,} steps")
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(program):
            raise CheckpointError(f"it numbers an object {shown(argument, 40)}")


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
