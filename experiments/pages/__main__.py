"""Fills every page of docs, and the README, from the result files.

python -m experiments.pages
"""

from experiments.pages import config, configs, figures, memory_bank, normalisation, page, performance, pretrained, scale
from experiments.paper import page as paper
from experiments.studies import memory_modes, references

if __name__ == "__main__":
    for one in (memory_bank, memory_modes, paper, references):
        one.write()
    page.fill(performance.PAGE, performance.parts())
    page.fill(config.PATH, config.tables())
    page.fill(configs.PAGE, configs.parts())
    page.fill(normalisation.PAGE, normalisation.parts())
    page.fill(scale.PAGE, scale.parts())
    page.fill(pretrained.PAGE, pretrained.parts())
    figures.write()
