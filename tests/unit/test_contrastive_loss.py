"""The contrastive loss and its bank against plain NumPy: values, gradients, what is stored, drawn, allocated."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, draw
from jaxcl.contrastive import bank as bank_lib
from jaxcl.contrastive import loss as loss_lib
from jaxcl.contrastive import storage
from jaxcl.contrastive.bank import SIDES, BankState, make_bank
from jaxcl.mesh import AXIS

B, D, SCALE = 16, 6, 5.0


def unit(rng, n, d=D):
    x = rng.normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def oracle(anchors, candidates, positives, allowed, scale):
    """Cross-entropy of each anchor and what it does to all that is in it: loops, float64, nothing shared.

    allowed[i, j]: whether candidate j is in the sum of anchor i; positives[i]: its own.
    """
    anchors, candidates = anchors.astype(np.float64), candidates.astype(np.float64)
    losses, d_anchors, d_candidates, d_scale = [], np.zeros_like(anchors), np.zeros_like(candidates), 0.0
    for i, a in enumerate(anchors):
        cosine = candidates @ a
        weight = np.where(allowed[i], np.exp(scale * cosine), 0)
        share = weight / weight.sum()
        losses.append(np.log(weight.sum()) - scale * cosine[positives[i]])
        share[positives[i]] -= 1
        d_anchors[i] = scale * share @ candidates
        d_candidates += scale * share[:, None] * a
        d_scale += share @ cosine
    return np.array(losses), d_anchors, d_candidates, d_scale


@dataclasses.dataclass
class Case:
    """A batch of pairs, candidates to compare them with, and what is stored beside them."""

    left: np.ndarray
    right: np.ndarray
    left_keys: np.ndarray
    right_keys: np.ndarray
    key: np.ndarray
    valid: np.ndarray


def make_case(seed, momentum=False):
    rng = np.random.default_rng(seed)
    left, right = unit(rng, B), unit(rng, B)
    keys = (unit(rng, B), unit(rng, B)) if momentum else (left, right)
    key = rng.integers(0, 12, B).astype(np.int32)  # some rows match
    return Case(left, right, *keys, key, np.arange(B) % 5 != 3)


def expected(case, own_group, stored=None, same_side=False, detached=False, sides=SIDES, batch=True):
    """Loss and gradients: rows of `own_group[i] == own_group[j]` see each other; `stored` = (left, right, key) rows, of
    which `sides` are there."""
    seen = own_group[:, None] == own_group[None, :]
    other = (case.key[:, None] != case.key[None, :]) & case.valid[None, :] & seen & batch
    grads, losses, d_scale = {"left": 0, "right": 0}, 0, 0.0
    weight = case.valid / 2  # the mean of both ways, summed over valid rows
    for one, two in (("left", "right"), ("right", "left")):
        anchors, candidates = getattr(case, one), [getattr(case, f"{two}_keys")]
        allowed = [other | np.eye(B, dtype=bool)]
        if same_side:
            candidates.append(anchors)
            allowed.append(other)
        if stored is not None and two in sides:
            candidates.append(stored[SIDES.index(two)])
            allowed.append(case.key[:, None] != stored[2][None, :])
        # Rows that are not valid have a loss, which weighs nothing: leave them out of the gradients too.
        lost, *_ = oracle(anchors, np.concatenate(candidates), np.arange(B), np.concatenate(allowed, 1), SCALE)
        rows = np.flatnonzero(case.valid)
        _, d_a, d_c, d_s = oracle(
            anchors[rows], np.concatenate(candidates), rows, np.concatenate(allowed, 1)[rows], SCALE
        )
        losses = losses + lost / 2
        full = np.zeros((B, D))
        full[rows] = d_a
        if same_side:
            full += d_c[B : 2 * B]
        grads[one] = grads[one] + full / 2
        if not detached:
            grads[two] = grads[two] + d_c[:B] / 2
        d_scale += d_s / 2
    return losses * (weight > 0), grads["left"], grads["right"], d_scale


def computed(mesh, case, bank=None, state=None, key=None, gather=True, detached=False, used=True, **more):
    """The same of `info_nce` on the devices of `mesh`."""

    def local(left, right, left_keys, right_keys, row_key, valid, scale, state):
        def share(left, right, scale):
            candidates = (left_keys, right_keys) if detached else (left, right)
            options = {"gather": gather, "bank": bank, "state": state, "draw_key": key, **more}
            options["used"] = jnp.bool_(used)
            losses = loss_lib.info_nce((left, right), candidates, scale, row_key, valid, **options)
            return jnp.sum(losses, where=valid), jnp.where(valid, losses, 0)

        grads, losses = jax.grad(share, (0, 1, 2), has_aux=True)(left, right, scale)
        return losses, grads[0], grads[1], lax.psum(grads[2], AXIS)

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    specs = (*(split,) * 6, whole, whole if state is None else bank_lib.specs())
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(split, split, split, whole), check_vma=False)
    rows = mesh_lib.shard_rows(mesh, list(dataclasses.astuple(case)))
    return jax.device_get(jax.jit(run)(*rows, jnp.float32(SCALE), state))


def assert_close(found, wanted):
    for name, x, y in zip(("loss", "left", "right", "scale"), found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("same_side", [False, True], ids=["across", "same side"])
def test_gathered_is_one_device_with_the_global_batch(devices, same_side, mesh_of):
    """Whatever the devices, the loss of the whole batch and its gradients, those through the gather included."""
    case = make_case(0)
    found = computed(mesh_of(devices), case, same_side=same_side)
    assert_close(found, expected(case, np.zeros(B), same_side=same_side))


def test_in_batch_sees_its_own_device_alone(mesh_of):
    case = make_case(1)
    assert_close(computed(mesh_of(4), case, gather=False), expected(case, np.arange(B) // 4))


def test_keys_of_a_momentum_encoder_take_no_gradient(mesh_of):
    case = make_case(2, momentum=True)
    assert_close(computed(mesh_of(4), case, detached=True), expected(case, np.zeros(B), detached=True))


def test_a_queue_alone_has_no_negatives_of_the_batch(mesh_of):
    """MoCo: an anchor, its own key and the stored rows of other keys; without stored rows the positive alone, a loss of 0."""
    case, mesh = make_case(2, momentum=True), mesh_of(4)
    bank = make_bank("fifo", capacity=64, dim=D, mesh=mesh, chunk=3)
    state, rows = filled(mesh, bank, count=40)
    found = computed(mesh, case, bank, state, jax.random.key(0), detached=True, batch=False)
    assert_close(found, expected(case, np.zeros(B), stored=rows[:3], detached=True, batch=False))
    empty = computed(mesh, case, bank, bank.init(), jax.random.key(0), detached=True, batch=False)
    assert all(np.abs(x).max() < 1e-5 for x in empty)


@functools.cache
def inserter(mesh, bank):
    def local(state, left, right, rows, step):
        return bank.insert(state, dataclasses.replace(rows, record=bank.pack((left, right), step)))

    spec, whole = bank_lib.specs(), PartitionSpec()
    run = jax.shard_map(local, mesh=mesh, in_specs=(spec, *(whole,) * 4), out_specs=spec, check_vma=False)
    return jax.jit(run, donate_argnums=0)


def insert(mesh, bank, state, pair, key, ids, valid, step=0):
    return inserter(mesh, bank)(state, *pair, Rows({}, key, ids, valid), np.int32(step))


def filled(mesh, bank, seed=5, count=None):
    """A bank with `count` rows, inserted 8 at a time, and what they were: (left, right, key, id)."""
    rng, count = np.random.default_rng(seed), count or bank.capacity
    pair, state = (unit(rng, count, bank.dim), unit(rng, count, bank.dim)), bank.init()
    key = rng.integers(0, 40, count).astype(np.int32)
    ids = rng.permutation(bank.capacity)[:count].astype(np.int32)
    for start in range(0, count, 8):
        at = slice(start, start + 8)
        rows = [x[at] for x in (*pair, key, ids)]
        state = insert(mesh, bank, state, rows[:2], rows[2], rows[3], np.ones(len(rows[0]), bool), start)
    return state, (*pair, key, ids)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("chunk", [3, 64])
def test_stored_rows_are_negatives_wherever_they_lie(devices, chunk, mesh_of):
    """A queue that is not full yet, in one block or in many: the loss over batch and bank, own matches masked."""
    case, mesh = make_case(3), mesh_of(devices)
    bank = make_bank("fifo", capacity=64, dim=D, mesh=mesh, chunk=chunk)
    state, rows = filled(mesh, bank, count=40)
    found = computed(mesh, case, bank, state, jax.random.key(0))
    assert_close(found, expected(case, np.zeros(B), stored=rows[:3]))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("drawn", "chunk"), [(0, 64), (0, 7), (40, 64), (40, 2)])
def test_a_slot_an_example_with_all_or_some_as_negatives(devices, drawn, chunk, mesh_of):
    """100 slots, 92 written. A draw is the buffer's plan over the union, the same on any number of devices."""
    case, mesh, n = make_case(4), mesh_of(devices), 100
    bank = make_bank("slots", capacity=n, dim=D, mesh=mesh, drawn=drawn, chunk=chunk)
    state, (left, right, key, ids) = filled(mesh, bank, count=92)
    draw_key = jax.random.key(9)
    chosen = np.arange(n)
    if drawn:
        chosen = np.asarray(draw.make_plan(draw_key, jnp.array([n]), drawn).rank)
        assert len(set(chosen)) == drawn
    kept = np.isin(ids, chosen)
    found = computed(mesh, case, bank, state, draw_key)
    assert_close(found, expected(case, np.zeros(B), stored=(left[kept], right[kept], key[kept])))


def test_a_bank_that_is_not_used_yet_changes_nothing(mesh_of):
    case, mesh = make_case(3), mesh_of(8)
    bank = make_bank("fifo", capacity=64, dim=D, mesh=mesh, chunk=3)
    state, _ = filled(mesh, bank, count=40)
    assert_close(computed(mesh, case, bank, state, jax.random.key(0), used=False), expected(case, np.zeros(B)))


def test_a_bank_of_one_side_serves_one_way(mesh_of):
    """A queue of right sides: negatives of the left anchors; the right ones have those of the batch."""
    case, mesh = make_case(6), mesh_of(4)
    bank = make_bank("fifo", capacity=32, dim=D, mesh=mesh, sides=("right",))
    state, rows = filled(mesh, bank)
    found = computed(mesh, case, bank, state, jax.random.key(0))
    assert_close(found, expected(case, np.zeros(B), stored=rows[:3], sides=("right",)))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_queue_holds_the_last_rows_on_any_number_of_devices(devices, mesh_of):
    """Against a list: 40 batches of 16 rows, some not valid, into 48 slots; the global array is the same on any devices."""
    mesh, rng = mesh_of(devices), np.random.default_rng(0)
    bank = make_bank("fifo", capacity=48, dim=D, mesh=mesh)
    state, last, place = bank.init(), [], 0
    slots = np.full(48, -1)
    for step in range(40):
        pair, ids = (unit(rng, B), unit(rng, B)), np.arange(step * B, step * B + B, dtype=np.int32)
        valid = rng.random(B) < 0.8
        state = insert(mesh, bank, state, pair, ids % 7, ids, valid, step)
        for i in np.flatnonzero(valid):
            last = [*last, (ids[i], pair[0][i], pair[1][i], step)][-48:]
            slots[place % 48] = ids[i]
            place += 1
    held = jax.device_get(state.shard)
    np.testing.assert_array_equal(held.id, slots)
    by_id = {ident: (left, right, step) for ident, left, right, step in last}
    assert sorted(by_id) == sorted(held.id)
    for i, ident in enumerate(held.id):
        left, right, step = by_id[ident]
        np.testing.assert_array_equal(held.record["left"]["value"][i], left)
        np.testing.assert_array_equal(held.record["right"]["value"][i], right)
        assert held.record["step"][i] == step and held.label[i] == ident % 7


@pytest.mark.parametrize("devices", [1, 8])
def test_the_proximal_term_looks_up_the_examples_own_slots(devices, mesh_of):
    """Half of the batch was stored before; gradients flow into the embeddings, not into what is stored."""
    mesh, case, rng = mesh_of(devices), make_case(7), np.random.default_rng(1)
    bank = make_bank("slots", capacity=100, dim=D, mesh=mesh)
    ids, stored = rng.permutation(100)[:B].astype(np.int32), (unit(rng, B), unit(rng, B))
    known = np.arange(B) % 2 == 0
    state = insert(mesh, bank, bank.init(), stored, case.key, ids, known)

    def local(state, left, right, ids):
        def share(left, right):
            moved = loss_lib.proximal(bank, state, (left, right), ids)
            return jnp.sum(moved), moved

        return jax.grad(share, (0, 1), has_aux=True)(left, right)

    split = PartitionSpec(AXIS)
    specs = (bank_lib.specs(), split, split, split)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False))
    (d_left, d_right), moved = run(state, *mesh_lib.shard_rows(mesh, [case.left, case.right, ids]))
    steps = [known[:, None] * (x - y) for x, y in zip((case.left, case.right), stored, strict=True)]
    np.testing.assert_allclose(moved, sum((x**2).sum(1) for x in steps) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_left, steps[0], atol=1e-6)
    np.testing.assert_allclose(d_right, steps[1], atol=1e-6)


@pytest.mark.parametrize(("kind", "bound"), [("float32", 0.0), ("bfloat16", 2.0**-8), ("int8", 0.5 / 127)])
def test_what_storage_loses(kind, bound):
    """No number is off by more than half a step: of its own size in bfloat16, of the row's largest in int8; zero rows too."""
    x = np.concatenate([unit(np.random.default_rng(0), 200, 32), np.zeros((1, 32), np.float32)])
    stored = storage.encode(kind, jnp.asarray(x))
    largest = np.abs(x).max(axis=1, keepdims=True) if kind == "int8" else np.abs(x)
    assert (np.abs(np.asarray(storage.decode(stored)) - x) <= bound * largest * (1 + 1e-5)).all()
    shapes = {name: (s.shape, s.dtype) for name, s in storage.spec(kind, 32).items()}
    assert shapes == {name: (y.shape[1:], y.dtype) for name, y in stored.items()}


@functools.cache
def compiled(mesh, kind, capacity, drawn, store):
    """Insert, score, differentiate: what a step does with a bank, state donated."""
    bank = make_bank(kind, capacity=capacity, dim=8, mesh=mesh, drawn=drawn, storage=store, chunk=128)

    def local(state, rows, left, right):
        state = bank.insert(state, rows)

        def share(left, right):
            options = {"gather": True, "bank": bank, "state": state, "draw_key": jax.random.key(0)}
            key, valid = jnp.arange(2, dtype=jnp.int32), jnp.ones(2, bool)
            return jnp.sum(loss_lib.info_nce((left, right), (left, right), jnp.float32(5), key, valid, **options))

        return state, jax.grad(share, (0, 1))(left, right)

    split, spec = PartitionSpec(AXIS), bank_lib.specs()
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, PartitionSpec(), split, split), out_specs=(spec, split), check_vma=False
    )
    n = 2 * mesh.size
    x = jax.ShapeDtypeStruct((n, 8), jnp.float32)
    packed = jax.eval_shape(lambda a: bank.pack((a, a), jnp.int32(0)), x)
    numbers = jax.ShapeDtypeStruct((n,), jnp.int32)
    rows = Rows(packed, numbers, numbers, jax.ShapeDtypeStruct((n,), bool))
    state: BankState = jax.eval_shape(bank.init)
    return jax.jit(run, donate_argnums=0).lower(state, rows, x, x).compile()


@pytest.mark.parametrize(
    ("kind", "drawn", "store"), [("fifo", 0, "float32"), ("fifo", 0, "int8"), ("slots", 256, "bfloat16")]
)
def test_no_device_holds_the_bank_and_a_step_works_in_place(kind, drawn, store, mesh_of):
    """Sixteen times the rows, the same temporaries; nothing in the program has as many rows as the bank, nor, but for what is
    donated, as many as the device's share."""
    mesh = mesh_of(8)
    small, large = (compiled(mesh, kind, rows, drawn, store) for rows in (2**14, 2**18))
    growth = large.memory_analysis().temp_size_in_bytes - small.memory_analysis().temp_size_in_bytes
    assert growth <= 64, growth
    share = 2**18 // 8
    shapes = set(re.findall(r"\b([a-z]+\d*)\[([\d,]+)\]", large.as_text()))
    wide = {(dtype, shape) for dtype, shape in shapes if any(int(n) >= share for n in shape.split(","))}
    stored = {"float32": "f32", "int8": "s8", "bfloat16": "u16"}[store]
    allowed = {(stored, f"{share},8"), ("s32", f"{share}"), ("f32", f"{share}")}
    assert wide <= allowed, wide - allowed
