"""Fills the tables of docs/performance.md from the result files of the benchmarks.

python -m experiments.pages.performance
"""

import statistics
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.pages.page import ROOT, Json, fill, load, spread, table, where
from jaxcl import report

PAGE = ROOT / "docs" / "performance.md"
MET = {True: "met", False: "**not met**", None: "not measured"}


class _Cells(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        return spread(value) if isinstance(value, dict) else "-" if value is None else format(value, spec)


def rows(header: str, row: str, records: Iterable[Mapping[str, Any]]) -> str:
    """A table with a row for each record; `row` is a format string of its fields, whose dicts are written by `spread`."""
    return table(header.split(" | "), (_Cells().vformat(row, (), one).split(" | ") for one in records))


def buffer(found: Json) -> str:
    measured = [r for r in found["results"] if r["name"] == "jaxcl" and not r["missing"]]
    own = [r | {"memory": r["bytes"] / r["bytes_expected"]} for r in measured]
    missing = [f"{r['name']}, {r['capacity']:,} rows: {r['missing']}." for r in found["results"] if r["missing"]]
    parts = [
        rows(
            "devices | rows a device | rows in and out a device | ms a step | memory over rows | temporaries, bytes",
            "{devices} | {capacity:,} | {batch} | {insert_draw_ms} | {memory:.4f} | {temp_bytes:,}",
            own,
        ),
        rows(
            "peer | devices | rows a device | peer, ms | jaxcl beside it, ms | jaxcl over peer",
            "{peer} | {devices} | {capacity:,} | {peer_ms:.3g} | {jaxcl_ms:.3g} | {jaxcl_over_peer:.3g}",
            found["pairs"],
        ),
        goals(found),
    ]
    return "\n\n".join([*parts, *missing])


def buffer_scan(found: Json) -> str:
    pairs = rows(
        "peer | jaxcl | rows | peer, ms | jaxcl beside it, ms | jaxcl over peer",
        "{peer} | {jaxcl} | {capacity:,} | {peer_ms:.3g} | {jaxcl_ms:.3g} | {jaxcl_over_peer:.3g}",
        found["pairs"],
    )
    return f"{pairs}\n\n{goals(found)}"


def goals(found: Json) -> str:
    return rows(
        "goal | limit | found | ",
        "{goal} | {limit:g} | {value:.4g} | {verdict}",
        [g | {"verdict": MET[g["met"]]} for g in found["goals"]],
    )


def buffer_sizes(found: Json) -> str:
    by_rows: dict[str, list[Json]] = {"policy": found["inserts"], "sampling": found["draws"]}
    parts = [
        rows(
            f"{name} | rows | ms | temporaries, bytes", f"{{{name}}} | {{rows:,}} | {{ms}} | {{temp_bytes:,}}", records
        )
        for name, records in by_rows.items()
    ]
    dtypes = ({"dtype": one["dtype"]} | each for one in found["dtypes"] for each in one["capacities"])
    parts += [
        rows(
            "dtype | capacity | insert and draw, ms | temporaries, bytes",
            "{dtype} | {capacity:,} | {ms} | {temp_bytes:,}",
            dtypes,
        ),
        rows("sampling | devices | insert and draw, ms", "{sampling} | {devices} | {ms}", found["device_counts"]),
    ]
    return "\n\n".join(parts)


def step(found: Json) -> str:
    return rows(
        "model | b | r | dtype | with rehearsal, ms | plain, ms | ratio | control | floor | insert alone, ms | draw alone, ms",
        "{model} | {new} | {drawn} | {dtype} | {step_ms[rehearsal]} | {step_ms[plain]} | {overhead} | {control} | {floor}"
        " | {alone_ms[insert]:.3g} | {alone_ms[draw_and_exchange]:.3g}",
        found["models"],
    )


def collectives(found: Json) -> str:
    return rows(
        "step | devices | all-reduce | all-gather | all-to-all | in all",
        "{step} | {devices} | {all_reduce} | {all_gather} | {all_to_all} | {total}",
        found["steps"],
    )


def step_host(found: Json) -> str:
    return rows(
        "model | b | r | handed over by | ms | over the device tier | waiting, ms | writer, ms | hidden",
        "{model} | {new} | {drawn} | {way} | {step_ms[host]} | {over_device} | {phases_ms[wait]:.3g} | {writer:.3g}"
        " | {hidden_percent:.0f} %",
        (
            model
            | tier
            | {"way": way, "hidden_percent": 100 * tier["hidden"]}
            | {"writer": sum(tier["writer_ms"][x] for x in ("populate", "sample", "exchange"))}
            for model in found["models"]
            for way, tier in model["host"].items()
        ),
    )


def host(found: Json) -> str:
    return rows(
        "GiB | rows | rows in and out a step | filled, rows/s | ms a step | rows/s in and out | resident, GiB",
        "{gib:g} | {rows:,} | {batch} | {fill_rows_per_second:,.0f} | {step_ms} | {insert_and_draw_rows_per_second:,.0f}"
        " | {resident:.2f}",
        (
            {"batch": found["batch"], "resident": size["resident_bytes"]["after"] / 2**30, **size}
            for size in found["sizes"]
        ),
    )


def scale(found: Json) -> str:
    return rows(
        "N | r | hops of mix | moved over needed | in one hop | misses"
        " | balance: must travel | moved over needed | misses | plan, ms",
        "{devices} | {per_device} | {hops} | {mix[moved_over_needed]:.2f} | {mix[one_hop_moved_over_needed]:.2f}"
        " | {mix[slow_path_frequency]:.1e} | {balance[rows_that_must_travel]:.2f} | {balance[moved_over_needed]:.2f}"
        " | {balance[slow_path_frequency]:.1e} | {plan_ms[median]:.3g}",
        (s | {"hops": " x ".join(map(str, s["mix"]["hops"]))} for s in found["settings"]),
    )


def accuracy(found: Json) -> str:
    return rows(
        "model | exchange | seeds | accuracy, % | rows moved a device and step | bytes moved",
        "{model} | {exchange} | {seeds} | {percent} | {traffic[rows_moved]} | {traffic[bytes_moved]:,}",
        (s | {"seeds": len(s["accuracies"]), "percent": report.spread(s["accuracies"])} for s in found["settings"]),
    )


def repeats(found: Json) -> str:
    return rows(
        "training rows | capacity | repeats | accuracy, % | distinct rows",
        "{training_rows} | {capacity} | {option} | {percent} | {distinct:.0f} of {rows[0]}",
        (
            setting
            | one
            | {"option": option, "percent": report.spread(one["average_accuracy"])}
            | {"distinct": statistics.mean(one["distinct_ids"])}
            for setting in found["settings"]
            for option, one in setting["options"].items()
        ),
    )


def checkpoint(found: Json) -> str:
    def each(field: str) -> str:
        return ", ".join(f"{x:.2f}" for x in found[field])

    between = f"{found['seconds_between_saves']:g}"
    return table(
        ("figure", "value"),
        (
            ("state, GiB", f"{found['state_bytes'] / 2**30:.2f}"),
            ("checkpoint over state, bytes", f"{found['checkpoint_over_state']:.5f}"),
            ("the loop stands still for, s", each("save_blocks_seconds")),
            ("a save costs in all, s of wall time", each("save_costs_seconds")),
            (f"share of the wall time, a save every {between} s (goal 0.05)", f"{found['share_of_wall_time']:.3f}"),
            ("processor seconds a save costs", each("save_costs_processor_seconds")),
            ("verify and restore, s", f"{found['verify_and_restore_seconds']:.2f}"),
        ),
    )


TABLES: dict[str, Callable[[Json], str]] = {
    "bench_buffer": buffer,
    "bench_buffer_scan": buffer_scan,
    "bench_buffer_sizes": buffer_sizes,
    "bench_step": step,
    "bench_step_small": step,
    "collectives": collectives,
    "bench_step_host": step_host,
    "bench_host": host,
    "exchange_scale": scale,
    "exchange_accuracy": accuracy,
    "repeats": repeats,
    "checkpoint": checkpoint,
}


def parts() -> dict[str, str]:
    """What stands between each mark of the page."""
    found = {name: load(name) for name in TABLES}
    return {f"table: {name}": f"{make(found[name])}\n\n{where(found[name])}" for name, make in TABLES.items()}


if __name__ == "__main__":
    fill(PAGE, parts())
