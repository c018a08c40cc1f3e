"""docs/memory_bank.md, written from experiments/results/memory_bank.json: the question, what was found, and when to use which.

python -m experiments.pages.memory_bank

The sentences that name a figure or draw a conclusion are made from the file too: a new measurement that says otherwise says so
on the page. Pictures go to docs/images.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.pages.page import RESULTS, ROOT, spread, table, where
from experiments.studies.memory_bank import MORE
from jaxcl.summaries import mean_and_deviation

FILE, PAGE, IMAGES = RESULTS / "memory_bank.json", ROOT / "docs" / "memory_bank.md", ROOT / "docs" / "images"
RECALLS = [f"{way}@{k}" for way in ("left_to_right", "right_to_left") for k in (1, 5, 10)]
HEAD = ("negatives", "stored or drawn", "option", "devices", "batch", "negatives of an anchor", "steps")
WAYS = ("image to text @1", "@5", "@10", "text to image @1", "@5", "@10")
COLORS = {
    "gathered": "#0072B2",
    "fifo": "#D55E00",
    "momentum": "#009E73",
    "full_bank": "#CC79A7",
    "in_batch": "#999999",
}
Json = dict[str, Any]


def mean(one: Json, recall: str = "left_to_right@10") -> float:
    return 100 * float(np.mean(one["recall"][recall]))


def said(one: Json, recall: str = "left_to_right@10") -> str:
    """Mean and, of several seeds, sample deviation, in per cent."""
    values = [100 * x for x in one["recall"][recall]]
    return f"{values[0]:.1f}" if len(values) == 1 else "{:.1f} ± {:.1f}".format(*mean_and_deviation(values))


def option(one: Json) -> str:
    named = {"momentum": "m", "bank.proximal": "λ", "bank.storage": "", "data.pairs": "", "bank.start": "from epoch"}
    wanted = {"momentum": ("momentum",), "full_bank": ("bank.proximal",)}.get(one["negatives"], ())
    fields = [f for f in named if f in one and (f in wanted or f in ("bank.start", "bank.storage", "data.pairs"))]
    said = [f"{named[f]} {one[f]:g}".strip() if isinstance(one[f], float) else one[f] for f in fields]
    return ", ".join([*said, *one.get("data.augment", ())])


def stored(one: Json) -> int | str:
    field = {"fifo": "bank.capacity", "momentum": "bank.capacity", "full_bank": "bank.drawn"}.get(one["negatives"], "")
    return one.get(field, "-")


def row(one: Json, batch: int) -> tuple[Any, ...]:
    size = one.get("batch_size", batch)
    shared = (one["negatives"], stored(one), option(one), one["devices"], size, one["negatives_of_an_anchor"])
    return (*shared, one["steps"], *(said(one, x) for x in RECALLS))


def special(one: Json) -> bool:
    """Whether more than the negatives is changed."""
    return "bank.start" in one or "data.augment" in one


def find(settings: list[Json], **fields: Any) -> Json:
    """The one setting with these fields, __ for the dots; None: the field is not there."""
    wanted = {name.replace("__", "."): x for name, x in fields.items()}
    found = [one for one in settings if all(one.get(name) == x for name, x in wanted.items())]
    assert len(found) == 1, (wanted, found)
    return found[0]


def over(part: Json) -> str:
    return "one seed" if part["seeds"] == 1 else f"mean and sample deviation over {part['seeds']} seeds"


def accuracy(part: Json) -> list[str]:
    settings, batch = part["settings"], part["batch_size"]
    gathered = [one for one in settings if one["negatives"] == "gathered"]
    banks = [one for one in settings if one["negatives"] != "gathered"]
    return [
        "## Retrieval",
        f"Recall on the held-out pairs, per cent, {over(part)}.",
        "Devices that gather, for as many epochs and for as many steps as one device:",
        table((*HEAD, *WAYS), (row(one, batch) for one in gathered)),
        "One device with a bank:",
        table((*HEAD, *WAYS), (row(one, batch) for one in banks)),
        "![Recall against the number of negatives](images/memory_bank_accuracy.png)",
        where(part),
    ]


def plot_accuracy(part: Json, path: pathlib.Path) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, way, title in zip(
        figure.subplots(1, 2, sharey=True), RECALLS[2::3], ("image to text", "text to image"), strict=True
    ):
        lines: dict[tuple[str, str], list[Json]] = {}
        first = find(part["settings"], negatives="gathered", devices=1)
        for one in part["settings"]:
            if special(one):
                continue
            name = option(one) or ("as many epochs" if "epochs" not in one else "as many steps")
            lines.setdefault((one["negatives"], name if one["negatives"] != "fifo" else ""), []).append(one)
        for i, ((negatives, name), several) in enumerate(lines.items()):
            if len(several) < 3:
                continue
            several = sorted(
                [first, *(x for x in several if x is not first)], key=lambda x: x["negatives_of_an_anchor"]
            )
            style = "-" if name in ("", "as many steps") or name.endswith((" 0", "m 0.99")) else "--"
            x, y = [x["negatives_of_an_anchor"] for x in several], [mean(x, way) for x in several]
            deviation = [100 * float(np.std(x["recall"][way], ddof=1)) if part["seeds"] > 1 else 0.0 for x in several]
            label = " ".join(filter(None, (negatives, name)))
            axes.errorbar(
                x, y, deviation, fmt="o" + style, color=COLORS[negatives], label=label, ms=4, capsize=2, zorder=i
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("negatives of an anchor")
        axes.set_title(title, fontsize=10)
        axes.grid(color="#e4e8ec")
    figure.axes[0].set_ylabel("recall@10, %")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def staleness_rows(settings: Iterable[Json]) -> Iterable[tuple[Any, ...]]:
    for one in settings:
        for found in one["evaluations"][:2]:
            cosine = (np.array(found["left"]) + np.array(found["right"])) / 2
            ages = f"{found['age'][0]:.0f} to {found['age'][-1]:.0f}"
            yield one["negatives"], option(one), found["step"], ages, f"{cosine[0]:.3f}", f"{cosine[-1]:.3f}"


def staleness(part: Json) -> list[str]:
    return [
        "## How stale a row is",
        "Cosine between what is stored and what the encoders that fill the bank make of the same example now, mean of both"
        " sides, by age in optimiser steps, at two moments of training; one seed. Later little moves: the training pairs have"
        " been learned, and the learning rate goes to 0.",
        table(
            ("bank", "option", "step", "ages", "cosine, youngest", "cosine, oldest"), staleness_rows(part["settings"])
        ),
        "![Cosine of stored against fresh embeddings by age](images/memory_bank_staleness.png)",
        "A cosine near 1 alone means little: encoders that have collapsed give one and the same embedding for ever. The"
        " spread of the embeddings is what recall shows.",
        where(part),
    ]


def plot_staleness(part: Json, path: pathlib.Path) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    rounds = len(part["settings"][0]["evaluations"])
    for i, axes in enumerate(figure.subplots(1, rounds, sharey=True)):
        for n, one in enumerate(part["settings"]):
            found = one["evaluations"][i]
            cosine = (np.array(found["left"]) + np.array(found["right"])) / 2
            style = ("-", "--", ":", "-.")[n % 4]
            label = f"{one['negatives']} {option(one)}".strip()
            axes.plot(found["age"], cosine, style, color=COLORS[one["negatives"]], label=label, lw=1.5)
        axes.set_title(f"step {part['settings'][0]['evaluations'][i]['step']}", fontsize=10)
        axes.set_xlabel("age, steps")
        axes.grid(color="#e4e8ec")
    figure.axes[0].set_ylabel("cosine, stored and fresh")
    figure.axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def pairs(part: Json) -> list[str]:
    ways = [f"{way} @{k}" for way in ("first to second", "back") for k in (1, 5, 10)]
    return [
        "## Styles and views",
        "Two drawings of one thing; and two crops, perhaps mirrored, of one picture, where kinds without a bank have SimCLR's"
        f" loss. Recall in per cent, {over(part)}.",
        table((*HEAD, *ways), (row(one, part["batch_size"]) for one in part["settings"])),
        where(part),
    ]


def storage(part: Json) -> list[str]:
    head = ("stored as", "bytes of 768 numbers", "distance of a unit vector from what is stored", *WAYS)
    rows = (
        (one["bank.storage"], f"{one['row_bytes']:,}", f"{one['error']:.1e}", *(said(one, x) for x in RECALLS))
        for one in part["settings"]
    )
    return [
        "## Storage",
        f"The queue of a momentum encoder, {stored(part['settings'][0])} rows. Recall in per cent, {over(part)}; the distance"
        " is the root mean square over random vectors.",
        table(head, rows),
        where(part),
    ]


def cost(part: Json) -> list[str]:
    def bytes_(one: Json) -> Iterable[str]:
        sizes = one["bytes_per_device"]
        return (f"{sizes[x]:,}" for x in ("parameters", "optimiser", "key_encoders", "bank", "temporaries"))

    head = ("devices", "negatives", "ms a step", "parameters", "optimiser", "key encoders", "bank", "temporaries")
    rows = ((one["devices"], one["negatives"], spread(one["step_ms"]), *bytes_(one)) for one in part["settings"])
    return [
        "## What a step costs",
        f"The same global batch of {part['batch_size'] * 8} pairs, 7 times as many stored rows or 1,024 drawn slots; the kinds"
        " take turns in one process, median (p10 to p90) in milliseconds; bytes on one device. Fake devices share the"
        " processor's cores: the time tells what a kind costs beside another one, not how it scales.",
        table(head, rows),
        where(part),
    ]


def scale(part: Json) -> list[str]:
    done = [one for one in part["settings"] if "skipped" not in one]
    head = ("rows", "bytes in all", "a device", "temporaries of a step, a device", "process grew by", "ms a step")
    rows = (
        (
            f"{one['rows']:,}",
            f"{one['bytes']:,}",
            f"{one['bytes_per_device']:,}",
            f"{one['temporaries_per_device']:,}",
            f"{one['resident_growth']:,}",
            spread(one["step_ms"]),
        )
        for one in done
    )
    skipped = [
        f"{one['rows']:,} rows were not allocated: {one['skipped']} GiB free."
        for one in part["settings"]
        if "skipped" in one
    ]
    first = done[0]
    return [
        "## Three million rows",
        f"A slot for each of 3,264,868 examples, {first['dim']} numbers of one side in bfloat16, over {first['devices']}"
        f" devices, and parts of it: allocated, written all over, then stepped with a batch of {first['batch_size']} and"
        f" {first['drawn']:,} drawn negatives. A row takes 2 bytes a number and 12 for its key, id and age.",
        table(head, rows),
        *skipped,
        where(part),
    ]


SECTIONS: dict[str, Any] = {
    "accuracy": accuracy,
    "staleness": staleness,
    "pairs": pairs,
    "storage": storage,
    "cost": cost,
    "scale": scale,
}
PICTURES = {"accuracy": plot_accuracy, "staleness": plot_staleness}


def answer(found: Json) -> str:
    """Which to use when, in the figures of this file."""
    settings = found["accuracy"]["settings"]
    one = find(settings, negatives="gathered", devices=1)
    eight = find(settings, negatives="gathered", devices=8, epochs=None)
    long = next(x for x in settings if x["negatives"] == "gathered" and x["devices"] == 8 and "epochs" in x)
    rows = max(x["bank.capacity"] for x in settings if x["negatives"] == "fifo" and x["bank.capacity"] < MORE)
    fifo = find(settings, negatives="fifo", bank__capacity=rows, bank__start=None, data__augment=None)
    momentum = [x for x in settings if x["negatives"] == "momentum" and stored(x) == rows and not special(x)]
    full = [x for x in settings if x["negatives"] == "full_bank" and stored(x) == rows and not special(x)]
    cold = {x["negatives"]: x for x in settings if x.get("bank.start") == 0}
    best_m, best_l = max(momentum, key=mean), max(full, key=mean)

    several = found["accuracy"]["seeds"] > 2

    def against(x: Json) -> str:
        if not several:
            return said(x)
        difference = mean(x) - mean(one)
        noise = 2 * sum(np.var([100 * y for y in z["recall"][RECALLS[2]]], ddof=1) for z in (x, one)) ** 0.5
        noise /= found["accuracy"]["seeds"] ** 0.5
        verdict = "no different" if abs(difference) <= noise else "better" if difference > 0 else "worse"
        return f"{said(x)} ({verdict})"

    compared = (
        "in brackets whether the means differ from that by more than two standard errors of their difference"
        if several
        else "with so few seeds, differences of a few points mean nothing"
    )

    def each(several: list[Json], field: str, symbol: str) -> str:
        return "; ".join(f"{symbol} {x[field]:g}: {said(x)}" for x in several)

    lines = [
        f"All with {fifo['negatives_of_an_anchor']} negatives beside the {one['negatives_of_an_anchor']} of one device's batch"
        f" alone, which finds {said(one)} % of the held-out texts among the ten nearest of their images; {compared}.",
        "",
        f"- **More devices that gather**: {against(long)} % with as many steps, {against(eight)} % with as many epochs, in"
        " which eight devices take an eighth of the steps. Exact, nothing stale; what it costs is the devices.",
        f"- **A queue (`fifo`)**: {against(fifo)} % once the encoders have warmed up in batch; used from the first step"
        f" {said(cold['fifo'])} %. Old rows push and are not pushed: without a warm-up all embeddings flee from where they"
        " were, and collapse.",
        f"- **A full bank (`full_bank`)**: {against(best_l)} % at the best λ of this table ({best_l['bank.proximal']:g});"
        f" {each(full, 'bank.proximal', 'λ')}; from the first step {said(cold['full_bank'])}. Its rows are up to an epoch"
        " old, and more where a row comes late in the next. It is the one whose memory grows with the data.",
        f"- **A momentum encoder (`momentum`)**: {against(best_m)} % at the best m of this table ({best_m['momentum']:g});"
        f" {each(momentum, 'momentum', 'm')}; from the first step {said(cold['momentum'])}. It costs a second copy of the"
        " encoders and a second forward pass.",
    ]

    def long_ones(augment: tuple[str, ...] | None) -> str:
        wanted = [x for x in settings if stored(x) == MORE and tuple(x.get("data.augment", ())) == (augment or ())]
        return ", ".join(
            f"{x['negatives']} {option({**x, 'data.augment': ()})}".strip() + f" {said(x)}" for x in wanted
        )

    cropped = find(settings, negatives="in_batch")
    lines += [
        "",
        f"With a bank of {MORE:,} (nearly the whole set): {long_ones(None)} %. The same where images are cropped at random in"
        f" training, so that a stored row is also another crop of its example than the encoders would see now, against"
        f" {said(cropped)} % in batch: {long_ones(('crop',))} %.",
    ]
    return "\n".join(lines)


def page(found: Json) -> str:
    parts = [INTRODUCTION]
    if "accuracy" in found:
        parts += ["## Which is worth using when", answer(found), ADVICE]
    for name, section in SECTIONS.items():
        parts += section(found[name]) if name in found else []
    return "\n\n".join([*parts, LIMITS]) + "\n"


INTRODUCTION = """# Memory banks instead of more devices

Written by `python -m experiments.pages.memory_bank` from `experiments/results/memory_bank.json`, which `python -m
experiments.studies.memory_bank` writes; do not edit.

Contrastive learning wants many negatives. They can come from the batch (`in_batch`), from the batches of all devices
(`gathered`), from the last embeddings (`fifo`), from a slot an example (`full_bank`, with a proximal term), or from a
queue that a momentum encoder fills (`momentum`): `config.negatives`. All of them are one loss, symmetric InfoNCE with
a learned temperature, in `jaxcl/contrastive/`:

- Anchors travel, candidates do not. Every device scores the anchors of all devices against its own candidates,
  current and stored, and sends each anchor one number, the logarithm of its partial sum; the owner adds them up. No
  device ever holds the bank, and a step's temporaries do not grow with it (tests read that off the compiled program).
- N devices are one device with the global batch: values and gradients, those through the gather included.
- A bank is the buffer's shard with the buffer's `fifo` policy, or a slot for each id. As a global array it is the
  same on any number of devices, and so a run goes on with others than it began with. K slots of the full bank are
  drawn as representatives are: uniformly, without replacement, over the union.
- It is written before it is read, so that it stays in place; what step t makes enters it at the start of step t + 1.
- `bank.start` is the epoch from which its rows count (Wang et al., *Cross-Batch Memory for Embedding Learning*, CVPR
  2020).
- `bank.storage`: float32, bfloat16, or int8 with a scale a row.
- `passes`: several optimiser steps on one batch in one compiled step.
- `data.pairs`: captions, views of one image (with `same_side` SimCLR's loss; with `momentum` MoCo's), or two styles.

```
python -m experiments.pairs --config=configs/memory_bank_emoji.py --config.data.source=emoji:FILE --workdir=DIR
    [--config.negatives=fifo --config.bank.capacity=1024 ...] [--devices=8]
```

`--config.data.source=tfds:mnist`, `npz:FILE` and the like take the names of the classes as text: rows of one class
then match, and are no negatives of each other. `tfds:coco_captions` is written and tested on a stand-in, and has not
been run on the real set."""

ADVICE = """So, of the four:

- On a set this small more negatives are not what is missing: neither a bank nor more devices find clearly more than the batch
  alone, at the learning rate of one device. Take the batch that fits.
- Devices that gather have nothing stale and nothing to set; they are the yardstick for the others, not a bargain.
- A queue or a full bank must warm up, or it collapses, and may do harm even then: see the crops above and the styles below. The
  proximal term holds the rows of a full bank together; too strong, it holds the training back.
- A momentum encoder is the bank that survives both, without a warm-up and with crops, at the price of its copy and a forward
  pass; m must be low enough that the average follows within the run."""

LIMITS = """## What these figures cannot say

The set is small: 1,315 pairs to train on, in which 1,024 rows are most of an epoch and a batch of 32 is already a
good sample of all there is. The encoders are small, and trained for minutes; the claims about thousands of negatives
and millions of examples were made at sizes that this machine does not reach. Learning rate and temperature are those
of the gathered run for every kind."""


def main() -> None:
    found = json.loads(FILE.read_text())
    for name, plot in PICTURES.items():
        if name in found:
            plot(found[name], IMAGES / f"memory_bank_{name}.png")
    PAGE.write_text(page(found))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
