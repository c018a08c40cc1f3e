"""Policies that look at the label: fixed sub-buffers, and two that divide the memory fairly among the classes seen."""

import jax.numpy as jnp
from jax import lax

from jaxcl.buffer import threefry as random
from jaxcl.buffer.policy.base import INT32_MAX, Policy, earlier_same, share


def class_random(capacity: int, shards: int, num_classes: int, accept: float) -> Policy:
    """One sub-buffer a class (Bouvier et al. 2024, section IV-B): append while the class has room, then accept each row
    with probability `accept` (the paper's c/b) and overwrite a uniform row of its class.

    Class k owns the row numbers [first(k), first(k+1)) of the union, about capacity / K of them, and shard i keeps those
    congruent to i: with fewer rows a class than shards a class lives on some shards only, and its rows that arrive
    elsewhere are not stored.
    """
    slots = -(-capacity // shards)
    quota, spare = divmod(capacity, num_classes)

    def first(shard, k):
        """The slot on `shard` at which the rows of class k begin."""
        return share(shard, k * quota + jnp.minimum(k, spare), shards)

    def init(shard):
        return {"fill": jnp.zeros((1, num_classes), jnp.int32)}

    def choose(meta, key, shard, label, valid):
        fill = meta["fill"][0]
        k = jnp.arange(num_classes, dtype=jnp.int32)
        begin = first(shard, k)
        room = first(shard, k + 1) - begin
        number = fill[label] + earlier_same(label, valid)
        words = random.words(key, 2 * label.shape[0])
        accepted = random.unit(words[0, : label.shape[0]]) < accept
        anywhere = random.below(words[:, label.shape[0] :], jnp.maximum(room[label], 1))
        append = number < room[label]
        slot = begin[label] + jnp.where(append, number, anywhere)
        kept = valid & (append | accepted) & (room[label] > 0)
        added = jnp.sum((label[:, None] == k[None, :]) & valid[:, None], axis=0, dtype=jnp.int32)
        return jnp.where(kept, slot, slots), {"fill": jnp.minimum(fill + added, room)[None]}

    def locate(meta, shard, rank):
        # Rank counts the stored rows class by class; each sub-buffer is filled from its beginning.
        until = jnp.cumsum(meta["fill"][0])
        k = jnp.searchsorted(until, rank, side="right", method="scan_unrolled").astype(jnp.int32)
        k = jnp.minimum(k, num_classes - 1)
        return first(shard, k) + rank - (until[k] - meta["fill"][0, k])

    def size(meta, shard):
        return jnp.sum(meta["fill"])

    return Policy(init, choose, locate, size, slots, class_sizes=lambda meta: meta["fill"][0])


def class_balanced(capacity: int, shards: int, num_classes: int) -> Policy:
    """Class-balancing reservoir sampling of each shard's own stream (Chrysakis & Moens 2020, algorithm 1).

    Until the shard is full every row is stored. Then, with m rows of its class stored out of the n that came, itself
    included: if the shard still holds all earlier rows of the class and another class is larger, the row replaces a uniform
    row among those of the largest classes; otherwise it replaces a uniform row of its own class with probability m / n.
    (The paper marks a class "full" once it was largest. Sizes of the largest class never grow in a full shard, so that is
    the class which is largest or has lost a row, and needs no mark.)

    Laws, of each shard:
      - The rows stored of a class are a uniform sample without replacement of those of its stream.
      - Once the shard is full its division is max-min fair: with M rows in the largest class, every class holds M or M - 1
        rows or all that came. A class that appears takes rows from the largest ones, one for one.
    Of the union: the class histogram is within N rows of fair where the devices see the classes in like proportions, and a
    class is then sampled uniformly up to the shards' rounding; a class that comes to one device only fills no more than its
    part of that shard.

    Slots are kept in the order of their rows' classes (`order`: class 0, class 1, ..., free), so that a uniform row of a
    class is one look-up. A slot changes class by moving one entry of each class in between: O(K) a row that grows its
    class, in a loop over the rows. Where no class grows (the shard is full, no class new) all rows are placed at once and
    the loop takes no step. Labels outside [0, K) are not stored. n saturates at 2**31 - 2.
    """
    slots = -(-capacity // shards)
    free = num_classes  # the free slots as one more class
    classes = jnp.arange(num_classes + 1, dtype=jnp.int32)

    def init(shard):
        stored = jnp.zeros((1, num_classes + 1), jnp.int32).at[0, free].set(share(shard, capacity, shards))
        order = jnp.arange(slots, dtype=jnp.int32)[None]
        return {"order": order, "stored": stored, "seen": jnp.zeros((1, num_classes), jnp.int32)}

    def choose(meta, key, shard, label, valid):
        order, stored, seen = (meta[name][0] for name in ("order", "stored", "seen"))
        n = label.shape[0]
        words = random.words(key, 2 * n)
        valid = valid & (label >= 0) & (label < num_classes)
        label = jnp.clip(label, 0, num_classes - 1)
        before = seen[label] + jnp.minimum(earlier_same(label, valid), INT32_MAX - 1 - seen[label])
        drawn = random.below(words[:, :n], before + 1)  # below m with probability m / n, and then uniform

        def grows(stored, label, before, valid):
            held = stored[label]
            return valid & ((stored[free] > 0) | ((held == before) & (held < jnp.max(stored[:free]))))

        def row(i, carry):
            order, stored, slot = carry
            c = label[i]
            grow = grows(stored, c, before[i], valid[i])
            top = jnp.maximum(jnp.max(stored[:free]), 1)
            largest = stored[:free] == top
            pick = random.below(words[:, n + i], jnp.maximum(jnp.sum(largest, dtype=jnp.int32), 1) * top)
            victim = jnp.argmax(jnp.cumsum(largest) > pick // top).astype(jnp.int32)
            victim, rank = jnp.where(stored[free] > 0, free, victim), jnp.where(stored[free] > 0, 0, pick % top)
            begin = jnp.cumsum(stored) - stored
            end = begin + stored
            at = jnp.where(grow, begin[victim] + rank, begin[c] + jnp.minimum(drawn[i], stored[c] - 1))
            # The victim's entry nearest to c fills the gap; each class in between moves its near end to its far end.
            down = victim > c
            between = ((classes > c) & (classes < victim)) | ((classes < c) & (classes > victim))
            near = jnp.where(down, begin, end - 1)
            far = jnp.where(down, end, begin - 1)
            far = jnp.where(classes == victim, at, far)
            moved = (between & (stored > 0)) | (classes == c) | ((classes == victim) & (near != at))
            # One read, on which the write depends: XLA would otherwise copy `order`.
            entry = order.at[jnp.append(near, at)].get(mode="clip")
            taken = entry[-1]
            order = order.at[jnp.where(grow & moved, far, slots + classes)].set(
                jnp.where(classes == c, taken, entry[:-1]), mode="drop", unique_indices=True
            )
            kept = grow | (valid[i] & (drawn[i] < stored[c]))
            change = grow * ((classes == c).astype(jnp.int32) - (classes == victim))
            return order, stored + change, slot.at[i].set(jnp.where(kept, taken, slots))

        # If no row grows its class, sizes stay as they are: what holds for the first row holds for all.
        at_once = order.at[(jnp.cumsum(stored) - stored)[label] + drawn].get(mode="clip")
        at_once = jnp.where(valid & (drawn < stored[label]), at_once, slots)
        steps = jnp.where(jnp.any(grows(stored, label, before, valid)), n, 0)
        order, stored, slot = lax.fori_loop(0, steps, row, (order, stored, at_once))
        added = jnp.sum((label[:, None] == classes[None, :free]) & valid[:, None], axis=0, dtype=jnp.int32)
        seen = seen + jnp.minimum(added, INT32_MAX - 1 - seen)
        return slot, {"order": order[None], "stored": stored[None], "seen": seen[None]}

    def locate(meta, shard, rank):
        return meta["order"][0].at[rank].get(mode="clip")

    def size(meta, shard):
        return jnp.sum(meta["stored"][0, :free])

    return Policy(init, choose, locate, size, slots, class_sizes=lambda meta: meta["stored"][0, :free])


def herding(capacity: int, shards: int, num_classes: int) -> Policy:
    """Exemplars in rank order (Rebuffi et al. 2017, algorithms 3 to 5), for rows that come best first.

    A row is appended to its class while the shard has room. In a full shard it takes the slot of the last exemplar of a
    largest class if that class stays at least as large as its own, else it is not stored. So classes that are offered
    enough rows share the memory to within one row, and a class that shrinks keeps its first, best rows. Among equally large
    classes shard i takes from the one next above class K - 1 - i: shards take from different classes. Nothing is random.

    `jaxcl.buffer.selection` ranks the rows. Each class is a list linked from its last row back: O(K) a row, in a loop over the
    rows, which takes no step where no row can be stored. Labels outside [0, K) are not stored.
    """
    slots = -(-capacity // shards)
    classes = jnp.arange(num_classes, dtype=jnp.int32)

    def init(shard):
        return {
            "previous": jnp.zeros((1, slots), jnp.int32),
            "last": jnp.zeros((1, num_classes), jnp.int32),
            "stored": jnp.zeros((1, num_classes), jnp.int32),
        }

    def choose(meta, key, shard, label, valid):
        previous, last, stored = (meta[name][0] for name in ("previous", "last", "stored"))
        room = share(shard, capacity, shards)
        n = label.shape[0]
        valid = valid & (label >= 0) & (label < num_classes)
        label = jnp.clip(label, 0, num_classes - 1)

        def taken(stored, label, valid):
            return valid & ((jnp.sum(stored) < room) | (stored[label] + 1 < jnp.max(stored)))

        def row(i, carry):
            previous, last, stored, slot = carry
            c, size = label[i], jnp.sum(stored)
            store, free = taken(stored, c, valid[i]), size < room
            turn = jnp.where(stored == jnp.max(stored), (classes + shard) % num_classes, -1)
            victim = jnp.argmax(turn)
            at = jnp.where(free, size, last[victim])
            at = jnp.where(store, at, slots)
            # A write that holds what was read, of two entries, the second out of range: XLA turns other forms into a copy of
            # `previous` a row.
            pair = jnp.stack([at, jnp.int32(slots + 1)])
            read = previous.at[pair].get(mode="clip")
            before = read[0]
            written = jnp.where(read < 0, read, last[c])
            previous = previous.at[pair].set(written, mode="drop", unique_indices=True)
            last = jnp.where(store & ~free & (classes == victim), before, last)
            last = jnp.where(store & (classes == c), at, last)
            stored = stored + store * ((classes == c).astype(jnp.int32) - ((classes == victim) & ~free))
            return previous, last, stored, slot.at[i].set(at)

        # In a full shard the largest class shrinks only when another grows: if no row can, none will.
        steps = jnp.where(jnp.any(taken(stored, label, valid)), n, 0)
        slot = jnp.full((n,), slots, jnp.int32)
        previous, last, stored, slot = lax.fori_loop(0, steps, row, (previous, last, stored, slot))
        return slot, {"previous": previous[None], "last": last[None], "stored": stored[None]}

    def locate(meta, shard, rank):
        return rank

    def size(meta, shard):
        return jnp.sum(meta["stored"])

    return Policy(init, choose, locate, size, slots)
