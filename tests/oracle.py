"""Plain NumPy and Python statements of what the buffer must do, one row at a time."""

import jax
import numpy as np

ROW_SHAPE = (3, 2)


def record_of(ids: np.ndarray) -> dict[str, np.ndarray]:
    """A record that can be recognised: every byte and float of it is a function of the row's id."""
    ids = np.asarray(ids, np.int64)
    image = (ids[:, None] * 7 + np.arange(np.prod(ROW_SHAPE))) % 251
    return {
        "image": image.reshape(-1, *ROW_SHAPE).astype(np.uint8),
        "logits": (ids[:, None] * 0.5 + np.arange(3)).astype(np.float32),
        "flag": ids % 3 == 0,
    }


def assert_whole(record: dict, label: np.ndarray, ids: np.ndarray, num_classes: int) -> None:
    """Payload, label and id of every row belong to one record."""
    for name, expected in record_of(ids).items():
        np.testing.assert_array_equal(np.asarray(record[name]), expected, err_msg=name)
        assert np.asarray(record[name]).dtype == expected.dtype
    np.testing.assert_array_equal(label, np.asarray(ids) % num_classes)


def share(shard: int, capacity: int, shards: int) -> int:
    return len(range(shard, capacity, shards))


class Reservoir:
    """One shard of algorithm R; `drawn[j]` is the integer drawn for row j out of the rows seen so far, it included."""

    def __init__(self, shard: int, capacity: int, shards: int):
        self.room, self.seen, self.slots = share(shard, capacity, shards), 0, {}

    def insert(self, ids, valid, drawn):
        for j, ident in enumerate(ids):
            if not valid[j]:
                continue
            slot = self.seen if self.seen < self.room else drawn[j]
            if slot < self.room:
                self.slots[int(slot)] = int(ident)
            self.seen += 1


class ClassRandom:
    """One shard of the per-class sub-buffers: append, then accept with a coin and overwrite a uniform row of the class."""

    def __init__(self, shard: int, capacity: int, shards: int, num_classes: int):
        quota = [capacity // num_classes + (k < capacity % num_classes) for k in range(num_classes)]
        edges = np.concatenate([[0], np.cumsum(quota)])
        owned = [[g for g in range(edges[k], edges[k + 1]) if g % shards == shard] for k in range(num_classes)]
        self.room = [len(rows) for rows in owned]
        self.begin = [rows[0] // shards if rows else None for rows in owned]
        self.fill, self.slots = [0] * num_classes, {}

    def insert(self, ids, labels, valid, accepted, anywhere):
        for j, ident in enumerate(ids):
            k = labels[j]
            if not valid[j] or self.room[k] == 0:
                continue
            if self.fill[k] < self.room[k]:
                self.slots[self.begin[k] + self.fill[k]] = int(ident)
                self.fill[k] += 1
            elif accepted[j]:
                self.slots[self.begin[k] + int(anywhere[j])] = int(ident)


def height(row: int, label: int, shard: int, shards: int) -> int:
    """Of the row number `row` of class `label` on a shard: of all heights each class has every one on a single shard."""
    width = len(f"{shards - 1:b}")
    begins = sorted(range(shards), key=lambda s: f"{s:0{width}b}"[::-1]).index(label % shards)
    return row * shards + (shard - begins) % shards


def highest(lists: list[list[int]], shard: int, shards: int) -> tuple[int, list[int]]:
    """The greatest height of a top row, and the classes that have it."""
    tops = {k: height(len(rows) - 1, k, shard, shards) for k, rows in enumerate(lists) if rows}
    top = max(tops.values(), default=-1)
    return top, [k for k in tops if tops[k] == top]


class ClassBalanced:
    """One shard of class-balancing reservoir sampling, with a list of slots a class, the free slots as the last one.

    A slot goes from one class to another past those in between: each of them hands its nearest slot on to its other end.
    """

    def __init__(self, shard: int, capacity: int, shards: int, num_classes: int):
        self.slots, self.seen, self.at = {}, [0] * num_classes, (shard, shards)
        self.lists = [[] for _ in range(num_classes)] + [list(range(share(shard, capacity, shards)))]

    def insert(self, ids, labels, valid, drawn, evict):
        """`drawn[j]` in [0, rows of the class so far, row j included); `evict(j, bound)` in [0, bound)."""
        *classes, free = self.lists
        for j, ident in enumerate(ids):
            c = labels[j]
            if not valid[j]:
                continue
            top, largest = highest(classes, *self.at)
            if free:
                slot = self.move(len(classes), 0, c)
            elif len(classes[c]) == self.seen[c] and height(len(classes[c]), c, *self.at) <= top:
                rows = len(classes[largest[0]])
                which, rank = divmod(evict(j, len(largest) * rows), rows)
                slot = self.move(largest[which], rank, c)
            else:
                slot = classes[c][drawn[j]] if drawn[j] < len(classes[c]) else None
            if slot is not None:
                self.slots[slot] = int(ident)
            self.seen[c] += 1

    def move(self, victim, rank, c):
        source, slot = self.lists[victim], self.lists[victim][rank]
        if victim > c:
            source[rank] = source[0]
            source.pop(0)
            for k in range(c + 1, victim):
                self.lists[k] += self.lists[k][:1]
                del self.lists[k][:1]
            self.lists[c].append(slot)
        else:
            source[rank] = source[-1]
            source.pop()
            for k in range(victim + 1, c):
                self.lists[k][:0] = self.lists[k][-1:]
                del self.lists[k][len(self.lists[k]) - 1 :]
            self.lists[c].insert(0, slot)
        return slot


class Fifo:
    """One shard of a memory bank: slot number of arrival modulo the shard's share."""

    def __init__(self, shard: int, capacity: int, shards: int):
        self.room, self.arrived, self.slots = share(shard, capacity, shards), 0, {}

    def insert(self, ids, valid):
        for ident in np.asarray(ids)[valid]:
            self.slots[self.arrived % self.room] = int(ident)
            self.arrived += 1


class Herding:
    """One shard of ranked exemplars: a list of slots a class, best first; the largest gives up its last."""

    def __init__(self, shard: int, capacity: int, shards: int, num_classes: int):
        self.at, self.room, self.slots = (shard, shards), share(shard, capacity, shards), {}
        self.lists = [[] for _ in range(num_classes)]

    def insert(self, ids, labels, valid):
        for j, ident in enumerate(ids):
            if not valid[j]:
                continue
            mine, (top, largest) = self.lists[labels[j]], highest(self.lists, *self.at)
            if len(self.slots) < self.room:
                slot = len(self.slots)
            elif height(len(mine), labels[j], *self.at) < top:
                slot = self.lists[largest[-1]].pop()
            else:
                continue
            mine.append(slot)
            self.slots[slot] = int(ident)


def make(policy: str, shard: int, capacity: int, shards: int, num_classes: int):
    """The oracle of a policy."""
    if policy in ("reservoir", "fifo"):
        return {"reservoir": Reservoir, "fifo": Fifo}[policy](shard, capacity, shards)
    by_class = {"class_random": ClassRandom, "class_balanced": ClassBalanced, "herding": Herding}
    return by_class[policy](shard, capacity, shards, num_classes)


def insert(one, ids, labels, valid, key, accept):
    """Gives rows to an oracle, with the random numbers that the policy draws from `key`."""

    def integers(words, bound):
        """The integers in [0, bound) that 64 random bits each stand for, as fractions of 2**64."""
        high, low = words.astype(object)
        return np.array((high * 2**32 + low) * np.broadcast_to(bound, high.shape).astype(object) >> 64, np.int64)

    n = len(ids)
    earlier = np.array([sum((labels[:j] == label) & valid[:j]) for j, label in enumerate(labels)], np.int32)
    one_each, two_each = (np.asarray(jax.random.bits(key, (2, width), np.uint32)) for width in (n, 2 * n))
    first, second = two_each[:, :n], two_each[:, n:]
    match one:
        case Reservoir():
            one.insert(ids, valid, integers(one_each, one.seen + np.cumsum(valid) - valid + 1))
        case ClassRandom():
            accepted = (first[0] >> 8) / 2**24 < np.float32(accept)
            anywhere = integers(second, np.maximum(np.asarray(one.room)[labels], 1))
            one.insert(ids, labels, valid, accepted, anywhere)
        case ClassBalanced():
            drawn = integers(first, np.asarray(one.seen)[labels] + earlier + 1)
            one.insert(ids, labels, valid, drawn, lambda j, bound: int(integers(second[:, j : j + 1], bound)[0]))
        case Fifo():
            one.insert(ids, valid)
        case Herding():
            one.insert(ids, labels, valid)


def dealt(ranks: list[int], offset: int, shards: int, per_device: int) -> list[set[int]]:
    """Which of the drawn ranks (ascending) each device receives."""
    hands = [set() for _ in range(shards)]
    for position, rank in enumerate(ranks):
        hands[(position + offset) % shards].add(rank)
    assert all(len(hand) <= per_device for hand in hands)
    return hands
