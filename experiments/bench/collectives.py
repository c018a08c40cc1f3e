"""The collectives of a training step by strategy: what rehearsal adds to those of a plain step, and where each comes from.

    python -m experiments.bench.collectives --devices=8 [--json=FILE]

The steps are those of `experiments.bench.step` with its MLP.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np

from experiments.bench import harness, hlo
from experiments.bench.step import Sizes
from experiments.pages.page import Json
from jaxcl import mesh as mesh_lib
from jaxcl.strategies import make_strategy

STEPS: Mapping[str, Mapping[str, Any]] = {
    "incremental": {},
    "incremental, balanced prior": {"prior": "balanced"},
    "er": {},
    "er, class_balanced draws": {"sampling": "class_balanced"},
    "er, balanced prior": {"prior": "balanced"},
    "er, distinct rows": {"repeats": "distinct", "num_ids": 1000},
    "der_pp": {},
    "der_pp, balanced prior": {"prior": "balanced"},
    "er_ace": {},
    "agem": {},
    "mir": {},
}


def measure(
    *,
    numbers: Annotated[tuple[int, ...], "of devices"] = (2, 8),
    new: Annotated[int, "b: new rows a device"] = 56,
    drawn: Annotated[int, "r: representatives a device"] = 7,
) -> Json:
    records = []
    for devices in numbers:
        mesh = mesh_lib.make_mesh(jax.devices()[:devices])
        sizes = Sizes(mesh, "float32", width=16, new=new, drawn=drawn, capacity=1000, runs=1, steps=1)
        for name, options in STEPS.items():
            found = hlo.collectives(compiled_text(sizes, name.split(",")[0], **options))
            records.append({"step": name, "devices": devices, **hlo.counts(found), "where": [str(x) for x in found]})
            harness.show(records[-1])
    return {"steps": records}


def compiled_text(sizes: Sizes, strategy: str, *, prior: str = "none", **options: Any) -> str:
    """The step of a strategy with a buffer of these options."""
    rule, buffer = make_strategy(strategy), None
    if rule.draws:
        image = jax.ShapeDtypeStruct(harness.SHAPE, np.uint8)
        record = rule.record(image, {"logits": jax.ShapeDtypeStruct((harness.CLASSES,), np.float32)})  # type: ignore[arg-type, dict-item]
        buffer = sizes.buffer(record, count_classes=prior != "none", **options)
    program, *arguments = sizes.step("mlp", buffer, strategy=strategy, prior=prior)
    return program.lower(*arguments).compile().as_text()


if __name__ == "__main__":
    harness.run(measure)
