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

Runs are recorded in DIR: finished ones are read, unfinished ones continued, so that a figure can be drawn again and a study be
extended; --overwrite trains anew, for times from a quiet machine. What is varied is said by `get_figures()` in the config file.
Each figure leaves paper_FIGURE.json and .png in --out, or with --publish in experiments/results and docs/images, and then
docs/paper.md and the README say what they say. Figures 3 and 4 hold times, 1 the run times of its runs.
"""

import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from experiments import cli
from experiments.bench.harness import environment
from experiments.paper import draw, page
from experiments.paper.figures import FIGURES
from experiments.paper.study import Figures, Study
from jaxcl.errors import UserError
from jaxcl.runs import files

FIGURE = flags.DEFINE_list("figure", ["all"], f"which: all, or some of {', '.join(FIGURES)}")
OUT = flags.DEFINE_string("out", None, "folder of the figures; default WORKDIR/figures")
MODELS = flags.DEFINE_list("models", [], "of those that get_figures() names; default all")
NOTE = flags.DEFINE_string("note", None, "a sentence that stays with the figures, such as what else the machine did")
PUBLISH = flags.DEFINE_bool("publish", False, "into this repository's results, pictures and pages, instead of --out")


def main() -> None:
    config, workdir = cli.required(cli.CONFIG), pathlib.Path(cli.required(cli.WORKDIR))
    names = list(FIGURES) if FIGURE.value == ["all"] else FIGURE.value
    if not names or not set(names) <= set(FIGURES):
        raise UserError(f"--figure: {','.join(names)} is not allowed, give all or some of {', '.join(FIGURES)}")
    seeds = cli.seeds(default=1)
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    varied = (cli.from_config_file(path, "get_figures") or Figures()).only(MODELS.value)
    options = {"overwrite": cli.OVERWRITE.value, "stall_seconds": cli.STALL.value}
    study = Study(config, varied, workdir, seeds, options=options)
    study.check()
    for name in names:
        found = FIGURES[name].measure(study) | environment() | ({"note": NOTE.value} if NOTE.value else {})
        if jax.process_index() > 0:
            continue
        folder = pathlib.Path(OUT.value or workdir / "figures")
        numbers, picture = page.places(name) if PUBLISH.value else page.places(name, folder, folder)
        numbers.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(numbers, found)
        draw.save(FIGURES[name].picture, found, picture)
        print(f"\n{FIGURES[name].title}\n\n{FIGURES[name].paragraph(found)}\n\n{numbers}, {picture}", flush=True)
    if PUBLISH.value and jax.process_index() == 0:
        page.write()


if __name__ == "__main__":
    cli.run(main)
