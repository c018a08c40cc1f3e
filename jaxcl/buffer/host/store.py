"""The payload of a buffer in host memory, fed by the step as it runs, read ahead for the next one.

Labels, ids and every decision stay on the device. In step t each device decides where its new rows go and which rows it has
to send, and hands both over (`Handover`). One thread of each process, the writer, applies the hand-overs step by step: it
stores the rows, gathers those to be sent and starts their transfer. The loop passes them to step t + 1, whose
all_to_all brings them where they are wanted. Idea: Bouvier et al. 2024, section IV, whose background threads do this by RPC.

What is guaranteed, whatever the threads do:
  order    A device's hand-overs come in the order of steps, as what a step decides depends on the step before; those of
           different devices come from different threads in any order. The writer applies step t when all devices of the
           process have handed it over, and never before step t - 1. One that is lost, late or doubled ends the run.
  bounds   No device hands over step t before step t - queue is applied: at most `queue` steps' rows wait.
  waiting  A hand-over waits only at that bound; the loop waits only for the rows that a step replays, in `take`.
  the end  `drain` returns when every hand-over that was made is applied. An error of the writer is raised, with its own
           traceback, by the next call of any of the functions below but `settle`, which stores the rows that were handed
           over before it, so that the state of the last step is whole; hand-overs after it are dropped, so nothing hangs.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer.draw import Plan
from jaxcl.buffer.host.messages import Asked, Handover, HandoverError, Pending
from jaxcl.buffer.host.rows import allocate, row_type
from jaxcl.check import at_least, check
from jaxcl.errors import UserError
from jaxcl.types import PyTree

BACKGROUND = ("copy", "populate", "sample", "exchange")
CHUNK = 2**24  # bytes of rows that are moved at once
PATIENCE = 1.0  # seconds after which a hand-over that has not come is looked for


class Store:
    """The rows of this process's shards, one array each whatever devices hold a copy, and the writer that serves them.

    Args:
      record: one record, a pytree of `jax.ShapeDtypeStruct`.
      slots: rows of a shard.
      narrow: of the rows gathered for a draw, how many a device is given unless some device needs more.
      mesh: the devices; a process holds the rows of the shards that its devices have.
      axis: of the mesh, one name or several, along which the shards are numbered.
      path: folder for memory-mapped files, one a shard; None: in memory.
      queue: steps that may wait to be applied, at least 1.

    Raises:
      UserError: there is not as much memory, or space on the disk, as the rows need.
    """

    def __init__(
        self, record: PyTree, slots: int, narrow: int, mesh: Mesh, axis: mesh_lib.Axis, path: str | None, queue: int
    ):
        check("buffer.queue", queue, at_least(1))
        self.row = row_type(record)
        self.slots, self.narrow, self._bound = slots, narrow, queue
        self._size = mesh_lib.axis_size(mesh, axis)
        self._split = NamedSharding(mesh, PartitionSpec(axis))
        self._number = mesh_lib.places(mesh, axis)
        held = {(device.process_index, shard) for device, shard in self._number.items()}
        self._shards = sorted(shard for process, shard in held if process == jax.process_index())
        self._stored = dict(zip(self._shards, allocate(self._shards, slots, self.row, path), strict=True))
        self._bytes = {i: x.view(np.uint8).reshape(slots, self.row.itemsize) for i, x in self._stored.items()}
        self.num_bytes = len(held) * slots * self.row.itemsize
        self.seconds = dict.fromkeys(BACKGROUND, 0.0)
        self._changed = threading.Condition()
        self._closed, self._error = True, None  # type: tuple[bool, BaseException | None]
        self.way: str | None = None  # see `go`
        self.came: int | None = 0  # rows that calls have brought to each device, modulo 2**32; None: not known
        self._asked: collections.deque[Asked] = collections.deque()
        self._begin(0)

    def _begin(self, step: int) -> None:
        self.step = step  # the next to be dispatched; the loop's thread alone counts it
        self._next = step  # the next to be applied
        self._waiting: dict[int, dict[int, Handover]] = {}
        self._handed = dict.fromkeys(self._shards, step - 1)  # the last step of each device
        self._arrived: jax.Array | None = None

    @contextlib.contextmanager
    def serving(self, step: int, staged: tuple[Pending, ...] = ()) -> Iterator["Store"]:
        """The writer runs within; at the end, also at Ctrl-C, all hand-overs are applied and the thread is gone.

        Args:
          step: the first step whose hand-over will come.
          staged: the draws which that step replays, whose rows are gathered now.

        Raises:
          UserError: the memory is moved by calls, see `calls.py`.
        """
        self.go("its writer, within `serving`")
        self._begin(step)
        self._closed, self._error = False, None
        self._arrived = self.gather(staged)
        writer = threading.Thread(target=self._write, name="buffer-writer", daemon=True)
        writer.start()
        try:
            yield self
        except BaseException:
            with contextlib.suppress(Exception):  # the one that leaves says more
                self.drain()
            raise
        else:
            self.drain()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            writer.join()

    def go(self, way: str) -> None:
        """Either the writer moves the memory or the caller's thread.

        Raises:
          UserError: it has been moved in the other way.
        """
        if self.way not in (None, way):
            raise UserError(f"buffer: this memory of the host tier is moved by {self.way}, not by {way} as well")
        self.way = way

    def hand_over(self, device: Any, *handover: Any) -> None:
        """The callback in the step; copies, as the arguments are views of memory that the step uses again. Never raises:
        an exception would come to light as an error of XLA, far from its cause."""
        self.give(int(device), Handover(*(np.array(x) for x in handover)))

    def give(self, device: int, handover: Handover) -> None:
        """Device `device` hands over; to be called by any thread. Waits at the bound of the queue alone."""
        step = int(handover.step[0])
        with self._changed:
            due = self._handed[device] + 1
            if step != due:
                what = f"the one of step {due} is lost" if step > due else "that of a step handed over before"
                self._fail(HandoverError(f"buffer: device {device} made the hand-over of step {step}, {what}"))
            self._handed[device] = step
            self._changed.wait_for(lambda: step < self._next + self._bound or self._over())
            if not self._over():
                self._waiting.setdefault(step, {})[device] = handover
                self._changed.notify_all()

    def take(self, finished: Callable[[], bool] = lambda: False) -> jax.Array | None:
        """The rows that the next step replays, uint8 `[N * draws * n, bytes]`; waits until they are gathered.

        Args:
          finished: whether the step before has ended, so that what it did not hand over will never come.
        """
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._next >= self.step or self._error, timeout=PATIENCE):
                    self._raise()
                    return self._arrived
            if finished():
                jax.effects_barrier()
                with self._changed:
                    self._check_complete()

    def passed(self, outputs: tuple[Handover, ...] = ()) -> None:
        """The next step has been dispatched, and its hand-overs are `outputs`, if they are not made by callback: one, of
        global arrays, which may still be computed."""
        for handover in outputs:
            parts = [self._parts(x) for x in handover[1:]]
            for shard in self._shards:
                self.give(shard, Handover((self.step,), *(part[shard] for part in parts)))
        self.step += 1

    def drain(self) -> None:
        """Returns when the hand-overs of all steps dispatched are applied.

        Raises:
          HandoverError: one of them never came.
        """
        jax.effects_barrier()
        with self._changed:
            self._check_complete()
            self._changed.wait_for(lambda: self._next >= self.step or self._error)
            self._raise()

    @property
    def failed(self) -> bool:
        """Whether an error has ended the writer."""
        return self._error is not None

    def settle(self) -> BaseException | None:
        """As `drain`, but if the writer has failed the rows that it owes are stored here and its error is returned.

        Raises:
          HandoverError: a hand-over never came: the rows are not those of the last step and cannot be saved.
        """
        try:
            self.drain()
        except BaseException as error:
            if error is not self._error or isinstance(error, HandoverError):
                raise
            for step in range(self._next, self.step):
                if len(self._waiting.get(step, ())) < len(self._shards):  # handed over after the error, and dropped
                    raise
                self._populate(self._waiting[step])
            return error
        return None

    def payload(self) -> dict[int, np.ndarray]:
        """The rows of each shard held here, `[slots]` of dtype `row`, by its number; to be called after `drain`."""
        self.catch_up()
        return dict(self._stored)

    def restore(self, payload: Mapping[int, np.ndarray], place: np.ndarray | None = None) -> None:
        """Takes over what `payload` gave, here or on other devices; the state that is given next is that of these rows.

        Args:
          payload: of the shards held here; with `place`, of all shards of that time, only read where it is wanted.
          place: int64 `[N * slots]`, for every slot of the shards of now the one its row had, counted over all shards of
            that time; -1 for a slot without a row. None: rows lie as they lay.
        """
        self._asked.clear()
        self.way, self.came = None, None
        for shard, stored in self._stored.items():
            if place is None:
                stored[...] = payload[shard]
                continue
            mine = place[shard * self.slots : (shard + 1) * self.slots]
            for holder, rows in payload.items():
                came = np.flatnonzero(mine // len(rows) == holder)
                for some in np.array_split(came, 1 + len(came) * self.row.itemsize // CHUNK):
                    stored[some] = rows[mine[some] % len(rows)]

    def erase(self, slots: Mapping[int, np.ndarray]) -> None:
        """Zeroes the rows at these slots of each shard, in files too, and drops those that were gathered for a step.

        Raises:
          UserError: the writer is at work.
        """
        if not self._closed:
            raise UserError(
                "buffer.tier: a memory of the host tier is changed between two runs of its writer, not within"
            )
        self._arrived, stored = None, self.payload()
        for number, at in slots.items():
            rows = stored[number]
            rows[at] = np.zeros((), self.row)
            if isinstance(rows, np.memmap):
                rows.flush()

    def put_off(self, asked: Asked) -> None:
        """What was asked for is done when it is needed, or when more than `queue` wait."""
        self._asked.append(asked)
        if len(self._asked) > self._bound:
            self.catch_up(self._asked[0])

    def catch_up(self, asked: Asked | None = None) -> None:
        """Stores and gathers what was put off, in the order of asking, up to `asked` or all of it."""
        while self._asked and (asked is None or asked.handover is not None):
            first = self._asked[0]
            if first.handover is not None:
                parts = [self._parts(x) for x in first.handover]
                first.arrived = self._apply({i: Handover(*(part[i] for part in parts)) for i in self._shards})
                first.handover = None
            self._asked.popleft()

    def gather(self, staged: tuple[Pending, ...]) -> jax.Array | None:
        """Starts the transfer of the rows of these draws, uint8 `[N * draws * n, bytes]`; None without a draw."""
        slots = [self._parts(pending.slot) for pending in staged]
        wanted = {i: np.array([np.asarray(slot[i]) for slot in slots]) for i in self._shards}
        plans = [pending.picked for pending in staged if isinstance(pending.picked, Plan)]
        firsts = [np.asarray(self._parts(plan.first)[self._shards[0]]) for plan in plans]
        return self._gather(wanted, any(np.diff(first).max() > self.narrow for first in firsts))

    def _parts(self, x: jax.Array) -> dict[int, jax.Array]:
        """The local parts of a global array, by the number of the shard that they are of."""
        if not x.sharding.is_equivalent_to(self._split, x.ndim):  # along an axis that the compiler uses as it likes
            x = jax.device_put(x, self._split)
        return {self._number[part.device]: part.data for part in x.addressable_shards}

    def _check_complete(self) -> None:
        """Every step dispatched has ended: are its hand-overs all there?"""
        lost = [(last + 1, device) for device, last in self._handed.items() if last + 1 < self.step]
        if lost and self._error is None:
            self._fail(HandoverError("buffer: the hand-over of step {} of device {} is lost".format(*min(lost))))

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._changed.notify_all()

    def _over(self) -> bool:
        return self._closed or self._error is not None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _whole(self) -> bool:
        return len(self._waiting.get(self._next, ())) == len(self._shards)

    def _write(self) -> None:
        """The writer's thread."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._over() or self._whole())
                    if self._over():
                        return
                    handovers = self._waiting[self._next]
                arrived = self._apply(handovers)
                with self._changed:
                    self._waiting.pop(self._next, None)
                    self._arrived, self._next = arrived, self._next + 1
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the run ends with it
            with self._changed:
                self._fail(error)

    def _apply(self, handovers: Mapping[int, Handover]) -> jax.Array | None:
        self._populate(handovers)
        with self._timed("copy"):
            wanted = {shard: np.asarray(handovers[shard].send)[0] for shard in self._shards}
            wide = bool(np.asarray(handovers[self._shards[0]].wide)[0])
        return self._gather(wanted, wide)

    def _populate(self, handovers: Mapping[int, Handover]) -> None:
        """Stores the rows of a step; to do it again changes nothing."""
        for shard in self._shards:
            with self._timed("copy"):
                slot, rows = np.asarray(handovers[shard].slot), np.asarray(handovers[shard].rows)
            with self._timed("populate"):
                kept = np.flatnonzero(slot < self.slots)
                self._bytes[shard][slot[kept]] = rows[kept]

    def _gather(self, wanted: Mapping[int, np.ndarray], wide: bool) -> jax.Array | None:
        """Starts the transfer of the rows at the slots int32 `[draws, n]` of each shard; None without a draw."""
        if not wanted[self._shards[0]].size:
            return None
        with self._timed("sample"):
            if not wide:
                wanted = {shard: slot[:, : self.narrow] for shard, slot in wanted.items()}
            count = wanted[self._shards[0]].size
            # New memory every time: the device may go on reading it, on a CPU as long as the array lives.
            rows = np.empty((len(self._shards), count, self.row.itemsize), np.uint8)
            for out, (shard, slot) in zip(rows, wanted.items(), strict=True):
                np.take(self._bytes[shard], slot.reshape(-1), axis=0, out=out, mode="clip")

        def part(index: Any) -> np.ndarray:
            return rows[self._shards.index((index[0].start or 0) // count)]

        with self._timed("exchange"):
            return jax.make_array_from_callback((self._size * count, self.row.itemsize), self._split, part)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin
