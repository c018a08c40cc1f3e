"""Figure 5: bytes of the memory on the devices and on the host against the budget, in both tiers, by capacity.

The budget is capacity x bytes of a row (record, label and id). Nothing is trained: what a new buffer allocates is added up,
array by array, and the compiled step tells its temporaries, which may not grow with the capacity.
"""

from typing import Any

import jax
from matplotlib.figure import Figure

from experiments.pages.page import Json, table
from experiments.paper.draw import panels
from experiments.paper.study import Study, begun
from jaxcl.training.build import Parts
from jaxcl.training.state import TrainState
from jaxcl.types import Batch

TITLE = "5. Memory against the budget"
TIERS = ("device", "host")


def measure(study: Study) -> Json:
    rows = []
    for tier in TIERS:
        for share in study.figures.shares:
            config = study.configured(study.model, "er", {"buffer.share": share, "buffer.tier": tier})
            rows.append({"tier": tier, "share": share, **of(*begun(config, study.devices))})
    return {"name": study.config.name, "model": study.model, "rows": rows}


def of(run: Parts, state: TrainState, batch: Batch) -> Json:
    """Bytes over all devices; temporaries of one device's program."""
    buffer = run.buffer
    assert buffer is not None
    on_device = sum(x.nbytes for x in jax.tree.leaves(state.buffer))
    on_host = 0
    if buffer.host is None:
        programs = run.train_step.lower(state, batch)
    else:
        on_host = sum(x.nbytes for x in buffer.host.payload().values())
        with buffer.host.serving(0, state.staged):
            programs = run.train_step.lower(state, batch)
    memory: list[Any] = [program.compile().memory_analysis() for program in programs]
    return {
        "capacity": buffer.capacity,
        "row_bytes": buffer.traffic["row_bytes"],
        "budget": buffer.capacity * buffer.traffic["row_bytes"],
        "on_device": on_device,
        "on_host": on_host,
        "temporaries": max(x.temp_size_in_bytes for x in memory),
    }


def picture(found: Json) -> Figure:
    figure, (row,) = panels(2, width=3.7)
    for axes, tier in zip(row, TIERS, strict=True):
        rows = [x for x in found["rows"] if x["tier"] == tier]
        places = range(len(rows))
        device, host = ([x[key] / 2**20 for x in rows] for key in ("on_device", "on_host"))
        axes.bar(places, device, 0.6, color="#56B4E9", label="on the devices")
        axes.bar(places, host, 0.6, device, color="#E69F00", label="on the host")
        budgets = [x["budget"] / 2**20 for x in rows]
        axes.hlines(budgets, [x - 0.4 for x in places], [x + 0.4 for x in places], color="#23292f", label="budget")
        axes.set_ylim(0, 1.08 * max(budgets))
        axes.set_xticks(places, [f"{x['capacity']:,}" for x in rows])
        axes.set_xlabel("rows of memory")
        axes.set_title(f"tier: {tier}", loc="left", fontsize=9)
    row[0].set_ylabel("MiB")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def markdown(found: Json) -> str:
    places = ("budget, bytes", "on the devices", "on the host")
    head = ("tier", "share", "rows", *places, "over budget", "temporaries a device")
    rows = [
        (
            x["tier"],
            f"{100 * x['share']:g} %",
            f"{x['capacity']:,}",
            *(f"{x[key]:,}" for key in ("budget", "on_device", "on_host")),
            f"{(x['on_device'] + x['on_host']) / x['budget']:.4f}",
            f"{x['temporaries']:,}",
        )
        for x in found["rows"]
    ]
    return (
        f"{found['name']}, {found['model']}; a row is {found['rows'][0]['row_bytes']:,} bytes.\n\n{table(head, rows)}"
    )
