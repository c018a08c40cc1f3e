"""Symmetric InfoNCE over candidates that lie on many devices, joined by a distributed log-sum-exp.

    loss of anchor i = -s u_i . v_i + log sum over its candidates v of exp(s u_i . v),  s the learned inverse temperature

(van den Oord et al. 2018; both ways as in CLIP, Radford et al. 2021). Anchors are gathered, candidates stay where they lie:
a device scores all anchors against its own candidates, current and stored, and gives each anchor one number, the logarithm
of its partial sum; the device that owns the anchor adds them up. So nobody holds the bank, and gradients flow back through
the gather by its transpose.

Only `all_gather` and `psum_scatter` are differentiated: inside `shard_map(check_vma=False)` these two are each other's
transpose, and the gradients of all devices' shares add up to that of the sum of the shares.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.contrastive.bank import FAR, SIDES, Bank, BankState, Block
from jaxcl.contrastive.storage import decode
from jaxcl.mesh import AXIS

Pair = tuple[jax.Array, jax.Array]


def info_nce(
    anchors: Pair,
    candidates: Pair,
    scale: jax.Array,
    key: jax.Array,
    valid: jax.Array,
    *,
    gather: bool,
    batch: bool = True,
    same_side: bool = False,
    bank: Bank | None = None,
    state: BankState | None = None,
    draw_key: jax.Array | None = None,
    used: jax.Array | bool = True,
) -> jax.Array:
    """The loss of each of this device's pairs, the mean of both ways, float32 `[b]`; inside `shard_map`.

    Args:
      anchors: both sides' embeddings float32 `[b, D]`, of length 1.
      candidates: what anchors are compared with, the same embeddings or those of a key encoder; the right side's are the
        left anchors' candidates and the other way round. That of the own row is the positive.
      scale: s.
      key: int32 `[b]`; rows of one key match each other and are no negatives of each other.
      valid: bool `[b]`; other rows are nobody's candidates.
      gather: whether the candidates of all devices count, or this device's alone.
      batch: whether other rows of the batch are candidates, or beside the own positive the bank's alone (MoCo, He et al. 2020).
      same_side: whether the other anchors of the same side are candidates too (SimCLR's NT-Xent, Chen et al. 2020).
      bank, state, draw_key: whose rows are candidates beside the current ones; needs `gather`.
      used: bool, the same on all devices, whether the stored rows are candidates already.
    """
    b = len(key)
    me = lax.axis_index(AXIS) if gather else 0
    everyone, every_key = anchors, key
    if gather:
        everyone = (lax.all_gather(anchors[0], AXIS, tiled=True), lax.all_gather(anchors[1], AXIS, tiled=True))
        every_key = lax.all_gather(key, AXIS, tiled=True)
    own = jnp.arange(len(every_key))[:, None] == me * b + jnp.arange(b)[None, :]  # [B, b]
    other = (every_key[:, None] != key[None, :]) & valid[None, :] & batch

    def current(side: int) -> jax.Array:
        scores = jnp.where(own | other, scale * everyone[side] @ candidates[1 - side].T, FAR)
        if same_side:
            scores = jnp.concatenate([scores, jnp.where(other, scale * everyone[side] @ candidates[side].T, FAR)], 1)
        return jax.nn.logsumexp(scores, axis=1)

    partial = [current(0), current(1)]
    if bank is not None:
        assert gather and state is not None and draw_key is not None
        stored = stored_sums(bank, state, everyone, scale, every_key, draw_key, used)
        partial = [jnp.logaddexp(x, stored[side]) if side in stored else x for side, x in enumerate(partial)]
    total = [join(x, b) if gather else x for x in partial]
    positive = [scale * jnp.sum(anchors[side] * candidates[1 - side], axis=1) for side in (0, 1)]
    return (total[0] - positive[0] + total[1] - positive[1]) / 2


def stored_sums(
    bank: Bank,
    state: BankState,
    anchors: Pair,
    scale: jax.Array,
    key: jax.Array,
    draw_key: jax.Array,
    used: jax.Array | bool = True,
) -> dict[int, jax.Array]:
    """Of the anchors of all devices `[B, D]`, the log-sum-exp of their scores over the rows this device holds, `[B]`; by the
    number of the anchors' side, for those whose other side is stored. FAR where there is none.

    Block after block, each scored again for its gradient, which is written out here: what is kept of a block is nothing, and
    how many blocks there are may depend on the draw.
    """
    sides = [side for side in (0, 1) if SIDES[1 - side] in bank.sides]

    def over_blocks(anchors: Pair, held: tuple, add: Callable, begin: list) -> list:
        """`add(side, sum, cosines [B, n], allowed [B, n], rows [n, D]) -> sum` over all blocks, from `begin`."""
        state, key, draw_key, used = held
        read, blocks = bank.reader(state, draw_key)

        def block(i: jax.Array, sums: list) -> list:
            found: Block = read(i)
            allowed = (key[:, None] != found.key[None, :]) & found.usable[None, :]
            rows = [decode(found.record[SIDES[1 - side]]) for side in sides]
            return [add(n, x, anchors[sides[n]] @ rows[n].T, allowed, rows[n]) for n, x in enumerate(sums)]

        return lax.fori_loop(0, jnp.where(used, blocks, 0), block, begin)

    @jax.custom_vjp
    def sums(anchors: Pair, scale: jax.Array, held: tuple) -> list[jax.Array]:
        def add(n: int, total: jax.Array, cosine: jax.Array, allowed: jax.Array, rows: jax.Array) -> jax.Array:
            return jnp.logaddexp(total, jax.nn.logsumexp(jnp.where(allowed, scale * cosine, FAR), axis=1))

        return over_blocks(anchors, held, add, [jnp.full(key.shape, FAR) for _ in sides])

    def forward(anchors: Pair, scale: jax.Array, held: tuple) -> tuple[list[jax.Array], tuple]:
        found = sums(anchors, scale, held)
        return found, (anchors, scale, held, found)

    def backward(kept: tuple, g: list[jax.Array]) -> tuple:
        anchors, scale, held, found = kept

        def add(n: int, grads: Pair, cosine: jax.Array, allowed: jax.Array, rows: jax.Array) -> Pair:
            share = jnp.where(allowed, jnp.exp(scale * cosine - found[n][:, None]), 0) * g[n][:, None]
            return grads[0] + scale * share @ rows, grads[1] + jnp.sum(share * cosine)

        grads = over_blocks(anchors, held, add, [(jnp.zeros_like(anchors[side]), jnp.float32(0)) for side in sides])
        by_side = {side: grad for side, (grad, _) in zip(sides, grads, strict=True)}
        both = tuple(by_side.get(side, jnp.zeros_like(anchors[side])) for side in (0, 1))
        return both, sum((x for _, x in grads), jnp.float32(0)), None

    sums.defvjp(forward, backward)
    return dict(zip(sides, sums(anchors, scale, (state, key, draw_key, jnp.asarray(used))), strict=True))


def join(partial: jax.Array, b: int) -> jax.Array:
    """Every device's log-sum-exp of every anchor, `[B]`, to those of this device's own anchors over all devices, `[b]`."""
    top = lax.pmax(lax.stop_gradient(partial), AXIS)
    total = lax.psum_scatter(jnp.exp(partial - top), AXIS, tiled=True)
    return lax.dynamic_slice_in_dim(top, lax.axis_index(AXIS) * b, b) + jnp.log(total)


def proximal(bank: Bank, state: BankState, anchors: Pair, ids: jax.Array) -> jax.Array:
    """|v_i - stored v_i|^2 of each of this device's pairs, the mean of the sides, float32 `[b]`; 0 where nothing is stored.

    The proximal term of Wu et al. 2018, section 3.3; times lambda it joins the loss.
    """
    found, mine = bank.previous(state, lax.all_gather(ids, AXIS, tiled=True))
    stored, known = jax.tree.map(lambda x: lax.psum_scatter(x.astype(jnp.float32), AXIS, tiled=True), (found, mine))
    moved = [jnp.sum(jnp.square(anchors[SIDES.index(side)] - lax.stop_gradient(x)), 1) for side, x in stored.items()]
    return known * sum(moved[1:], moved[0]) / len(SIDES)
