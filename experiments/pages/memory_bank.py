"""The tables and pictures of docs/memory_bank.md, from experiments/results/memory_bank.json.

python -m experiments.pages.memory_bank
"""

import operator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pages.page import ROOT, Json, fill, load, spread, table, where
from experiments.studies.memory_bank import MORE
from jaxcl import report

PAGE, IMAGES = ROOT / "docs" / "memory_bank.md", ROOT / "docs" / "images"
RECALLS = [f"{way}@{k}" for way in ("left_to_right", "right_to_left") for k in (1, 5, 10)]
SHOWN = RECALLS[2]
HEAD = ("negatives", "stored or drawn", "option", "devices", "batch", "negatives of an anchor", "steps")
NEGATIVES = operator.itemgetter("negatives_of_an_anchor")
WAYS = ("image to text @1", "@5", "@10", "text to image @1", "@5", "@10")
COLORS = {
    "gathered": "#0072B2",
    "fifo": "#D55E00",
    "momentum": "#009E73",
    "full_bank": "#CC79A7",
    "in_batch": "#999999",
}


def recall(one: Json, name: str = SHOWN) -> str:
    return report.spread(one["recall"][name], digits=1)


def option(one: Json) -> str:
    """What more than the negatives and their number is changed."""
    said = []
    if one["negatives"] == "momentum" and "momentum" in one:
        said.append(f"m {one['momentum']:g}")
    if one["negatives"] == "full_bank" and "bank.proximal" in one:
        said.append(f"λ {one['bank.proximal']:g}")
    said += [one[field] for field in ("bank.storage", "data.pairs") if field in one]
    said += [f"from epoch {one['bank.start']:g}"] if "bank.start" in one else []
    return ", ".join([*said, *one.get("data.augment", ())])


def stored(one: Json) -> int | str:
    if one["negatives"] in ("fifo", "momentum"):
        return one["bank.capacity"]
    return one["bank.drawn"] if one["negatives"] == "full_bank" else "-"


def rows(part: Json) -> list[tuple[Any, ...]]:
    return [
        (
            *(one["negatives"], stored(one), option(one), one["devices"], one.get("batch_size", part["batch_size"])),
            *(one["negatives_of_an_anchor"], one["steps"], *(recall(one, x) for x in RECALLS)),
        )
        for one in part["settings"]
    ]


def about(part: Json) -> str:
    return f"{part['seeds']} seed(s). {where(part)}"


def short(settings: list[Json]) -> str:
    """A line a setting, with its difference to the first one of the same augmentation: the batch alone."""
    names = ("devices", "negatives_of_an_anchor", "steps")
    alone: dict[tuple[str, ...], Json] = {}
    found = []
    for one in settings:
        base = alone.setdefault(tuple(one.get("data.augment", ())), one)
        found.append((one["negatives"], option(one), *(one[x] for x in names), recall(one), over(one, base)))
    head = (
        "negatives",
        "option",
        "devices",
        "negatives of an anchor",
        "steps",
        "image to text @10",
        "over the batch alone",
    )
    return table(head, found)


def over(one: Json, base: Json) -> str:
    """The difference of the mean recalls in points, with the deviation of a difference of two runs; "" of the base itself."""
    if one is base:
        return ""
    mine, its = (100 * np.array(x["recall"][SHOWN]) for x in (one, base))
    deviation = np.sqrt(mine.var(ddof=1) + its.var(ddof=1)) if len(mine) > 1 else np.nan
    return f"{mine.mean() - its.mean():+.1f} ± {deviation:.1f}"


def equal(part: Json) -> str:
    """One device's batch alone, and the settings with as many negatives as the most devices gather."""
    plain = [one for one in part["settings"] if "data.augment" not in one]
    most = max(one["negatives_of_an_anchor"] for one in plain if one["negatives"] == "gathered")
    return short([plain[0], *(one for one in plain if one["negatives_of_an_anchor"] == most)])


def crops(part: Json) -> str:
    """The batch alone and the largest banks, with images as they are and cropped."""
    settings = part["settings"]
    return short([settings[0], *(one for one in settings if stored(one) == MORE or "data.augment" in one)])


def accuracy(part: Json) -> str:
    gathered = [row for row in rows(part) if row[0] == "gathered"]
    banks = [row for row in rows(part) if row[0] != "gathered"]
    picture = "![Recall against the number of negatives](images/memory_bank_accuracy.png)"
    return "\n\n".join([table((*HEAD, *WAYS), gathered), table((*HEAD, *WAYS), banks), picture, about(part)])


def plot_accuracy(part: Json) -> Figure:
    """Recall@10 both ways against the negatives of an anchor; lines of three settings or more."""
    settings = [one for one in part["settings"] if "bank.start" not in one and "data.augment" not in one]
    first, lines = settings[0], dict[tuple[str, str], list[Json]]()
    for one in settings:
        name = option(one) or ("as many epochs" if "epochs" not in one else "as many steps")
        lines.setdefault((one["negatives"], name if one["negatives"] != "fifo" else ""), []).append(one)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, way, title in zip(panels, RECALLS[2::3], ("image to text", "text to image"), strict=True):
        for i, ((negatives, name), several) in enumerate(lines.items()):
            if len(several) < 3:
                continue
            several = sorted([first, *(x for x in several if x is not first)], key=NEGATIVES)
            y = 100 * np.array([one["recall"][way] for one in several])
            solid = name in ("", "as many steps") or name.endswith((" 0", "m 0.99"))
            style = {"fmt": "o-" if solid else "o--", "color": COLORS[negatives], "ms": 4, "capsize": 2, "zorder": i}
            deviation = y.std(1, ddof=1) if part["seeds"] > 1 else np.zeros(len(y))
            axes.errorbar(
                [*map(NEGATIVES, several)], y.mean(1), deviation, label=f"{negatives} {name}".strip(), **style
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("negatives of an anchor")
        axes.set_title(title, fontsize=10)
        axes.grid(color="#e4e8ec")
    panels[0].set_ylabel("recall@10, %")
    panels[0].set_ylim(bottom=0)
    _legend(panels[1])
    return figure


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def cosine(evaluation: Json) -> np.ndarray:
    """Of stored and fresh embeddings by age, mean of both sides."""
    return np.mean([evaluation["left"], evaluation["right"]], axis=0)


def staleness(part: Json) -> str:
    found = []
    for one in part["settings"]:
        for x in one["evaluations"][:2]:
            ages, y = f"{x['age'][0]:.0f} to {x['age'][-1]:.0f}", cosine(x)
            found.append((one["negatives"], option(one), x["step"], ages, f"{y[0]:.3f}", f"{y[-1]:.3f}"))
    head = ("bank", "option", "step", "ages", "cosine, youngest", "cosine, oldest")
    picture = "![Cosine of stored against fresh embeddings by age](images/memory_bank_staleness.png)"
    return "\n\n".join([table(head, found), picture, about(part)])


def plot_staleness(part: Json) -> Figure:
    """Cosine by age, a panel an evaluation."""
    settings, figure = part["settings"], Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(settings[0]["evaluations"]), sharey=True)
    for i, axes in enumerate(panels):
        for n, one in enumerate(settings):
            x, style = one["evaluations"][i], ("-", "--", ":", "-.")[n % 4]
            label = f"{one['negatives']} {option(one)}".strip()
            axes.plot(x["age"], cosine(x), style, color=COLORS[one["negatives"]], label=label, lw=1.5)
        axes.set_title(f"step {settings[0]['evaluations'][i]['step']}", fontsize=10)
        axes.set_xlabel("age, steps")
        axes.grid(color="#e4e8ec")
    panels[0].set_ylabel("cosine, stored and fresh")
    _legend(panels[-1])
    return figure


def pairs(part: Json) -> str:
    ways = [f"{way} @{k}" for way in ("first to second", "back") for k in (1, 5, 10)]
    return f"{table((*HEAD, *ways), rows(part))}\n\n{about(part)}"


def storage(part: Json) -> str:
    head = ("stored as", "bytes of 768 numbers", "distance of a unit vector from what is stored", *WAYS)
    found = (
        (one["bank.storage"], f"{one['row_bytes']:,}", f"{one['error']:.1e}", *(recall(one, x) for x in RECALLS))
        for one in part["settings"]
    )
    return f"{stored(part['settings'][0])} rows.\n\n{table(head, found)}\n\n{about(part)}"


def cost(part: Json) -> str:
    sizes = ("parameters", "optimiser", "key_encoders", "bank", "temporaries")
    head = ("devices", "negatives", "ms a step", *(name.replace("_", " ") for name in sizes))
    found = (
        (
            *(one["devices"], one["negatives"], spread(one["step_ms"])),
            *(f"{one['bytes_per_device'][x]:,}" for x in sizes),
        )
        for one in part["settings"]
    )
    return f"{table(head, found)}\n\n{where(part)}"


def scale(part: Json) -> str:
    done = [one for one in part["settings"] if "skipped" not in one]
    skipped = [f"{x['rows']:,} rows: {x['skipped']} GiB were free." for x in part["settings"] if "skipped" in x]
    counts = ("rows", "bytes", "bytes_per_device", "temporaries_per_device", "resident_growth")
    head = ("rows", "bytes in all", "a device", "temporaries of a step, a device", "process grew by", "ms a step")
    found = ((*(f"{one[x]:,}" for x in counts), spread(one["step_ms"])) for one in done)
    return "\n\n".join([table(head, found), *skipped, where(part)])


SECTIONS = {
    "equal": ("accuracy", equal),
    "crops": ("accuracy", crops),
    **{one.__name__: (one.__name__, one) for one in (accuracy, staleness, pairs, storage, cost, scale)},
}
PICTURES = {"accuracy": plot_accuracy, "staleness": plot_staleness}


def sections(found: Json) -> dict[str, str]:
    """What the page shows behind each mark."""
    return {
        mark: make(found[part]) if part in found else "Not measured yet." for mark, (part, make) in SECTIONS.items()
    }


def write() -> None:
    found = load("memory_bank")
    for name, plot in PICTURES.items():
        if name in found:
            plot(found[name]).savefig(IMAGES / f"memory_bank_{name}.png", dpi=130)
    fill(PAGE, sections(found))


if __name__ == "__main__":
    write()
