"""`npz:FILE`: arrays of a NumPy archive, x_train, y_train, x_test, y_test and optionally class_names; or `npz:DIR`, a folder of
such arrays as files of their own, x_train.npy and so on, whose memory is mapped where they are large.

Images are uint8 [n, H, W] or [n, H, W, C], labels integers [n]. What an array claims to hold is compared with the bytes that
the archive has of it, and with the memory that is free, before anything is allocated.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcl.data.source import Source, array_source
from jaxcl.data.sources.base import brief, check_labels, wrong
from jaxcl.errors import UserError
from jaxcl.memory import free_memory

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_MAPPED = 1 << 28  # bytes from which an array of a folder is left on disk
_MOST = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # bytes that a byte of a file can stand for


def npz(*, rest: str, **_: Any) -> tuple[Source, Source]:
    """Opens the archive, or the folder, `rest`. See `open_source`."""
    name = f"npz:{rest}"
    if not rest:
        raise wrong("npz", "is not allowed, give npz:FILE or npz:DIR")
    read = _read_folder if os.path.isdir(os.path.expanduser(rest)) else read_arrays
    arrays = read(name, rest, _ARRAYS, ("class_names",))
    labels = {split: arrays[f"y_{split}"] for split in ("train", "test")}
    images = {split: _images(name, split, arrays[f"x_{split}"], y) for split, y in labels.items()}
    one, other = (x.shape[1:] for x in images.values())
    if one != other:
        raise wrong(name, f"has images {one} in x_train and {other} in x_test, give one shape")
    class_names = _class_names(arrays.get("class_names"), list(labels.values()))
    for split, y in labels.items():
        check_labels(name, f"y_{split}", y, len(class_names))
    train, test = (array_source(images[split], y, class_names) for split, y in labels.items())
    return train, test


def _images(name: str, split: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Images with an axis of channels, one for each label."""
    if x.dtype != np.uint8:
        raise wrong(name, f"has x_{split} of {x.dtype}, give uint8")
    if x.ndim not in (3, 4) or 0 in x.shape[1:]:
        raise wrong(name, f"has x_{split} of shape {x.shape}, give [n, H, W] or [n, H, W, C]")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise wrong(name, f"has y_{split} of {y.dtype} and shape {y.shape}, give integers [n]")
    if len(x) != len(y):
        raise wrong(name, f"has {len(x)} rows in x_{split} and {len(y)} in y_{split}, give as many")
    return x if x.ndim == 4 else x[..., None]


def _class_names(given: np.ndarray | None, labels: Sequence[np.ndarray]) -> list[str]:
    if given is not None:
        return [str(name) for name in np.atleast_1d(given)]
    highest = max([0, *(int(y.max()) for y in labels if len(y))])
    # No set has more classes than rows: labels that say so (years, say) are outside.
    return [str(k) for k in range(min(highest + 1, max(1, sum(map(len, labels)))))]


def read_arrays(name: str, path: str, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an archive by name.

    Raises:
      UserError: there is no such file, or it is no archive of whole plain arrays, or one that is `needed` is missing.
    """
    try:
        with zipfile.ZipFile(os.path.expanduser(path)) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            missing = [key for key in needed if key not in members]
            if missing:
                raise wrong(name, f"lacks {', '.join(missing)}, give {', '.join(needed)}")
            return {key: _read(archive, members[key]) for key in (*needed, *optional) if key in members}
    except UserError:  # which is a ValueError
        raise
    except FileNotFoundError:
        raise wrong(name, f"cannot be read: there is no file {os.path.abspath(path)}") from None
    except OSError as error:
        raise wrong(name, f"cannot be read ({error.strerror or brief(error)})") from None
    except MemoryError as error:
        raise wrong(name, f"does not fit into memory ({brief(error)})") from None
    # What zipfile and NumPy raise for damage, encryption, a compression they do not know and a header that is no header.
    except (ValueError, TypeError, EOFError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        raise wrong(name, f"is not an npz file of plain arrays ({brief(error)})") from None


def _read_folder(name: str, path: str, needed: Sequence[str], optional: Sequence[str]) -> dict[str, np.ndarray]:
    """As `read_arrays`, of a folder of .npy files; those of `_MAPPED` bytes and more are mapped, and read-only."""
    files = {key: os.path.join(os.path.expanduser(path), f"{key}.npy") for key in (*needed, *optional)}
    missing = [f"{key}.npy" for key in needed if not os.path.isfile(files[key])]
    if missing:
        raise wrong(name, f"lacks {', '.join(missing)}, give {', '.join(f'{key}.npy' for key in needed)}")
    found = {}
    for key, file in files.items():
        if os.path.isfile(file):
            try:  # mapping compares what the header claims with the file's length, before anything is allocated
                mapped = np.load(file, mmap_mode="r", allow_pickle=False)
                found[key] = mapped if mapped.nbytes >= _MAPPED else np.array(mapped)
            except (OSError, ValueError, EOFError, TypeError, SyntaxError):
                raise wrong(name, f"has a file that is no whole array of NumPy's: {file}") from None
    return found


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array, once its header has been compared with the bytes that are there."""
    key, formats = member.filename, np.lib.format
    if member.flag_bits & 1:
        raise ValueError(f"{key} is encrypted")
    with archive.open(member) as file:
        version = formats.read_magic(file)
        header = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
        shape, _, dtype = header(file)
        if dtype.hasobject:
            raise ValueError(f"{key} holds Python objects")
        claimed, begin = math.prod(shape) * dtype.itemsize, file.tell()
    there = min(member.compress_size, os.path.getsize(archive.filename or ""))
    most = there * _MOST.get(member.compress_type, 2**20)
    if min(shape, default=0) < 0 or claimed != member.file_size - begin or claimed > most:
        raise ValueError(f"{key} claims shape {shape} of {dtype}, {claimed} bytes that are not there")
    if claimed > (free := free_memory()):
        raise MemoryError(f"{key} takes {claimed / 1e9:.4g} GB, {free / 1e9:.4g} GB are free")
    with archive.open(member) as file:
        return formats.read_array(file, allow_pickle=False)
