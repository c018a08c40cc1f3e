"""A memory as a folder of files that NumPy alone can read; it is loaded onto any number of devices, and into either tier.

    manifest.json                   what the memory is, the dtypes of its record, size and SHA-256 of every file
    shard-00000/id.npy              int32 [slots], -1 where there is no row; label.npy beside it
    shard-00000/record.image.npy    [slots, ...], one file for each leaf of the record
    shard-00000/meta.seen.npy       what the policy knows

    np.load("folder/shard-00000/record.image.npy", mmap_mode="r", allow_pickle=False)

A type that NumPy does not know is kept by its bits (bfloat16 as uint16), a key of `jax.random` as its data; the manifest says
so. The folder is whole or not there, see `folder.py`.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxcl
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import bits, weights
from jaxcl.buffer import folder as disk
from jaxcl.buffer.bits import Spec
from jaxcl.buffer.held import Memory, decoded, pieces, rows_at_once
from jaxcl.buffer.reshard import reshard
from jaxcl.buffer.shard import Shard
from jaxcl.buffer.weights import Weights
from jaxcl.errors import UserError


class Leaf(NamedTuple):
    """A leaf of the state in files.

    Attributes:
      name: its place in the state, such as "record.image".
      file: its file in the folder of a shard.
      spec: of a leaf of the record: one record's. None for others, which are as they are.
      stored: one row as it is stored in the state.
    """

    name: str
    file: str
    spec: Spec | None
    stored: Spec

    @property
    def saved(self) -> Spec:
        """One row as it is in the file: in the dtype of the record if NumPy knows it."""
        if self.spec is None or bits.is_key(self.spec) or np.dtype(self.spec.dtype).isbuiltin != 1:
            return self.stored
        return self.spec

    def to_file(self, stored: np.ndarray) -> np.ndarray:
        """Rows `[n, ...]` of the state as they are in the file."""
        return stored if self.saved == self.stored else decoded(self.saved, stored)

    def from_file(self, read: np.ndarray) -> np.ndarray:
        """The way back; a view."""
        if self.saved == self.stored:
            return read
        return read.view(self.stored.dtype).reshape(len(read), *self.stored.shape)


def save(memory: Memory, state: Shard, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes the memory into a new folder; `state` stays as it is.

    A few megabytes of rows are on the host at once. In a run of several processes all must call it; each writes its own shards,
    so the file system has to be a common one.

    Args:
      overwrite: whether the folder may be there, if it is one of `save` with nothing else in it; it is then removed, and the
        rows in it with it.

    Raises:
      UserError: the folder is there and may not be replaced, or cannot be written; what was there before stays.
    """
    final = pathlib.Path(folder).resolve()
    mesh_lib.from_first(lambda: disk.in_one_line(final, lambda: disk.begin(final, overwrite)))
    leaves, shards = _leaves(memory), memory.shards(state)
    sums = np.zeros((_count(memory), len(leaves), disk.SUM), np.uint8)

    def write() -> None:
        for number, shard in shards.items():
            place = disk.growing(final) / _name(number)
            place.mkdir()
            for i, (leaf, x) in enumerate(zip(leaves, jax.tree.leaves(_saved(shard)), strict=True)):
                blocks = map(leaf.to_file, pieces(x, rows_at_once(x)))
                sums[number, i] = disk.write(place / leaf.file, blocks, (len(x), *leaf.saved.shape), leaf.saved.dtype)
            disk.sync(place)

    disk.together(lambda: disk.in_one_line(final, write))
    every = multihost_utils.process_allgather(sums).max(axis=0)
    names = [f"{_name(number)}/{leaf.file}" for number in range(_count(memory)) for leaf in leaves]
    manifest = {
        "jaxcl": jaxcl.__version__,
        "shards": _count(memory),
        "holds": _described(memory, leaves),
        "files": dict(zip(names, map(disk.as_json, every.reshape(-1, disk.SUM)), strict=True)),
    }
    mesh_lib.from_first(lambda: disk.in_one_line(final, lambda: disk.end(final, manifest)))


def load(memory: Memory, folder: str | os.PathLike[str]) -> Shard:
    """The state that was saved, on the devices of this buffer and in its tier, which may be others than it was saved from.

    On as many devices as it was saved from the state is the same bit for bit, and so are draws. On another number every row is
    there once and the policy goes on, see `reshard`. Each file that is read is checked. In a run of several processes all must
    call it.

    Raises:
      UserError: the folder is no such one, is damaged, or is of another policy, capacity, memory or record than this buffer's;
        or the memory cannot move to another number of devices. The rows of a host tier are then as before.
    """
    return disk.together(lambda: _load(memory, pathlib.Path(folder)))


def _load(memory: Memory, folder: pathlib.Path) -> Shard:
    sizes, leaves = memory.sizes, _leaves(memory)
    manifest = disk.read_manifest(folder)
    mine, holds = _described(memory, leaves), manifest["holds"]
    for field in mine | holds:
        if (field, mine.get(field)) not in holds.items():
            raise UserError(f"{folder}: its {field} is {holds.get(field)}, that of this buffer {mine.get(field)}")

    @functools.cache
    def read(number: int, leaf: Leaf) -> np.ndarray:
        return leaf.from_file(disk.read(folder, f"{_name(number)}/{leaf.file}", manifest["files"]))

    old = manifest["shards"]
    rest = [np.concatenate([read(n, leaf) for n in range(old)]) for leaf in leaves if leaf.spec is None]
    stored = jax.tree.unflatten(jax.tree.structure(_saved(dataclasses.replace(memory.empty, record={}))), rest)
    # The record of a slot is its number, which tells where the row is to be found.
    stored = dataclasses.replace(stored, record=np.arange(len(stored.id)))
    slots = len(stored.id) // old
    if stored.weights is not None:
        leaves_of = np.reshape(stored.weights.levels[0], (old, -1))
        stored = dataclasses.replace(stored, weights=weights.build(leaves_of, np.asarray(stored.weights.greatest)))
    if old != sizes.shards:
        stored = reshard(
            stored,
            policy=memory.name,
            capacity=sizes.capacity,
            num_classes=sizes.policy.classes or 0,
            old=old,
            new=sizes.shards,
            memory=sizes.memory,
        )
    place = np.where(stored.id >= 0, stored.record, -1)
    record = [leaf for leaf in leaves if leaf.spec is not None]
    state = jax.tree.map(lambda x: memory.place(x.shape, x.__getitem__), dataclasses.replace(stored, record={}))
    if memory.host is not None:
        held = memory.host.payload()
        for n, leaf in itertools.product(held, record):
            at = place[n * memory.host.slots :][: memory.host.slots]
            for number in np.unique(at[at >= 0] // slots):
                read(int(number), leaf)  # all is checked before a row is replaced
        for rows in held.values():
            rows[...] = np.zeros((), rows.dtype)
        columns: dict[int, Any] = {n: _Columns(memory.host.row, slots, record, n, read) for n in range(old)}
        memory.host.restore(columns, place)
        return state

    def part(leaf: Leaf, index: tuple[slice, ...]) -> np.ndarray:
        at = place[index[0]]
        out = np.zeros((len(at), *leaf.stored.shape), leaf.stored.dtype)
        _gather(out, at, slots, functools.partial(read, leaf=leaf))
        return out

    arrays = [memory.place((len(place), *leaf.stored.shape), functools.partial(part, leaf)) for leaf in record]
    return dataclasses.replace(state, record=jax.tree.unflatten(jax.tree.structure(sizes.stored), arrays))


def _saved(shard: Shard) -> Shard:
    """What of a shard is in files: of its weights those of the rows, as their sums follow from them."""
    if shard.weights is None:
        return shard
    tree = Weights(shard.weights.levels[:1], shard.weights.greatest, shard.weights.positive)
    return dataclasses.replace(shard, weights=tree)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The rows of a saved shard as `Store.restore` reads them, of a file for each leaf."""

    row: np.dtype
    slots: int
    leaves: list[Leaf]
    number: int
    read: Callable[[int, Leaf], np.ndarray]

    def __len__(self) -> int:
        return self.slots

    def __getitem__(self, at: Any) -> np.ndarray:
        rows = np.zeros(len(at), self.row)
        for name, leaf in zip(self.row.names or (), self.leaves if len(at) else (), strict=False):
            rows[name] = self.read(self.number, leaf)[at]
        return rows


def _gather(out: np.ndarray, place: np.ndarray, slots: int, read: Callable[[int], np.ndarray]) -> None:
    """Fills `out` `[n, ...]` with the rows at `place`, int64 `[n]`, counted over shards of `slots` rows; -1: with zeros."""
    at_once = rows_at_once(out)
    for begin in range(0, len(place), at_once):
        some = place[begin : begin + at_once]
        holder = some // slots
        for number in np.unique(holder):
            at = np.flatnonzero(holder == number)
            out[begin + at] = 0 if number < 0 else read(int(number))[some[at] % slots]


def _leaves(memory: Memory) -> list[Leaf]:
    """Those of a shard, in their order."""
    flat, sizes = jax.tree_util.tree_leaves_with_path, memory.sizes
    specs, stored = jax.tree.leaves(sizes.record), flat(sizes.stored)
    found = [(bits.leaf_name("record", path), spec, x) for (path, x), spec in zip(stored, specs, strict=True)]
    for path, x in flat(_saved(dataclasses.replace(memory.empty, record={}))):
        found.append((jax.tree_util.keystr(path, simple=True, separator="."), None, Spec(x.shape[1:], x.dtype)))
    files = [re.sub(r"[^\w.-]", "_", name, flags=re.ASCII) for name, *_ in found]
    twice = {file for file in files if files.count(file) > 1}
    files = [f"{file}-{i}.npy" if file in twice else f"{file}.npy" for i, file in enumerate(files)]
    return [Leaf(name, file, spec, x) for (name, spec, x), file in zip(found, files, strict=True)]


def _described(memory: Memory, leaves: list[Leaf]) -> dict[str, Any]:
    """What a memory must have in common with one that takes over its rows."""
    sizes = memory.sizes
    found: dict[str, Any] = {
        "policy": memory.name,
        "capacity": sizes.capacity,
        "memory": sizes.memory,
        "num_classes": sizes.policy.classes,
        "num_ids": sizes.num_ids,
    }
    for leaf in leaves:
        if leaf.spec is None:  # some have a shape that depends on the number of devices
            found[leaf.name] = str(leaf.stored.dtype)
            continue
        found[leaf.name] = f"{leaf.spec.dtype} {list(leaf.spec.shape)}"
        if leaf.saved != leaf.spec:
            found[leaf.name] += f" as {leaf.saved.dtype} {list(leaf.saved.shape)}"
    return found


def _count(memory: Memory) -> int:
    """Shards in a folder."""
    return 1 if memory.sizes.memory == "replicated" else memory.sizes.shards


def _name(number: int) -> str:
    return f"shard-{number:05d}"
