"""The tables of docs/scale.md: what a device holds, and how long a step takes, by the shape of the mesh; accuracy.

python -m experiments.pages.scale
"""

from experiments.pages.page import ROOT, Json, fill, measured, table
from jaxcl import report

PAGE = ROOT / "docs" / "scale.md"
DEVICES = (8, 64, 256)


def parts() -> dict[str, str]:
    """What stands between each mark of the page."""
    sizes = [measured(f"bench_mesh_{count}", of_bytes) for count in DEVICES]
    return {
        "bytes": "\n\n".join(dict.fromkeys(sizes)),
        "steps": measured("bench_mesh_steps", of_steps),
        "accuracy": measured("mesh_split_cifar10", of_accuracy),
    }


def of_bytes(found: Json) -> str:
    head = ("network", "devices", "data x fsdp x model", "weights and moments", "of all", "arguments", "temporaries")
    rows = [
        (
            *(f"ViT-{one['size']}/16", one["devices"]),
            one["shape"] + (", `split_state`" if one["split_state"] else ""),
            f"{one['weights_and_moments'] / 2**20:,.0f} MiB",
            f"{100 * one['weights_and_moments'] / one['of_all_devices_would_be']:.1f} %",
            *(f"{one[name] / 2**20:,.0f} MiB" for name in ("arguments", "temporaries")),
        )
        for one in found["bytes"]
    ]
    return table(head, rows)


def of_steps(found: Json) -> str:
    head = ("data x fsdp x model", "`er`, ms a step", "plain step on as many rows, ms", "ratio")
    rows = [
        (
            one["shape"],
            milliseconds(one["step_ms"]["rehearsal"]),
            milliseconds(one["step_ms"]["plain"]),
            f"{one['overhead']['median']:.2f}",
        )
        for one in found["steps"]
    ]
    return table(head, rows)


def milliseconds(values: Json) -> str:
    """Median and the range from p10 to p90."""
    return f"{values['median']:,.0f} ({values['p10']:,.0f} to {values['p90']:,.0f})"


def of_accuracy(found: Json) -> str:
    head = ("data x fsdp x model", "row shards", "seeds", "accuracy, %", "forgetting, %")
    rows = [
        (
            *(one["shape"], one["row_shards"], len(one["average_accuracy"])),
            report.spread(one["average_accuracy"]),
            report.spread([x["chaudhry"] for x in one["forgetting"]]),
        )
        for one in found["rows"]
    ]
    return table(head, rows)


if __name__ == "__main__":
    fill(PAGE, parts())
