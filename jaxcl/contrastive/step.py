"""One contrastive step, data-parallel: a single compiled, donated program over all devices.

    pending (the embeddings of step t - 1) -> gather -> INSERT into this device's share of the bank
    batch -> augment -> embed -> [score against the batch and the bank -> gradients -> sum over devices -> optimiser] x passes
    the embeddings of the last pass -> pending

The bank is written before it is read, so that it stays in place: what a step makes enters it at the start of the next, which
is what a queue that is filled at the end of a step means.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from jaxcl import mesh as mesh_lib
from jaxcl.buffer.shard import Rows
from jaxcl.contrastive import bank as bank_lib
from jaxcl.contrastive import loss as loss_lib
from jaxcl.contrastive.bank import Bank, BankState
from jaxcl.data.augment import Augment
from jaxcl.mesh import AXIS, ROWS, WHOLE, on_mesh
from jaxcl.models import Towers
from jaxcl.types import Batch, PyTree

NEGATIVES = ("in_batch", "gathered", "fifo", "full_bank", "momentum", "moco")
WITH_KEYS = ("momentum", "moco")  # anchors are compared with what momentum encoders make
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
    fields: dict[str, Any] = {field.name: WHOLE for field in dataclasses.fields(ContrastiveState)}
    return ContrastiveState(**fields | {"bank": bank_lib.specs() if banked else None, "pending": ROWS})


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

    params, opt_state, keys = jax.jit(make, out_shardings=mesh_lib.replicated(mesh))(jax.random.key(seed))
    pending = None
    if bank is not None:
        pending = on_mesh(mesh, functools.partial(no_rows, bank, batch_size // mesh.size), (), ROWS)()
    return ContrastiveState(
        step=mesh_lib.replicate(mesh, jnp.int32(0)),
        seed=mesh_lib.replicate(mesh, jnp.int32(seed)),
        params=params,
        opt_state=opt_state,
        keys=keys,
        bank=bank.init() if bank else None,
        pending=pending,
    )


def no_rows(bank: Bank, b: int) -> Rows:
    """`b` rows a device that are not valid, as the first step finds them."""
    no = jnp.full((b,), -1, jnp.int32)
    return Rows(bank.pack([jnp.zeros((b, bank.dim))] * 2, jnp.int32(0)), no, no, jnp.zeros((b,), bool))


@dataclasses.dataclass(frozen=True)
class Bound:
    """What the steps of a run are bound to.

    Attributes:
      schedule: learning rate as a function of the epoch.
      negatives: one of `NEGATIVES`.
      pairs: one of `PAIRS`.
      passes: optimiser steps on one batch; the bank takes in the embeddings of the last.
      same_side: see `loss.info_nce`.
      proximal: lambda, of "full_bank".
      bank_start: the epoch from which the bank's rows are negatives; until then it only takes them in.
      momentum: m of the key encoders, of "momentum" and "moco".
    """

    towers: Towers
    bank: Bank | None
    optimizer: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]
    augment: Augment
    negatives: str
    pairs: str = "captions"
    steps_per_epoch: int = 1
    passes: int = 1
    same_side: bool = False
    proximal: float = 0.0
    bank_start: float = 0.0
    momentum: float = 0.999

    def embed(self, params: PyTree, inputs: Sequence[jax.Array]) -> loss_lib.Pair:
        """Both sides' embeddings float32 `[b, D]`, of length 1."""
        kinds = kinds_of(self.pairs)
        left, right = (self.towers.encode(params, kind, x) for kind, x in zip(kinds, inputs, strict=True))
        return left, right


def make_step(
    mesh: Mesh,
    towers: Towers,
    bank: Bank | None,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    augment: Augment,
    **options: Any,
) -> Any:
    """Binds the parts to `step(state, batch) -> (state, metrics)`, jitted and donating the state.

    `batch` is what `jaxcl.data.Loader` gives: "image", "label" (the key: rows of one key match), "id", "valid" and "target",
    which holds "text" int32 `[B, L]` of captions, or "image", the other style. `options`: see `Bound`.

    Metrics: loss (the whole of it), proximal (its term before lambda), positive (mean cosine of the pairs), scale,
    learning_rate, rows; of the last pass.
    """
    bound, state = Bound(towers, bank, optimizer, schedule, augment, **options), specs(bank is not None)
    return on_mesh(mesh, functools.partial(train_step, bound), (state, ROWS), (state, WHOLE), donate=0)


def train_step(bound: Bound, state: ContrastiveState, batch: Batch) -> tuple[ContrastiveState, PyTree]:
    """The step, on this device's part of state and batch."""
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    augment_key, draw_key = jax.random.split(key)
    held = state.bank
    if bound.bank is not None and held is not None:
        held = bound.bank.insert(held, jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True), state.pending))
    b, valid = len(batch["valid"]), batch["valid"]
    rows = lax.axis_index(AXIS) * b + jnp.arange(b, dtype=jnp.int32)
    inputs = make_inputs(bound.pairs, bound.augment)(augment_key, rows, batch)
    epoch = state.step / bound.steps_per_epoch
    rate = jnp.asarray(bound.schedule(epoch), jnp.float32)
    total = jnp.maximum(lax.psum(jnp.sum(valid, dtype=jnp.float32), AXIS), 1.0)

    def one_pass(carry: tuple[PyTree, ...], i: jax.Array) -> tuple[tuple[PyTree, ...], tuple[loss_lib.Pair, PyTree]]:
        """Pass `i`: the new weights; the embeddings that the bank takes in, and the metrics."""
        params, opt_state, keys = carry
        stored = bound.embed(keys, inputs) if bound.negatives in WITH_KEYS else None
        pass_key, used = jax.random.fold_in(draw_key, i), epoch >= bound.bank_start
        share = functools.partial(loss_share, bound, batch, inputs, stored, held, pass_key, used)
        (value, (pair, scale, means)), grads = jax.value_and_grad(share, has_aux=True)(params)
        grads, value, means = jax.tree.map(lambda x: x / total, lax.psum((grads, value, means), AXIS))
        direction, opt_state = bound.optimizer.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        if stored is not None:
            m = bound.momentum
            keys = jax.tree.map(lambda k, p: m * k + (1 - m) * p, keys, params["towers"])
        metrics = {"loss": value, "proximal": means[0], "positive": means[1], "scale": scale}
        return (params, opt_state, keys), (stored or pair, metrics)

    carry = state.params, state.opt_state, state.keys
    if bound.passes == 1:
        carry, (made, metrics) = one_pass(carry, jnp.int32(0))
    else:
        carry, outputs = lax.scan(one_pass, carry, jnp.arange(bound.passes, dtype=jnp.int32))
        made, metrics = jax.tree.map(lambda x: x[-1], outputs)

    pending = None
    if bound.bank is not None:
        pending = Rows(bound.bank.pack(made, state.step), batch["label"], batch["id"], valid)
    metrics |= {"learning_rate": rate, "rows": total}
    return ContrastiveState(state.step + 1, state.seed, *carry, held, pending), metrics


def loss_share(
    bound: Bound,
    batch: Batch,
    inputs: Sequence[jax.Array],
    stored: loss_lib.Pair | None,
    held: BankState | None,
    draw_key: jax.Array,
    used: jax.Array,
    params: PyTree,
) -> tuple[jax.Array, tuple[loss_lib.Pair, jax.Array, list[jax.Array]]]:
    """This device's share of the sum of the loss over all valid rows; the embeddings, the scale, and the shares of the proximal
    term and of the cosine of the pairs. `stored`: what the key encoders make of the batch, None without them."""
    valid, pair = batch["valid"], bound.embed(params["towers"], inputs)
    scale = jnp.minimum(jnp.exp(params["log_scale"]), MAX_SCALE)
    candidates: Any = {"gather": bound.negatives != "in_batch", "same_side": bound.same_side}
    candidates |= {"bank": bound.bank, "state": held, "draw_key": draw_key, "used": used}
    candidates |= {"batch": bound.negatives != "moco"}
    losses = loss_lib.info_nce(pair, stored or pair, scale, batch["label"], valid, **candidates)
    moved = jnp.zeros_like(losses)
    if bound.proximal:
        assert bound.bank is not None and held is not None
        moved = loss_lib.proximal(bound.bank, held, pair, batch["id"])
    positive = jnp.sum(pair[0] * pair[1], axis=1)
    value, *means = (jnp.sum(x, where=valid) for x in (losses + bound.proximal * moved, moved, positive))
    return value, (pair, scale, means)
