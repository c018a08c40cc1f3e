"""Checkpoints: the whole state of a run, written while it goes on, usable whenever the process is killed.

A checkpoint is a folder `TASK-INDEX` with the arrays, written by Orbax, and manifest.json, written last: its name, the state of
the run that is not an array, the config, the version of jaxcl and the code, and the size and checksum of every file. A folder
without a manifest is an interrupted save and is removed at the next start; one whose files do not match its manifest is set
aside and the one before it used. Older ones are removed only after a new one is complete and on disk.

Whatever else lies beside them is not ours and is left alone: other names, symbolic links, and a copy of a checkpoint under
another name, which its manifest tells. Where it has the name of a checkpoint that is to be written, it gets another one.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxcl
from jaxcl.errors import PeerLost, RunError, StorageError, UserError
from jaxcl.runs import files
from jaxcl.sealed import Damaged, read_sealed, sealed
from jaxcl.types import PyTree

Flat = dict[str, Any]
MANIFEST, ASIDE, ROWS = "manifest.json", ".corrupt", ".rows"
# A checkpoint, its rows until it is whole, what Orbax writes before it has its name, and a damaged one that was set aside.
_OURS = re.compile(rf"\d{{4,}}-[01]\d{{8,}}({re.escape(ROWS)}|{re.escape(ASIDE)}|\.orbax-checkpoint-tmp.*)?")
_log = logging.getLogger("jaxcl")


class Survey(NamedTuple):
    """What lies in a folder of checkpoints.

    Attributes:
      newest: the manifest of the newest whole one; None without any.
      damaged: those that are newer, and what is wrong with them.
      torn: what interrupted saves and removals have left.
      foreign: what is not ours.
    """

    newest: dict[str, Any] | None
    damaged: dict[pathlib.Path, Damaged]
    torn: list[pathlib.Path]
    foreign: list[pathlib.Path]


def flatten(tree: PyTree) -> Flat:
    """Leaves by their path, such as "params.Dense_0.kernel": independent of the classes that hold them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves have the same path"
    return flat


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree of arrays: what `Checkpoints.restore` needs to know."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def name_of(task: int, rehearsing: bool, batch: int) -> str:
    """Of a checkpoint, TASK-BATCH; names sort as the run goes on: batches of the rehearsal count from 100,000,000."""
    return f"{task:04d}-{int(rehearsing)}{batch:08d}"


def survey(folder: pathlib.Path) -> Survey:
    """Looks at every checkpoint, and reads the newest ones until one is whole; changes nothing."""
    found = Survey(None, {}, [], [])
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        if not _is_ours(path):
            found.foreign.append(path)
        elif not (path / MANIFEST).exists():
            if path.suffix != ASIDE:
                found.torn.append(path)
        elif path.suffix != ASIDE and found.newest is None:
            try:
                found = found._replace(newest={"name": path.name, **_checked(path)})
            except Damaged as error:
                found.damaged[path] = error
    return found


def tidy(found: Survey) -> None:
    """Removes what interrupted saves have left and sets damaged checkpoints aside, with a warning for each; says what is not
    ours. To be called by one process alone."""
    for path in found.torn:
        shutil.rmtree(path, ignore_errors=True)
    for path, damage in found.damaged.items():
        aside = path.with_name(path.name + ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        _log.warning(
            "checkpoint %s is damaged (%s): set aside as %s, the one before it is used if there is any",
            *(path, damage, aside.name),
        )
    if found.foreign:
        names = ", ".join(path.name for path in found.foreign[:3]) + ", ..." * (len(found.foreign) > 3)
        _log.warning("%s: not of this run and left alone: %s", found.foreign[0].parent, names)


def newest(folder: pathlib.Path) -> dict[str, Any] | None:
    """The manifest of the newest whole checkpoint with its "name", None without any, once the folder is `tidy`."""
    found = survey(folder)
    tidy(found)
    return found.newest


def read_arrays(folder: pathlib.Path, manifest: dict[str, Any], names: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays of a checkpoint, and no others: a buffer of gigabytes is left where it lies."""
    with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
        return checkpoints.read(manifest, names)


def clear(folder: pathlib.Path) -> None:
    """Removes all checkpoints, and the folder if nothing else is in it."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _is_ours(path):
            shutil.rmtree(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


class Checkpoints:
    """The checkpoints of a run in `folder`. In a run of several processes all call `save`, `restore` and `close` alike.

    Args:
      folder: on a file system that all processes share.
      keep: how many to keep, at least 1; two or more survive damage to the newest.
      config: the resolved config of the run, for the manifests.
      more: what else every manifest says, by name.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        keep: int,
        config: dict[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
    ):
        self._folder, self._keep = pathlib.Path(folder).absolute(), keep
        self._same = {"version": jaxcl.__version__, "config": config, **(more or {})}  # in every manifest
        self._commit_thread: threading.Thread | None = None
        self._error: Exception | None = None

    @functools.cached_property
    def _orbax(self) -> Any:
        """Imported and made as the first checkpoint is saved or read."""
        import orbax.checkpoint as ocp

        logging.getLogger("absl").addFilter(_is_news)
        # What a save takes of the processor, the training may miss: images do not compress, and plain files, one an array and
        # shard, need no gathering into few (OCDBT).
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))

    def save(self, name: str, state: PyTree, run: dict[str, Any], rows: Mapping[int, np.ndarray] | None = None) -> None:
        """Starts to write a checkpoint and returns when `state` may be donated; waits for an unfinished save before it.

        Args:
          name: see `name_of`.
          state: pytree of global arrays.
          run: the rest of the run's state, for JSON.
          rows: of this process's devices in host memory, by the number of the device; written before this returns.

        Raises:
          StorageError: this save or the one before failed; what was saved before is kept.
        """
        import orbax.checkpoint as ocp

        self.wait()
        flat = flatten(state)
        arrays = {key: {"shape": list(x.shape), "dtype": str(x.dtype)} for key, x in flat.items()}
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _make_way(path)
            for device, stored in (rows or {}).items():  # Orbax makes its folder last: beside it until then
                beside = self._folder / (name + ROWS)
                beside.mkdir(exist_ok=True)
                stored.tofile(beside / f"{device:05d}")
            self._orbax.save(path, args=ocp.args.PyTreeSave(flat))
        except Exception as error:
            raise _failed(path, error) from error
        manifest = {"name": name, **self._same, "run": run, "arrays": arrays}
        self._commit_thread = threading.Thread(target=self._commit, args=(path, manifest))
        self._commit_thread.start()

    def check(self) -> None:
        """Raises what a save in the background has met with, as soon as it is known; never waits."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          StorageError: it failed.
        """
        if self._commit_thread is not None:
            self._commit_thread.join()
            self._commit_thread = None
        self.check()

    def close(self) -> None:
        """Ends the threads; errors of a last save that nobody waited for are dropped."""
        if self._commit_thread is not None:
            self._commit_thread.join()
        if "_orbax" in vars(self):  # it was made
            self._orbax.close()

    def restore(
        self,
        manifest: dict[str, Any],
        target: PyTree,
        reshaped: tuple[str, ...] = (),
        ignored: tuple[str, ...] = (),
    ) -> PyTree:
        """Reads a checkpoint.

        Args:
          manifest: see `newest`.
          target: the arrays wanted, see `abstract`; any sharding and number of processes.
          reshaped: paths, or beginnings of paths, of leaves to be given as NumPy arrays in their stored shape.
          ignored: the same of stored leaves that `target` may lack.

        Raises:
          UserError: the checkpoint holds other arrays than are wanted.
        """
        import orbax.checkpoint as ocp

        wanted, stored = flatten(target), manifest["arrays"]
        path = self._folder / manifest["name"]
        arguments: Flat = {}
        for key in sorted({*wanted, *stored}):
            if key not in wanted and key.startswith(ignored):
                arguments[key] = ocp.RestoreArgs(restore_type=np.ndarray)
                continue
            if key not in wanted or key not in stored:
                raise UserError(
                    f"workdir: {path} {'lacks' if key in wanted else 'has a needless'} {key}: another version's"
                )
            x = wanted[key]
            if key.startswith(reshaped):
                arguments[key] = ocp.RestoreArgs(restore_type=np.ndarray)
                continue
            if (list(x.shape), str(x.dtype)) != (stored[key]["shape"], stored[key]["dtype"]):
                there = f"{stored[key]['dtype']}{stored[key]['shape']}"
                raise UserError(f"workdir: {key} in {path} is {there}, this run needs {x.dtype}{list(x.shape)}")
            arguments[key] = ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
        flat = self._orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
        leaves = [flat[key] for key in wanted]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)

    def read(self, manifest: dict[str, Any], names: Iterable[str]) -> dict[str, np.ndarray]:
        """Some arrays of a checkpoint by their paths, as NumPy arrays."""
        import orbax.checkpoint as ocp

        stored = {name: manifest["arrays"][name] for name in names}
        shapes = {name: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"]) for name, x in stored.items()}
        plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored}
        arguments = ocp.args.PyTreeRestore(shapes, restore_args=plain, partial_restore=True)
        return self._orbax.restore(self._folder / manifest["name"], args=arguments)

    def rows(self, manifest: dict[str, Any], devices: Iterable[int], dtype: np.dtype) -> dict[int, np.ndarray]:
        """The `rows` that were saved for these devices, as read-only maps of the files."""
        folder = self._folder / manifest["name"] / ROWS
        return {device: np.memmap(folder / f"{device:05d}", dtype, "r") for device in devices}

    def _commit(self, path: pathlib.Path, manifest: dict[str, Any]) -> None:
        """Waits for Orbax, makes everything durable, writes the manifest, removes what is too old."""
        if sys.platform == "linux":  # of this thread alone: training goes first where it needs the same cores
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                beside = path.with_name(path.name + ROWS)
                if beside.is_dir():
                    beside.rename(path / ROWS)
                # A file an array, and a disk takes as long for one that it makes durable as for several at once.
                with concurrent.futures.ThreadPoolExecutor(16) as pool:
                    found = pool.map(functools.partial(files.checksum, sync=True), paths := _files(path))
                    checksums = {str(file.relative_to(path)): x for file, x in zip(paths, found, strict=True)}
                files.write_json(path / MANIFEST, sealed({**manifest, "files": checksums}))
                files.sync_folder(self._folder)
                ours = (p for p in self._folder.iterdir() if p.suffix != ASIDE and _is_ours(p))
                whole = sorted(p for p in ours if (p / MANIFEST).is_file())
                for old in whole[: -self._keep]:
                    (old / MANIFEST).unlink()  # first, so that a half-removed one is never taken for whole
                    shutil.rmtree(old)
        except Exception as error:
            self._error = _failed(path, error)


def _make_way(path: pathlib.Path) -> None:
    """Renames what has the name of a new checkpoint and is not ours. Of several processes each may: it is done once, before
    Orbax, which waits for all of them, makes the new one."""
    if not os.path.lexists(path) or _is_ours(path):
        return
    names = (path.with_name(f"{path.name}.foreign{i or ''}") for i in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    with contextlib.suppress(FileNotFoundError):  # another process was first
        path.rename(aside)
        _log.warning("%s: not of this run, but named as the checkpoint to be saved: renamed %s", path, aside.name)


def _is_news(record: logging.LogRecord) -> bool:
    """False of the warning that Orbax logs with every save that does not use OCDBT."""
    return not str(record.msg).startswith("[process=%s][thread=%s] Skipping merge of OCDBT")


def _failed(path: pathlib.Path, error: Exception) -> RunError:
    text = " ".join(str(error).split())
    if "No space left" in text or "ENOSPC" in text:
        text = "the disk is full"
    # The processes agree on a save by collectives and barriers; Orbax makes a TimeoutError of a barrier's error.
    elif jax.process_count() > 1 and any(isinstance(x, jax.errors.JaxRuntimeError) for x in (error, error.__cause__)):
        return PeerLost(f"another process has died: {text}; checkpoint {path} is not whole, those before it are kept")
    return StorageError(f"checkpoint {path} cannot be written: {text}; those before it are kept")


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)


def _is_ours(path: pathlib.Path) -> bool:
    """Whether it was made by a save of this folder: by its name, and by what its manifest says of it."""
    if not _OURS.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    try:
        name = read_sealed(path / MANIFEST).get("name", path.name) if (path / MANIFEST).exists() else path.name
    except Damaged:
        return True
    return path.name in (name, name + ASIDE)


def _checked(path: pathlib.Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
      Damaged: it, or a file it names, is not as it was written.
    """
    manifest = read_sealed(path / MANIFEST)
    for name, (size, crc) in manifest["files"].items():
        try:
            found = files.checksum(path / name)
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
        if found[0] != size:
            raise Damaged(f"{name} has {found[0]} of {size} bytes")
        if found[1] != crc:
            raise Damaged(f"{name} has other contents")
    return manifest
