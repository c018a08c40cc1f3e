"""The tensors of a PyTorch file (`.pth`, `.pt`, `.bin`), read without PyTorch and without running code from the file.

A file of `torch.save` is a pickle, and a pickle may call anything that can be imported. The reader here finds by name what
rebuilds a tensor or holds one, a fixed list, and nothing else: any other name ends it. What these names stand for are functions
of this file, so nothing of the file is ever imported or called. Both forms of the file are read: the zip archive written since
PyTorch 1.6 (`data.pkl`, and a file a storage) and the row of pickles before it, with the storages' bytes behind them.

Only dense tensors of plain types are read; a file that holds a whole module, as `torch.save(model)` writes it, is refused.
"""

import io
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the row of pickles
MOST_TENSORS, MOST_DEPTH = 2**20, 16
# Names of the storages' types, whose elements are little-endian.
TYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class NotPlain(ValueError):
    """The file holds something else than tensors, or is not as PyTorch writes it."""


class _Storage(NamedTuple):
    """A run of numbers that tensors share: its elements are read when the first tensor is made."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of the file by their names, those of dicts within dicts with dots between ("state_dict.fc.weight").

    Raises:
      UserError: the file cannot be read, is damaged, or holds something else than tensors, numbers and texts; without the name
        of the field.
    """
    try:
        with path.open("rb") as file:
            found, numbers = _zipped(file) if zipfile.is_zipfile(file) else _in_a_row(file)
            return {name: _view(one, numbers) for name, one in _flat(found).items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise UserError(f"{path} is no file of PyTorch tensors: it is nested too deeply") from None
    except Exception as error:  # a damaged pickle raises what its first wrong byte leads to
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is no file of PyTorch tensors: {why}") from None


def _zipped(file: BinaryIO) -> tuple[Any, Mapping[_Storage, np.ndarray]]:
    file.seek(0)
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    (pickled,) = [name for name in names if name.rpartition("/")[2] == "data.pkl"] or [""]
    if not pickled:
        raise NotPlain("the archive has no data.pkl")
    folder = pickled[: -len("data.pkl")]
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise NotPlain("its numbers are not little-endian")
    unpickler = _Restricted(io.BytesIO(archive.read(pickled)))
    found = unpickler.load()
    numbers = {one: _elements(archive.read(f"{folder}data/{one.key}"), one) for one in unpickler.storages.values()}
    return found, numbers


def _in_a_row(file: BinaryIO) -> tuple[Any, Mapping[_Storage, np.ndarray]]:
    file.seek(0)
    if [_Restricted(file).load() for _ in range(2)] != [MAGIC, PROTOCOL]:
        raise NotPlain("it does not begin as one")
    about = _Restricted(file).load()
    if not isinstance(about, dict) or not about.get("little_endian"):
        raise NotPlain("its numbers are not little-endian")
    unpickler = _Restricted(file)
    found = unpickler.load()
    keys, numbers = _Restricted(file).load(), {}
    if not isinstance(keys, list) or sorted(keys) != sorted(unpickler.storages):
        raise NotPlain("its storages are not those of its tensors")
    for key in keys:
        one = unpickler.storages[key]
        (size,) = struct.unpack("<q", file.read(8))
        if size != one.size:
            raise NotPlain(f"storage {key} has {size} elements, not {one.size}")
        numbers[one] = _elements(file.read(size * one.dtype.itemsize), one)
    return found, numbers


def _elements(content: bytes, storage: _Storage) -> np.ndarray:
    if len(content) != storage.size * storage.dtype.itemsize:
        raise NotPlain(f"storage {storage.key} is cut off")
    return np.frombuffer(content, storage.dtype)


def _view(tensor: _Tensor, numbers: Mapping[_Storage, np.ndarray]) -> np.ndarray:
    """The tensor as an array of its own, its view checked against the storage."""
    whole, (_, offset, shape, stride) = numbers[tensor.storage], tensor
    if len(shape) != len(stride) or any(type(x) is not int or x < 0 for x in (offset, *shape, *stride)):
        raise NotPlain("a tensor has a shape or strides that are none")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 in shape:
        return np.zeros(shape, whole.dtype)
    if last >= len(whole):
        raise NotPlain("a tensor reaches beyond its storage")
    steps = [step * whole.itemsize for step in stride]
    return np.array(np.lib.stride_tricks.as_strided(whole[offset:], shape, steps, writeable=False))


def _flat(found: Any, path: str = "", depth: int = 0) -> dict[str, _Tensor]:
    """The tensors among dicts and lists; numbers and texts beside them are passed by."""
    if depth > MOST_DEPTH:
        raise NotPlain("it is nested too deeply")
    if isinstance(found, _Tensor):
        return {path.removeprefix("."): found}
    if isinstance(found, dict):
        each = found.items()
    elif isinstance(found, list | tuple) and not isinstance(found, _Storage):
        each = dict(enumerate(found)).items()
    else:
        return {}
    flat: dict[str, _Tensor] = {}
    for name, value in each:
        flat |= _flat(value, f"{path}.{name}", depth + 1)
        if len(flat) > MOST_TENSORS:
            raise NotPlain("it has too many tensors")
    return flat


# --- what stands for the names in the file ---------------------------------------------------------------------------


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _Tensor:
    del more  # whether it is trained, and hooks, which are not called
    if not isinstance(storage, _Storage):
        raise NotPlain("a tensor has no storage")
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: Any, *more: Any) -> Any:
    del more
    return data


class _Dict(dict):
    def __setstate__(self, state: Any) -> None:
        """A module's versions, which PyTorch hangs on the dict of its tensors."""


def _make_size(sizes: Any) -> tuple:
    return tuple(sizes)


class _Named:
    """What a name stands for: may be called by the file, and changed in nothing."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]):
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise NotPlain("it changes what it is read by")


FOUND: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Named(_Dict),
    ("torch", "Size"): _Named(_make_size),
    ("torch._utils", "_rebuild_tensor"): _Named(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Named(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Named(_rebuild_parameter),
    **{("torch", name): name for name in TYPES},
}


class _Restricted(pickle.Unpickler):
    """An unpickler that knows the names of `FOUND`, and the storages that the file refers to.

    Attributes:
      storages: by their key.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in FOUND:
            raise NotPlain(f"it asks for {module}.{name}, which holds no tensor and is not run")
        return FOUND[module, name]

    def persistent_load(self, ident: Any) -> _Storage:
        kind, type_name, key, _, size, *view = ident
        if kind != "storage" or type_name not in TYPES or type(size) is not int or size < 0 or any(view):
            raise NotPlain("it refers to something else than a storage")
        one = _Storage(str(key), TYPES[type_name], size)
        if self.storages.setdefault(one.key, one) != one:
            raise NotPlain(f"storage {one.key} is two things at once")
        return one
