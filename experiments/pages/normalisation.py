"""The tables of docs/normalisation.md: what depends on the number of devices, accuracy by norm and by batch, AdaB2N's gain.

python -m experiments.pages.normalisation
"""

from collections.abc import Callable, Iterable

import numpy as np

from experiments.pages.page import ROOT, Json, fill, measured, table
from jaxcl import report

PAGE = ROOT / "docs" / "normalisation.md"


def parts() -> dict[str, str]:
    """What stands between each mark of the page."""
    tables: dict[str, Callable[[Json], str]] = {
        "bench_devices": of_devices,
        "norm_split_cifar10": of_norms,
        "norm_permuted_mnist": of_norms,
        "large_batch": of_batches,
        "adab2n": of_adab2n,
    }
    return {name: measured(name, markdown) for name, markdown in tables.items()}


def of_devices(found: Json) -> str:
    """The largest difference from one device over all numbers of devices, a row a norm."""
    compared = [one for one in found["norms"] if one["devices"] > 1]
    rows = []
    for norm in unique(one["norm"] for one in compared):
        mine = [one for one in compared if one["norm"] == norm]
        worst = {name: max(one[name] for one in mine) for name in ("parameters", "statistics", "accuracy_apart")}
        rows.append(
            (
                f"`{norm}`",
                f"{worst['parameters']:.1e}",
                f"{worst['statistics']:.1e}",
                f"{100 * worst['accuracy_apart']:.2f}",
            )
        )
    return table(("norm", "parameters", "running statistics", "accuracy, points"), rows)


def of_norms(found: Json) -> str:
    """Accuracy, a row a norm, a column a number of devices and of rows replayed."""
    return accuracies(
        found["rows"],
        "norm",
        ("devices", "replayed"),
        lambda n, replayed: f"{n} device{'s' * (n > 1)}, {replayed} replayed",
    )


def of_batches(found: Json) -> str:
    """Accuracy, a row a rule, a column a stream and batch; the noise scale of the small batch in a line below."""
    by_batch = accuracies(
        found["rows"],
        "rule",
        ("stream", "batch_size"),
        lambda stream, batch: f"{stream.replace('_', '-')}, {batch:,}",
    )
    noise = [
        f"{one['stream'].replace('_', '-')} {report.spread(one['noise_scale'], 1, 0)}"
        for one in found["rows"]
        if "noise_scale" in one
    ]
    return f"{by_batch}\n\nGradient noise scale at a batch of {found['base_batch']}, rows: {', '.join(noise)}."


def accuracies(rows: list[Json], first: str, names: tuple[str, str], head: Callable[..., str]) -> str:
    """A table with a row for each `row` and a column, under `head`, for each pair of the values called `names`."""
    points = unique(tuple(one[name] for name in names) for one in rows)
    found = {(one["row"], *(one[name] for name in names)): report.spread(one["average_accuracy"]) for one in rows}
    body = [
        (f"`{name}`", *(found.get((name, *point), "") for point in points))
        for name in unique(one["row"] for one in rows)
    ]
    return table((first, *(head(*point) for point in points)), body)


def of_adab2n(found: Json) -> str:
    """Accuracy with a batch norm and with AdaB2N, and the gain seed by seed, of ours and of theirs."""
    rows = []
    for name, label in (("ours", "jaxcl"), ("theirs", "the authors' layers, PyTorch")):
        by = {one["row"]: np.array(one["average_accuracy"]) for one in found.get(name, [])}
        if by:
            each = (by["BN"], by["AdaB2N"], by["AdaB2N"] - by["BN"])
            rows.append((label, *(report.spread(x) for x in each)))
    head = ("", "BN, %", "AdaB2N, %", "gain, points")
    apart = max(found.get("layers_apart", [0.0]))
    return f"{table(head, rows)}\n\nThe layers differ by at most {apart:.1e} on the same batches."


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    fill(PAGE, parts())
