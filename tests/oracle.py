"""Plain NumPy and Python statements of what the buffer must do, one row at a time."""

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


def dealt(ranks: list[int], offset: int, shards: int, per_device: int) -> list[set[int]]:
    """Which of the drawn ranks (ascending) each device receives."""
    hands = [set() for _ in range(shards)]
    for position, rank in enumerate(ranks):
        hands[(position + offset) % shards].add(rank)
    assert all(len(hand) <= per_device for hand in hands)
    return hands
