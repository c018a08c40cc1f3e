"""The tables of docs/pretrained.md: what each way to remember reaches on a pretrained network, its bytes and its speed.

python -m experiments.pages.pretrained
"""

import numpy as np

from experiments.pages.page import ROOT, Json, fill, measured, table
from jaxcl import report

PAGE = ROOT / "docs" / "pretrained.md"
RESULTS = ("latent_cifar10", "latent_tinyimagenet")


def parts() -> dict[str, str]:
    """What stands between each mark of the page."""
    return {name: measured(name, of_rows) for name in RESULTS}


def of_rows(found: Json) -> str:
    """Accuracy over the seeds, as it is and beside joint's; bytes as they are and beside those of all training images."""
    head = (
        "row",
        "accuracy, %",
        "of joint's",
        "nearest class mean, %",
        "bytes",
        "of the images'",
        "rows/s",
        "seconds a run",
    )
    rows = [
        (
            one["row"],
            report.spread(one["average_accuracy"]),
            f"{100 * one['part_of_joint']:.0f} %" if "part_of_joint" in one else "",
            report.spread(one["average_nmc"]) if "average_nmc" in one else "",
            f"{np.mean(one['memory_bytes']) / 1e3:,.0f} kB",
            f"{100 * np.mean(one['memory_bytes']) / found['bytes']:,.1f} %",
            f"{np.median(one['images_per_second']):,.0f}",
            f"{np.median(one['seconds']):,.0f}",
        )
        for one in found["rows"]
    ]
    return table(head, rows)


if __name__ == "__main__":
    fill(PAGE, parts())
