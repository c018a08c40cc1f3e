"""Fills every page of docs, and the README, from the result files.

python -m experiments.pages
"""

from experiments.pages import memory_bank
from experiments.paper import page as paper
from experiments.studies import memory_modes, references

if __name__ == "__main__":
    for one in (memory_bank, memory_modes, paper, references):
        one.write()
