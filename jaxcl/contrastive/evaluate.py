"""How good the embeddings are, and how old those in the bank: retrieval both ways, and staleness by age."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.contrastive.bank import SIDES, BankState
from jaxcl.contrastive.step import kinds_of, make_inputs
from jaxcl.contrastive.storage import decode
from jaxcl.data.augment import Augment
from jaxcl.models import Towers
from jaxcl.types import Batch, PyTree

Embed = Callable[[PyTree, data.Loader], dict[str, np.ndarray]]
RECALLS = (1, 5, 10)


def make_embed(mesh: Mesh, towers: Towers, pairs: str, augment: Augment) -> Embed:
    """Returns `embed(params, batches) -> {"left": float32 [n, D], "right": ..., "key": int32 [n]}` of all valid rows, in order,
    the same on every process; `params` of the towers. Views are made alike every time."""
    inputs_of, kinds = make_inputs(pairs, augment), kinds_of(pairs)

    def one(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        rows = jnp.arange(len(batch["valid"]), dtype=jnp.int32)
        inputs = inputs_of(jax.random.key(0), rows, batch)
        found = {side: towers.encode(params, kind, x) for side, kind, x in zip(SIDES, kinds, inputs, strict=True)}
        return found | {"key": batch["label"], "valid": batch["valid"]}

    run = jax.jit(one, out_shardings=mesh_lib.replicated(mesh))

    def embed(params: PyTree, batches: data.Loader) -> dict[str, np.ndarray]:
        parts = [jax.device_get(run(params, mesh_lib.shard_rows(mesh, batch))) for batch in batches]
        valid = np.concatenate([part["valid"] for part in parts])
        return {name: np.concatenate([part[name] for part in parts])[valid] for name in (*SIDES, "key")}

    return embed


def retrieval(found: dict[str, np.ndarray]) -> dict[str, float]:
    """Recall at 1, 5 and 10, both ways: the share of queries with a row of their key among the k nearest of the other side.

    Rows of one key and one embedding, such as the one text of a class, count once, as query and as candidate. Of equal
    scores the wrong one goes first: a collapsed encoder finds nothing.
    """
    scores: dict[str, float] = {}
    for one, other in (SIDES, SIDES[::-1]):
        rank = ranks(*_distinct(found[one], found["key"]), *_distinct(found[other], found["key"]))
        scores |= {f"{one}_to_{other}@{k}": float(np.mean(rank < k)) for k in RECALLS}
    return scores


def ranks(
    query: np.ndarray, query_key: np.ndarray, candidate: np.ndarray, candidate_key: np.ndarray, block: int = 1024
) -> np.ndarray:
    """How many candidates of other keys are at least as near to each query as the nearest of its own; int `[n]`."""
    found = []
    for start in range(0, len(query), block):
        part = slice(start, start + block)
        scores = query[part] @ candidate.T
        same = query_key[part, None] == candidate_key[None, :]
        best = np.max(np.where(same, scores, -np.inf), axis=1)
        found.append(np.sum(~same & (scores >= best[:, None]), axis=1))
    return np.concatenate(found)


def _distinct(x: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rounded = np.concatenate([key[:, None], np.round(1e5 * x)], axis=1).astype(np.int64)
    first = np.sort(np.unique(rounded, axis=0, return_index=True)[1])
    return x[first], key[first]


def make_staleness(mesh: Mesh, rows: int) -> Callable[..., dict[str, list[float]]]:
    """Returns `staleness(bank_state, step, fresh) -> {"age": [...], "rows": [...], side: [mean cosine ...]}`.

    Of up to `rows` rows of the bank, evenly spread, the cosine between what is stored and `fresh(ids) -> {side: [n, D]}`, what
    the encoders make of the same examples now, by age: optimiser steps since it was made, see `by_age`.
    """
    gather = jax.jit(read_slots, out_shardings=mesh_lib.replicated(mesh))

    def staleness(
        state: BankState, step: int, fresh: Callable[[np.ndarray], dict[str, np.ndarray]]
    ) -> dict[str, list[float]]:
        total = len(state.shard.id)
        slots = np.unique(np.linspace(0, total - 1, min(rows, total)).astype(np.int32))
        stored = jax.device_get(gather(state, slots))
        stored = {name: x[stored["id"] >= 0] for name, x in stored.items()}
        if not len(stored["id"]):
            return {"age": [], "rows": []}
        now = fresh(stored["id"])
        cosines = {side: _cosine(stored[side], now[side]) for side in SIDES if side in stored}
        return by_age(step - stored["step"], cosines)

    return staleness


def read_slots(state: BankState, slots: jax.Array) -> dict[str, jax.Array]:
    """What lies in these slots of the bank, int32 `[n]` over all devices: each side `[n, D]`, "step" and "id"."""
    record = jax.tree.map(lambda x: x[slots], state.shard.record)
    found = {side: decode(record[side]) for side in SIDES if side in record}
    return found | {"step": record["step"], "id": state.shard.id[slots]}


def by_age(age: np.ndarray, values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Mean age, number and mean values of the rows of each age, or of each of at most 64 groups of ages."""
    width = -(-int(np.ptp(age) + 1) // 64)
    _, group = np.unique(age // width, return_inverse=True)
    count = np.bincount(group)
    means = {name: (np.bincount(group, x) / count).tolist() for name, x in {"age": age, **values}.items()}
    return {"age": means.pop("age"), "rows": count.tolist(), **means}


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, 1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
