"""The figures of Bouvier et al. (CCGrid 2024) from recorded runs, by one command; docs/paper.md shows what it found here.

    python -m experiments.paper --config=configs/paper_tinyimagenet.py:cpu --config.data.source=npz:FILE --devices=8
        --workdir=DIR [--figure=accuracy,sweep,scaling,phases,memory,uniformity] [--seeds=1] [--out=DIR | --publish]
        [--models=LABEL,...] [--note=TEXT] [--overwrite]

    accuracy    1  accuracy after each task from scratch, incrementally, with rehearsal; run times and the two ratios
    sweep       2  accuracy against the size of the memory, r and c
    scaling     3  run time against the number of devices, measured and modelled
    phases      4  an iteration by phase, the memory on the device and on the host
    memory      5  bytes against the budget
    uniformity  6  the draws of a running experiment

Runs are recorded in DIR: finished ones are read, unfinished ones are continued. So a figure can be drawn again and a study be
extended. --overwrite trains anew, for times from a quiet machine. `get_figures()` in the config file says what is varied.
Each figure leaves paper_FIGURE.json and .png in --out. With --publish they go to experiments/results and docs/images, and
docs/paper.md and the README are filled from them. Figures 3 and 4 hold times, figure 1 the run times of its runs.
"""

import pathlib

import jax
from absl import flags

from experiments.pages.page import RESULTS
from experiments.paper import draw, page
from experiments.paper.study import Figures, Study
from experiments.studies import grid
from jaxcl import cli
from jaxcl.check import check, one_of

FIGURE = flags.DEFINE_list("figure", ["all"], f"which: all, or some of {', '.join(page.FIGURES)}")
NOTE = flags.DEFINE_string("note", None, "a sentence that stays with the figures, such as what else the machine did")
PUBLISH = flags.DEFINE_bool("publish", False, "into this repository's results, pictures and pages, instead of --out")


def main() -> None:
    names = list(page.FIGURES) if FIGURE.value in ([], ["all"]) else FIGURE.value
    for name in names:
        check("--figure", name, one_of(page.FIGURES))
    runs = grid.from_flags(seeds=1)
    varied = Figures.of(cli.from_config_file(cli.config_path(), "get_figures") or {}, grid.MODELS.value)
    study = Study(runs, varied)
    study.check()
    own = pathlib.Path(cli.OUT.value or runs.workdir / "figures")
    numbers, pictures = (RESULTS, page.IMAGES) if PUBLISH.value else (own, own)
    for name in names:
        figure = page.FIGURES[name]
        found = figure.measure(study) | ({"note": NOTE.value} if NOTE.value else {})
        if jax.process_index() == 0:
            print(f"\n{figure.TITLE}\n\n{figure.markdown(found)}\n", flush=True)
            grid.write(numbers / f"paper_{name}.json", found)
            draw.save(figure.picture, found, pictures / f"paper_{name}.png")
    if PUBLISH.value and jax.process_index() == 0:
        page.write()


if __name__ == "__main__":
    cli.run(main)
