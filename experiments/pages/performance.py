"""docs/performance.md, written from the result files: what the benchmarks of this folder have printed, as tables.

python -m experiments.pages.performance
"""

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from jaxcl import summaries

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "experiments" / "results", ROOT / "docs" / "performance.md"
Json = dict[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def spread(ms: Json) -> str:
    """Median and the range from p10 to p90."""
    return f"{ms['median']:.3g} ({ms['p10']:.3g} to {ms['p90']:.3g})"


def buffer(found: Json) -> str:
    a = found["arguments"]
    own = [r for r in found["results"] if r["name"] == "jaxcl"]
    verdict = {True: "met", False: "**not met**", None: "not measured"}
    return "\n\n".join(
        [
            f"Insert and draw of {a['batch']} rows in and {a['batch']} rows out a device (32 x 32 x 3 uint8 and a label),"
            " buffers full, blocking every step; median and p10 to p90 in milliseconds. A peer and jaxcl take turns, each in a"
            " process of its own, and the ratio is taken turn by turn. jaxcl's draws are without replacement from the union of"
            " all shards.",
            table(
                ("devices", "rows a device", "ms a step", "memory over rows", "temporaries, bytes"),
                (
                    (
                        r["devices"],
                        f"{r['capacity']:,}",
                        spread(r["insert_draw_ms"]),
                        f"{r['bytes'] / r['bytes_expected']:.4f}",
                        f"{r['temp_bytes']:,}",
                    )
                    for r in own
                    if r["insert_draw_ms"]
                ),
            ),
            table(
                ("peer", "devices", "rows a device", "peer, ms", "jaxcl beside it, ms", "jaxcl over peer"),
                (
                    (
                        p["peer"],
                        p["devices"],
                        f"{p['capacity']:,}",
                        f"{p['peer_ms']:.3g}",
                        f"{p['jaxcl_ms']:.3g}",
                        f"{p['jaxcl_over_peer']:.3g}",
                    )
                    for p in found["pairs"]
                ),
            ),
            table(
                ("goal", "limit", "found", ""),
                (
                    (
                        g["goal"],
                        f"{g['limit']:g}",
                        "-" if g["value"] is None else f"{g['value']:.4g}",
                        verdict[g["met"]],
                    )
                    for g in found["goals"]
                ),
            ),
            *(f"{r['name']}, {r['capacity']:,} rows: {r['missing']}." for r in found["results"] if r["missing"]),
        ]
    )


def step(found: Json) -> str:
    return "\n\n".join(
        [
            "Time of a step with b new and r drawn rows a device over that of a plain step on b + r rows: same model, same"
            " process, in turn; the ratio is taken run by run. On fake devices every collective is a meeting of as many threads"
            " as there are devices, and what a real device does once (the plan of a draw) is done as many times on the same"
            " cores. What the buffer adds to a step does not depend on the model, so the ratio falls as the model grows."
            " *Control*: a second plain step over the first, which is what equals come out at. *Floor*: the plain step with"
            " only the bare collectives beside it, as many bytes as the exchange sends.",
            table(
                (
                    "model",
                    "b",
                    "r",
                    "dtype",
                    "with rehearsal, ms",
                    "plain, ms",
                    "ratio",
                    "control",
                    "floor",
                    "insert alone, ms",
                    "draw alone, ms",
                ),
                (
                    (
                        m["model"],
                        m["new"],
                        m["drawn"],
                        m["dtype"],
                        spread(m["step_ms"]["rehearsal"]),
                        spread(m["step_ms"]["plain"]),
                        spread(m["overhead"]),
                        spread(m["control"]),
                        spread(m["floor"]),
                        f"{m['alone_ms']['insert']:.3g}",
                        f"{m['alone_ms']['draw_and_exchange']:.3g}",
                    )
                    for m in found["models"]
                ),
            ),
        ]
    )


def step_host(found: Json) -> str:
    rows = [(m, way, h) for m in found["models"] for way, h in m["host"].items()]
    return "\n\n".join(
        [
            "The same step with the memory in host memory over the device tier's; *waiting* is the loop's, *hidden* the share"
            " of the writer's work (storing, gathering, starting the transfer) that is done when the step ends.",
            table(
                (
                    "model",
                    "b",
                    "r",
                    "handed over by",
                    "ms",
                    "over the device tier",
                    "waiting, ms",
                    "writer, ms",
                    "hidden",
                ),
                (
                    (
                        m["model"],
                        m["new"],
                        m["drawn"],
                        way,
                        spread(h["step_ms"]["host"]),
                        spread(h["over_device"]),
                        f"{h['phases_ms']['wait']:.3g}",
                        f"{sum(h['writer_ms'][x] for x in ('populate', 'sample', 'exchange')):.3g}",
                        f"{100 * h['hidden']:.0f} %",
                    )
                    for m, way, h in rows
                ),
            ),
        ]
    )


def host(found: Json) -> str:
    return "\n\n".join(
        [
            f"Insert and draw of {found['batch']} rows in and out (32 x 32 x 3 uint8), waiting after every step.",
            table(
                ("GiB", "rows", "filled, rows/s", "ms a step", "rows/s in and out", "resident, GiB"),
                (
                    (
                        f"{s['gib']:g}",
                        f"{s['rows']:,}",
                        f"{s['fill_rows_per_second']:,.0f}",
                        spread(s["step_ms"]),
                        f"{s['insert_and_draw_rows_per_second']:,.0f}",
                        f"{s['resident_bytes']['after'] / 2**30:.2f}",
                    )
                    for s in found["sizes"]
                ),
            ),
        ]
    )


def scale(found: Json) -> str:
    return "\n\n".join(
        [
            "The plan of a draw and what it makes travel, N devices with r representatives each, equal shards. *Moved over"
            " needed*: rows a device puts into collectives, padding included, over r. *Misses*: draws that do not fit the"
            " compact route and take the full one.",
            table(
                (
                    "N",
                    "r",
                    "hops of mix",
                    "moved over needed",
                    "in one hop",
                    "misses",
                    "balance: must travel",
                    "misses",
                    "plan, ms",
                ),
                (
                    (
                        s["devices"],
                        s["per_device"],
                        " x ".join(map(str, s["mix"]["hops"])),
                        f"{s['mix']['moved_over_needed']:.2f}",
                        f"{s['mix']['one_hop_moved_over_needed']:.2f}",
                        f"{s['mix']['slow_path_frequency']:.1e}",
                        f"{s['balance']['rows_that_must_travel']:.2f}",
                        f"{s['balance']['slow_path_frequency']:.1e}",
                        f"{s['plan_ms']['median']:.3g}",
                    )
                    for s in found["settings"]
                ),
            ),
        ]
    )


def accuracy(found: Json) -> str:
    return "\n\n".join(
        [
            "Split-MNIST with class-skewed shards of unequal size on 8 devices: average accuracy, mean and sample deviation"
            f" over {len(found['settings'][0]['accuracies'])} seeds. The convolutional net has batch statistics of its own on"
            " every device.",
            table(
                ("model", "exchange", "accuracy, %", "rows moved a device and step", "bytes moved"),
                (
                    (
                        s["model"],
                        s["exchange"],
                        f"{100 * s['average_accuracy']['mean']:.2f} ± {100 * s['average_accuracy']['std']:.2f}",
                        s["traffic"]["rows_moved"],
                        f"{s['traffic']['bytes_moved']:,}",
                    )
                    for s in found["settings"]
                ),
            ),
        ]
    )


def repeats(found: Json) -> str:
    def row(setting: Json, option: str, one: Json) -> tuple[Any, ...]:
        mean, deviation = summaries.mean_and_deviation([100 * x for x in one["average_accuracy"]])
        distinct = sum(one["distinct_ids"]) / len(one["distinct_ids"])
        return (
            setting["training_rows"],
            setting["capacity"],
            option,
            f"{mean:.2f} ± {deviation:.2f}",
            f"{distinct:.0f} of {one['rows'][0]}",
        )

    return "\n\n".join(
        [
            f"{found['name']}, {found['epochs']} epochs a task, {found['policy']}: what the options of `repeats` change, mean"
            " and sample deviation over seeds.",
            table(
                ("training rows", "capacity", "repeats", "accuracy, %", "distinct rows"),
                (row(s, option, one) for s in found["settings"] for option, one in s["options"].items()),
            ),
        ]
    )


def checkpoint(found: Json) -> str:
    return "\n\n".join(
        [
            f"A state of {found['state_bytes'] / 2**30:.2f} GiB, nearly all of it buffer, saved while training goes on.",
            table(
                ("figure", "value"),
                (
                    ("checkpoint over state, bytes", f"{found['checkpoint_over_state']:.5f}"),
                    ("the loop stands still for, s", ", ".join(f"{x:.2f}" for x in found["save_blocks_seconds"])),
                    ("a save costs in all, s of wall time", ", ".join(f"{x:.2f}" for x in found["save_costs_seconds"])),
                    (
                        f"share of the wall time, a save every {found['seconds_between_saves']:g} s (goal 0.05)",
                        f"{found['share_of_wall_time']:.3f}",
                    ),
                    (
                        "processor seconds a save costs",
                        ", ".join(f"{x:.2f}" for x in found["save_costs_processor_seconds"]),
                    ),
                    ("verify and restore, s", f"{found['verify_and_restore_seconds']:.2f}"),
                ),
            ),
        ]
    )


SECTIONS: dict[str, tuple[str, Callable[[Json], str]]] = {
    "bench_buffer": ("The buffer beside its peers", buffer),
    "bench_step": ("Rehearsal overhead", step),
    "bench_step_small": ("Rehearsal overhead at its worst: few rows, a small net", step),
    "bench_step_host": ("Host tier: the step", step_host),
    "bench_host": ("Host tier: capacity", host),
    "exchange_scale": ("Draws over many devices", scale),
    "exchange_accuracy": ("What the exchanges cost in accuracy", accuracy),
    "repeats": ("Repeats", repeats),
    "checkpoint": ("Checkpoints", checkpoint),
}


def where(found: Json) -> str:
    """Device, versions and command, as far as the file says."""
    machine, devices, versions = (found.get(name, {}) for name in ("machine", "devices", "versions"))
    said = [
        f"{devices['count']} {devices['kind']} device(s)" if devices else "",
        f"{machine['cores']} cores" if machine else "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"`{found['command']}`" if "command" in found else "",
    ]
    return "Measured on " + "; ".join(x for x in said if x) + "."


def page(folder: pathlib.Path) -> str:
    """The whole of docs/performance.md, from the JSON files in `folder`; a section without its file is left out."""
    parts = [
        "# Performance",
        "Written by `python -m experiments.pages.performance` from the files in `experiments/results`; do not edit. Every"
        " figure was measured by a script of `experiments`; its command stands below the table where the file tells it"
        " (`bench_buffer` and `bench_checkpoint` do not). Times are medians, in brackets p10 to p90.",
    ]
    for name, (title, section) in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            picture = [f"![{title}](../experiments/results/{name}.png)"] if path.with_suffix(".png").is_file() else []
            parts += [f"## {title}", section(found), *picture, where(found)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(RESULTS))
    print(f"wrote {PAGE.relative_to(ROOT)}")
