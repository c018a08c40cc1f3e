"""Settings chosen on the validation rows of one data set, and the choice judged on another.

    python -m experiments.studies.choice --config=configs/split_cifar10.py:cpu --config.data.source=npz:FILE \\
        --config.buffer.representatives=8 --judge=configs/paper_tinyimagenet.py:medium --judge.data.source=npz:FILE \\
        --workdir=DIR --json=experiments/results/choice.json [--seeds=3] [--devices=2]

What is chosen among are rows of `experiments.studies.rehearsal` that cost the same. Each is trained on the first data set
without its validation rows, a tenth of each class, which stand in for the test set. The best is the choice. All rows are then
trained on the second data set, so that the choice's rank there can be told. Cha & Cho 2024, Hyperparameters in continual
learning: a reality check.
"""

import numpy as np
from absl import flags
from ml_collections import config_flags

from experiments.pages.page import Json
from experiments.studies import grid, rehearsal
from experiments.studies.grid import Grid, Setting
from jaxcl import cli

JUDGE = config_flags.DEFINE_config_file("judge", None, "config file of the data set on which the choice is judged")
CHOICES = flags.DEFINE_list(
    "choices",
    [
        "er",
        "er+balanced",
        "er+balanced weight 2",
        "er+balanced weight 4",
        "er+balanced later 0.3",
        "er+balanced later 0.1",
    ],
    "rows of experiments.studies.rehearsal that are chosen among",
)
VALIDATION = 0.1


def main() -> None:
    search = grid.from_flags(seeds=3)
    judge = Grid(cli.required(JUDGE), search.workdir / "judged", search.seeds, options=search.options)
    chosen_on, judged_on = (
        one.records(list(settings(one, more, CHOICES.value)), rehearsal.summary, rehearsal.said)
        for one, more in ((search, {"data.validation": VALIDATION}), (judge, {}))
    )
    if cli.JSON.value:
        found = {"search": search.config.name, "judge": judge.config.name, **judged(chosen_on, judged_on)}
        grid.write(cli.JSON.value, found)


def settings(one: Grid, more: grid.Fields, names: list[str]) -> list[Setting]:
    rows = rehearsal.rows_of(one.config)
    return [Setting(name, {**rows[name], **more}, {"row": name}) for name in names]


def judged(chosen_on: list[Json], judged_on: list[Json]) -> Json:
    """What was chosen, and where it stands among all on the other data set, by mean accuracy over seeds."""
    validation, test = ([float(np.mean(one["top1"])) for one in records] for records in (chosen_on, judged_on))
    choice = int(np.argmax(validation))
    return {
        "choice": chosen_on[choice]["row"],
        "rank": 1 + sum(x > test[choice] for x in test),
        "best": judged_on[int(np.argmax(test))]["row"],
        "seconds_of_search": sum(sum(one["seconds"]) for one in chosen_on),
        "searched": chosen_on,
        "judged": judged_on,
    }


if __name__ == "__main__":
    cli.run(main)
