"""Figure 6: whether a running experiment draws every stored row alike, and whether the reference would.

Trains with rehearsal, every batch handed to the devices sorted by class, so that shards differ in classes and in rows as much
as they can. After every step it counts the rows drawn by shard and by class, and adds up what is expected of the stored rows
as they stand. Under the uniform law a row of M is drawn with probability n / M. Under the rule of the reference system, read
from its code, first a shard is chosen, then one of its classes, then a row, each uniformly. (The reference also draws with
repetition and never its row 0, which is left out here.) The deviation is given in standard deviations z of the hypergeometric
law.
"""

import dataclasses

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.pages.page import Json, table
from experiments.paper.study import Study
from experiments.studies.grid import changed
from jaxcl import mesh as mesh_lib
from jaxcl.training.batches import train_batches
from jaxcl.training.build import build

TITLE = "6. Uniformity of the draw"
RATIOS = ("drawn_over_expected", "reference_over_expected")


class Tally:
    """Rows drawn and rows expected, by shard and class, over many draws."""

    def __init__(self, shards: int, classes: int):
        self.drawn, self.uniform, self.reference = (np.zeros((shards, classes)) for _ in range(3))
        self._variance = {axis: np.zeros(size) for axis, size in (("shard", shards), ("class", classes))}

    def add(self, rows: np.ndarray, drawn: np.ndarray) -> None:
        """One draw: stored rows and drawn rows, both int [shards, classes]."""
        total, n = rows.sum(), drawn.sum()
        if not n:
            return
        self.drawn += drawn
        self.uniform += n * rows / total
        held = rows > 0
        self.reference += n * held / np.maximum(held.sum(1, keepdims=True), 1) / held.any(1).sum()
        for axis, sums in (("shard", rows.sum(1)), ("class", rows.sum(0))):
            share = sums / total
            self._variance[axis] += n * share * (1 - share) * (total - n) / max(total - 1, 1)

    def by(self, axis: str) -> dict[str, list[float]]:
        """Over "shard" or "class": drawn and expected rows, z, and what the reference's rule expects over the uniform law."""
        drawn, uniform, reference = (
            x.sum(1 if axis == "shard" else 0) for x in (self.drawn, self.uniform, self.reference)
        )
        deviation = np.sqrt(self._variance[axis])
        found = {
            "drawn": drawn,
            "expected": uniform,
            "z": (drawn - uniform) / np.where(deviation > 0, deviation, 1),
            "drawn_over_expected": drawn / np.maximum(uniform, 1e-9),
            "reference_over_expected": reference / np.maximum(uniform, 1e-9),
        }
        return {name: x.tolist() for name, x in found.items()}


def measure(study: Study) -> Json:
    """Trains the config with rehearsal and tallies its draws."""
    config = changed(study.config, {"strategy": "er", "data.placement": "by_class"})
    run = build(config, study.devices)
    assert run.buffer is not None
    shards, classes = run.mesh.size, run.train.num_classes
    tally, draws = Tally(shards, classes), 0
    state = run.new_state(run.new_weights(jax.random.key(config.seed)))
    for task in range(len(run.scenario.tasks)):
        loader = train_batches(config, run, task)
        assert loader is not None
        begin = {"task": task, "task_step": 0, "steps_per_epoch": loader.steps_per_epoch}
        numbers = {name: mesh_lib.replicate(run.mesh, np.int32(value)) for name, value in begin.items()}
        state = dataclasses.replace(state, **numbers)
        for batch in loader:
            state, _ = run.train_step.program(state, mesh_lib.shard_rows(run.mesh, batch))
            stored, staged = state.buffer, state.staged[0]
            assert stored is not None
            ids, labels, *drawn = jax.device_get((stored.id, stored.label, staged.valid, staged.shard, staged.label))
            shard = np.repeat(np.arange(shards), len(ids) // shards)
            valid, of_shard, of_class = drawn
            tally.add(
                _count(shard[ids >= 0], labels[ids >= 0], shards, classes),
                _count(of_shard[valid], of_class[valid], shards, classes),
            )
            draws += 1
    return {
        "name": config.name,
        "draws": draws,
        "rows_per_shard": run.buffer.stats(stored)["rows_per_shard"],
        "shard": tally.by("shard"),
        "class": tally.by("class"),
    }


def _count(shard: np.ndarray, label: np.ndarray, shards: int, classes: int) -> np.ndarray:
    return np.bincount(shard * classes + label, minlength=shards * classes).reshape(shards, classes)


def picture(found: Json) -> Figure:
    """Rows drawn over rows expected, by shard and by class: measured, and by the reference's rule on the same fills."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, axis in zip(figure.subplots(1, 2), ("shard", "class"), strict=True):
        x = np.arange(len(found[axis]["drawn"]))
        axes.bar(x - 0.2, found[axis]["drawn_over_expected"], 0.4, color="#0072B2", label="measured")
        axes.bar(x + 0.2, found[axis]["reference_over_expected"], 0.4, color="#D55E00", label="the reference's rule")
        axes.axhline(1, color="#23292f", lw=1)
        axes.set_xlabel(axis)
        axes.set_ylabel("drawn / expected")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def markdown(found: Json) -> str:
    """By shard and by class: the largest deviation, and the range of rows drawn over rows expected."""
    rows, shards = [], found["rows_per_shard"]
    for axis in ("shard", "class"):
        x = found[axis]
        ratios = ([r for r, e in zip(x[key], x["expected"], strict=True) if e] for key in RATIOS)
        rows.append(
            (axis, f"{np.abs(x['z']).max():.2f}", *(f"{min(ratio):.3f} to {max(ratio):.3f}" for ratio in ratios))
        )
    head = ("by", "largest deviation, z", "drawn / expected", "the reference's rule / expected")
    return (
        f"{found['name']}; {found['draws']} draws, {sum(found['shard']['drawn']):,.0f} rows, {len(shards)} shards of"
        f" {min(shards)} to {max(shards)} rows, {sum(x > 0 for x in found['class']['expected'])} classes:\n\n"
        f"{table(head, rows)}"
    )
