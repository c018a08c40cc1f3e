"""The contrastive step: N devices are one device, whatever the negatives; passes, keys, what enters the bank and when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.contrastive.bank import make_bank
from jaxcl.contrastive.step import WITH_KEYS, initial_state, make_step
from jaxcl.data import make_augment
from jaxcl.models import make_towers
from tests.rig import close

B, SHAPE, LENGTH, DIM, N = 16, (8, 8, 1), 5, 6, 50
TOWERS = make_towers(DIM, 6, 8, 32)  # LayerNorm of two or three channels would blow rounding up


def make_batch(seed, pairs="captions"):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, B, *SHAPE)).astype(np.uint8)
    ids = rng.permutation(N)[:B].astype(np.int32)
    text = rng.integers(0, 32, (B, LENGTH)).astype(np.int32)
    return {
        "image": images[0],
        "label": ids % 20,
        "id": ids,
        "valid": rng.random(B) < 0.8,
        "target": {"text": text} if pairs == "captions" else {"image": images[1]},
    }


def run(mesh, negatives, steps=3, pairs="captions", rows=32, temperature=0.2, **options):
    """The states after each step, on the host."""
    bank = None
    if negatives in ("fifo", *WITH_KEYS):
        bank = make_bank("fifo", capacity=rows, dim=DIM, mesh=mesh, chunk=5)
    elif negatives == "full_bank":
        bank = make_bank("slots", capacity=N, dim=DIM, mesh=mesh, drawn=12)
    optimizer = optax.identity()
    shapes = {"image": SHAPE} | ({"text": (LENGTH,)} if pairs == "captions" else {})
    start = {"seed": 3, "temperature": temperature, "batch_size": B, "momentum": negatives in WITH_KEYS}
    state = initial_state(mesh, TOWERS, optimizer, bank, shapes, **start)
    augment = make_augment(("crop",), SHAPE)
    step = make_step(
        mesh, TOWERS, bank, optimizer, lambda epoch: 0.05, augment, negatives=negatives, pairs=pairs, **options
    )
    found = []
    for t in range(steps):
        state, metrics = step(state, mesh_lib.shard_rows(mesh, make_batch(t, pairs)))
        found.append(jax.device_get((state, metrics)))
    return found


CASES = {
    "views, both sides": pytest.param("gathered", {"pairs": "views", "same_side": True}, marks=pytest.mark.slow),
    "full bank": ("full_bank", {"proximal": 0.5, "passes": 2}),
    "momentum": ("momentum", {"momentum": 0.8}),
    "moco": pytest.param("moco", {"momentum": 0.8}, marks=pytest.mark.slow),
}


@pytest.mark.parametrize(("negatives", "options"), CASES.values(), ids=CASES)
def test_four_devices_are_one(negatives, options, mesh_of):
    """Weights, keys, bank and metrics after three steps with rows that are not valid, augmented images and stored rows
    older than the last batch."""
    one, many = (run(mesh_of(n), negatives, **options)[-1] for n in (1, 4))
    # The full bank's global arrays have the same length on 1 and 4 devices; so has the queue.
    close(*(dataclasses.replace(x[0], pending=None) for x in (one, many)), rtol=1e-4, atol=1e-5)
    close(one[1], many[1], rtol=1e-4, atol=1e-5)
    assert one[1]["loss"] > 0 and one[1]["rows"] == make_batch(2)["valid"].sum()


def test_the_bank_lags_a_step_and_the_keys_follow(mesh_of):
    """What step t makes is pending after it and in the bank after step t + 1, as the key encoders made it; these are the moving
    average of the weights."""
    found = [state for state, _ in run(mesh_of(2), "momentum", momentum=0.8)]
    for t in (0, 1):
        batch, old, new = make_batch(t), found[t], found[t + 1]
        ids = batch["id"][batch["valid"]]
        held = new.bank.shard
        slots = [int(np.flatnonzero((held.id == i) & (held.record["step"] == t))[0]) for i in ids]
        for side in ("left", "right"):
            np.testing.assert_array_equal(
                held.record[side]["value"][slots], old.pending.record[side]["value"][batch["valid"]]
            )
        wanted = jax.tree.map(lambda k, p: 0.8 * k + 0.2 * p, old.keys, new.params["towers"])
        close(new.keys, wanted, rtol=1e-5, atol=1e-7)
    texts = TOWERS.encode(found[0].keys, "text", jnp.asarray(make_batch(1)["target"]["text"]))
    np.testing.assert_allclose(found[1].pending.record["right"]["value"], texts, rtol=1e-5, atol=1e-6)


def test_passes_are_steps_on_one_batch(mesh_of):
    """Two passes of a batch without augmentation or bank are two steps on it."""
    mesh = mesh_of(1)
    optimizer, augment = optax.identity(), make_augment((), SHAPE)
    shapes = {"image": SHAPE, "text": (LENGTH,)}
    found = []
    for passes in (1, 2):
        state = initial_state(
            mesh, TOWERS, optimizer, None, shapes, seed=0, temperature=0.2, batch_size=B, momentum=False
        )
        step = make_step(
            mesh, TOWERS, None, optimizer, lambda epoch: 0.05, augment, negatives="gathered", passes=passes
        )
        for _ in range(2 // passes):
            state, metrics = step(state, mesh_lib.shard_rows(mesh, make_batch(0)))
        found.append((state.params, state.opt_state, metrics["loss"]))
    close(*found, rtol=1e-4, atol=1e-5)


def test_the_learned_scale_is_held_at_a_hundred(mesh_of):
    """Beyond the bound neither the loss nor a gradient knows the temperature any more."""
    ((state, metrics),) = run(mesh_of(1), "gathered", steps=1, temperature=1e-3)
    assert float(metrics["scale"]) == 100
    assert float(state.params["log_scale"]) == pytest.approx(np.log(1e3), rel=1e-6)  # as it began


def test_moco_learns_from_the_queue_alone(mesh_of):
    """The first step finds an empty queue and has nothing to tell its positives from; the third has the rows of the first."""
    (_, first), (_, second), (_, third) = run(mesh_of(1), "moco", momentum=0.8)
    assert abs(float(first["loss"])) < 1e-5 and float(second["loss"]) > 0.1 and float(third["loss"]) > 0.1
