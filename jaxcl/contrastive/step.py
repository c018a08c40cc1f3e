"""One contrastive step, data-parallel: a single compiled, donated program over all devices.

    pending (the embeddings of step t - 1) -> gather -> INSERT into this device's share of the bank
    batch -> augment -> embed -> [score against the batch and the bank -> gradients -> sum over devices -> optimiser] x passes
    the embeddings of the last pass -> pending

The bank is written before it is read, so that it stays in place: what a step makes enters it at the start of the next, which
is what a queue that is filled at the end of a step means.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer.shard import Rows
from jaxcl.contrastive import bank as bank_lib
from jaxcl.contrastive import loss as loss_lib
from jaxcl.contrastive.bank import Bank, BankState
from jaxcl.data.augment import Augment
from jaxcl.mesh import AXIS
from jaxcl.models import Towers
from jaxcl.types import PyTree

Batch = dict[str, Any]
NEGATIVES = ("in_batch", "gathered", "fifo", "full_bank", "momentum")
PAIRS = ("captions", "views", "styles")
MAX_SCALE = 100.0  # of the inverse temperature, as in CLIP: beyond it training may become unstable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContrastiveState:
    """The state of a contrastive run between steps.

    Attributes:
      step: int32, steps taken; seeds the random numbers of the step.
      seed: int32 of the run; an array, so that runs which differ in it share a program.
      params: {"towers": ..., "log_scale": float32}; whole on every device.
      opt_state: of the optimiser; whole.
      keys: the moving average of the towers' parameters, {} without a momentum encoder; whole.
      bank: None without one.
      pending: the rows that the next step inserts, split by rows; None without a bank.
    """

    step: jax.Array
    seed: jax.Array
    params: PyTree
    opt_state: PyTree
    keys: PyTree
    bank: BankState | None
    pending: Rows | None


def specs(banked: bool) -> ContrastiveState:
    """How the state lies on the mesh."""
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    bank = bank_lib.specs() if banked else None
    return ContrastiveState(whole, whole, whole, whole, whole, bank, split)  # type: ignore[arg-type]


def kinds_of(pairs: str) -> tuple[str, str]:
    """Which towers encode the left and the right side of a pair."""
    return ("image", "text") if pairs == "captions" else ("image", "image")


def make_inputs(pairs: str, augment: Augment) -> Callable[[jax.Array, jax.Array, Batch], Sequence[jax.Array]]:
    """Returns `inputs_of(key, rows, batch)`: what the two towers are given. `rows`: positions in the global batch."""

    def inputs_of(key: jax.Array, rows: jax.Array, batch: Batch) -> Sequence[jax.Array]:
        left = augment(jax.random.fold_in(key, 0), rows, batch["image"])
        if pairs == "captions":
            return left, batch["target"]["text"]
        other = batch["image"] if pairs == "views" else batch["target"]["image"]
        return left, augment(jax.random.fold_in(key, 1), rows, other)

    return inputs_of


def initial_state(
    mesh: Mesh,
    towers: Towers,
    optimizer: optax.GradientTransformation,
    bank: Bank | None,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int,
    temperature: float,
    batch_size: int,
    momentum: bool,
) -> ContrastiveState:
    """The state before the first step. `shapes` of one input of each tower."""

    def make(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
        params = {"towers": towers.init(key, dict(shapes)), "log_scale": jnp.float32(-jnp.log(temperature))}
        keys = jax.tree.map(jnp.copy, params["towers"]) if momentum else {}
        return params, optimizer.init(params), keys

    def no_rows() -> Rows:
        assert bank is not None
        b = batch_size // mesh.size
        no = jnp.full((b,), -1, jnp.int32)
        return Rows(bank.pack([jnp.zeros((b, bank.dim))] * 2, jnp.int32(0)), no, no, jnp.zeros((b,), bool))

    params, opt_state, keys = jax.jit(make, out_shardings=mesh_lib.replicated(mesh))(jax.random.key(seed))
    pending = None
    if bank is not None:
        split = jax.shard_map(no_rows, mesh=mesh, in_specs=(), out_specs=PartitionSpec(AXIS), check_vma=False)
        pending = jax.jit(split)()
    return ContrastiveState(
        step=mesh_lib.replicate(mesh, jnp.int32(0)),
        seed=mesh_lib.replicate(mesh, jnp.int32(seed)),
        params=params,
        opt_state=opt_state,
        keys=keys,
        bank=bank.init() if bank else None,
        pending=pending,
    )


def make_step(
    mesh: Mesh,
    towers: Towers,
    bank: Bank | None,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    augment: Augment,
    *,
    negatives: str,
    pairs: str = "captions",
    steps_per_epoch: int = 1,
    passes: int = 1,
    same_side: bool = False,
    proximal: float = 0.0,
    bank_start: float = 0.0,
    momentum: float = 0.999,
) -> Any:
    """Binds the parts to `step(state, batch) -> (state, metrics)`, jitted and donating the state.

    `batch` is what `jaxcl.data.Loader` gives: "image", "label" (the key: rows of one key match), "id", "valid" and "target",
    which holds "text" int32 `[B, L]` of captions, or "image", the other style.

    Args:
      schedule: learning rate as a function of the epoch.
      passes: optimiser steps on one batch; the bank takes in the embeddings of the last.
      proximal: lambda, of "full_bank".
      bank_start: the epoch from which the bank's rows are negatives; until then it only takes them in.
      momentum: m of the key encoders, of "momentum".

    Metrics: loss (the whole of it), proximal (its term before lambda), positive (mean cosine of the pairs), scale,
    learning_rate, rows; of the last pass.
    """
    gather, kinds, inputs_of = negatives != "in_batch", kinds_of(pairs), make_inputs(pairs, augment)

    def embed(params: PyTree, inputs: Sequence[jax.Array]) -> loss_lib.Pair:
        left, right = (towers.encode(params, kind, x) for kind, x in zip(kinds, inputs, strict=True))
        return left, right

    def local_step(state: ContrastiveState, batch: Batch) -> tuple[ContrastiveState, PyTree]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        augment_key, draw_key = jax.random.split(key)
        held = state.bank
        if bank is not None and held is not None:
            held = bank.insert(held, jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True), state.pending))
        b, valid = len(batch["valid"]), batch["valid"]
        rows = lax.axis_index(AXIS) * b + jnp.arange(b, dtype=jnp.int32)
        inputs = inputs_of(augment_key, rows, batch)
        epoch = state.step / steps_per_epoch
        rate = jnp.asarray(schedule(epoch), jnp.float32)
        total = jnp.maximum(lax.psum(jnp.sum(valid, dtype=jnp.float32), AXIS), 1.0)

        def one_pass(carry: tuple[PyTree, ...], i: jax.Array) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
            params, opt_state, keys = carry
            stored = embed(keys, inputs) if negatives == "momentum" else None

            def share(params: PyTree) -> tuple[jax.Array, tuple[PyTree, ...]]:
                """This device's share of the sum over all valid rows."""
                pair = embed(params["towers"], inputs)
                scale = jnp.minimum(jnp.exp(params["log_scale"]), MAX_SCALE)
                losses = loss_lib.info_nce(
                    pair,
                    stored or pair,
                    scale,
                    batch["label"],
                    valid,
                    gather=gather,
                    same_side=same_side,
                    bank=bank,
                    state=held,
                    draw_key=jax.random.fold_in(draw_key, i),
                    used=epoch >= bank_start,
                )
                moved = jnp.zeros_like(losses)
                if proximal:
                    assert bank is not None and held is not None
                    moved = loss_lib.proximal(bank, held, pair, batch["id"])
                positive = jnp.sum(pair[0] * pair[1], axis=1)
                value, *means = (jnp.sum(x, where=valid) for x in (losses + proximal * moved, moved, positive))
                return value, (pair, scale, means)

            (value, (pair, scale, means)), grads = jax.value_and_grad(share, has_aux=True)(params)
            grads, value, means = jax.tree.map(lambda x: x / total, lax.psum((grads, value, means), AXIS))
            direction, opt_state = optimizer.update(grads, opt_state, params)
            params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
            if stored is not None:
                keys = jax.tree.map(lambda k, p: momentum * k + (1 - momentum) * p, keys, params["towers"])
            metrics = {"loss": value, "proximal": means[0], "positive": means[1], "scale": scale}
            return (params, opt_state, keys), (stored or pair, metrics)

        carry = (state.params, state.opt_state, state.keys)
        if passes == 1:
            carry, (made, metrics) = one_pass(carry, jnp.int32(0))
        else:
            carry, outputs = lax.scan(one_pass, carry, jnp.arange(passes, dtype=jnp.int32))
            made, metrics = jax.tree.map(lambda x: x[-1], outputs)
        params, opt_state, keys = carry
        pending = None
        if bank is not None:
            pending = Rows(bank.pack(made, state.step), batch["label"], batch["id"], valid)
        metrics |= {"learning_rate": rate, "rows": total}
        return ContrastiveState(state.step + 1, state.seed, params, opt_state, keys, held, pending), metrics

    spec, split, whole = specs(bank is not None), PartitionSpec(AXIS), PartitionSpec()
    mapped = jax.shard_map(local_step, mesh=mesh, in_specs=(spec, split), out_specs=(spec, whole), check_vma=False)
    return jax.jit(mapped, donate_argnums=0)
