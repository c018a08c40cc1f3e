"""Exact evaluation over devices and processes: every test row counts once, padding not at all."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl import mesh as mesh_lib
from jaxcl.check import refused
from jaxcl.mesh import AXIS, ROWS, WHOLE, on_mesh
from jaxcl.metrics import METRICS, EvalRows, asks_means
from jaxcl.nearest_mean import Means
from jaxcl.registry import short
from jaxcl.training.learn import Bound
from jaxcl.training.state import Weights, weights_specs
from jaxcl.types import Batch

CLASSIFICATION = ("accuracy", "top5", "accuracy_in_task")
RECONSTRUCTION = ("error",)

Counts = dict[str, Any]
Metric = Callable[..., jax.Array]
Evaluate = Callable[..., dict[str, np.ndarray]]


def make_evaluate(
    bound: Bound,
    task_of_row: np.ndarray,
    *,
    seeds: bool = False,
    reconstructs: bool = False,
    metrics: Sequence[str] = (),
) -> Evaluate:
    """`evaluate(weights, batches, means=None) -> scores`, each task's test rows apart:

    of classification the means accuracy, top5 and accuracy_in_task, float64 `[T]`, and confusion: int32 `[K, K]`, test rows by
    label and by the class ranked first; of reconstruction the mean error, float64 [T]; the mean of every other metric, float64
    `[T]`, by the name behind its colon.

    `means` are the class means of the memory, for metrics that ask for them, see `jaxcl.training.class_means`.

    Args:
      task_of_row: int32 `[n]`, the task of each test row.
      seeds: the weights have a leading axis of seeds, and so has every score.
      reconstructs: whether the batches hold a "target" that the model reconstructs, instead of classifying.
      metrics: names of other metrics of `METRICS`.

    Raises:
      UserError: a metric is unknown, or its name is that of another one.
    """
    found = named_metrics((*(RECONSTRUCTION if reconstructs else CLASSIFICATION), *metrics))
    count: Callable[..., Counts] = functools.partial(count_rows, bound, found)
    if seeds:
        count = jax.vmap(count, (0, 0, None))

    def add(counts: Counts, weights: Weights, means: Means | None, batch: Batch) -> Counts:
        return jax.tree.map(jnp.add, counts, count(weights, means, batch))

    mesh, laid = bound.mesh, weights_specs(bound.layout)
    counts_of = on_mesh(mesh, count, (laid, WHOLE, ROWS), WHOLE)
    added = on_mesh(mesh, add, (WHOLE, laid, WHOLE, ROWS), WHOLE, donate=0)

    def evaluate(weights: Weights, batches: Iterable[Batch], means: Means | None = None) -> dict[str, np.ndarray]:
        counts = None
        for batch in batches:
            inputs: Batch = {name: batch[name] for name in ("image", "label", "valid", "target") if name in batch}
            inputs["task"] = task_of_row[batch["id"]]  # that of padding, whose id is -1, does not count
            inputs = mesh_lib.shard_rows(mesh, inputs)
            if counts is None:
                shapes = jax.eval_shape(counts_of, weights, means, inputs)
                counts = mesh_lib.replicate(mesh, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
            counts = added(counts, weights, means, inputs)
        assert counts is not None, "there are no rows to evaluate on"
        found = jax.device_get(counts)
        confusion = {"confusion": found["confusion"]} if "confusion" in found else {}
        return {name: x / found["rows"] for name, x in found["scores"].items()} | confusion

    return evaluate


def named_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics by the name of their scores.

    Raises:
      UserError: one is unknown, or its name is that of another one.
    """
    found: dict[str, Metric] = {}
    for name in dict.fromkeys(names):
        if short(name) in {*found, "confusion"}:
            raise refused("eval.metrics", name, f"a metric that is not called {short(name)}")
        found[short(name)] = METRICS[name]
    return found


def count_rows(bound: Bound, metrics: dict[str, Metric], weights: Weights, means: Means | None, batch: Batch) -> Counts:
    """Of a batch, over all devices: "rows" int32 `[T]`; "scores", the sum `[T]` of each metric; "confusion"."""
    outputs = bound.predict(weights.params, weights.batch_stats, bound.normalize(batch["image"]))
    ranking = None if "target" in batch else bound.strategy.scores(outputs, bound.whole_state(weights.strategy_state))
    classes, label, task, valid = bound.classes, batch["label"], batch["task"], batch["valid"]
    rows = EvalRows(outputs, label, task, jnp.asarray(classes)[task], batch.get("target", {}), ranking)
    in_task = (task[:, None] == jnp.arange(len(classes))[None, :]) & valid[:, None]

    def by_task(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(in_task, x[:, None], 0), axis=0)

    scores = {name: metric(rows, means) if asks_means(metric) else metric(rows) for name, metric in metrics.items()}
    found: Counts = {"rows": by_task(valid), "scores": {name: by_task(x) for name, x in scores.items()}}
    if ranking is not None:
        nothing = jnp.zeros((classes.shape[1],) * 2, jnp.int32)
        found["confusion"] = nothing.at[label, jnp.argmax(ranking, axis=1)].add(valid.astype(jnp.int32))
    return lax.psum(found, AXIS)
