"""What is seen of a run: titles, one line a task where there is no terminal, a bar where there is one."""

import io
import logging
import sys

import jax
import pytest
from ml_collections import ConfigDict

from jaxcl.runs.progress import Runs, shown, title
from jaxcl.search.seeds import train_seeds
from tests.golden import tiny


def configs(*seeds):
    return [ConfigDict({"seed": seed}) for seed in seeds]


def test_titles():
    runs = Runs(14, begun=2)
    assert title(runs, "er", configs(1)) == "run 3 of 14, er, seed 1"
    runs.setting = "rate=0.1"
    assert title(runs, "er", configs(1, 2, 3)) == "runs 4 to 6 of 14, rate=0.1, er, 3 seeds from 1"
    assert title(runs, "er", configs(0)) == "run 7 of 14, rate=0.1, er, seed 0"
    assert title(True, "er", configs(2)) == "er, seed 2"


def test_one_line_a_task(tmp_path, caplog):
    """And a finished run is counted too."""
    config = tiny("er")
    folders = {seed: tmp_path / f"seed_{seed}" for seed in (0, 1)}
    for expected in (6, 0):
        caplog.clear()
        runs = Runs(9, begun=1)
        with caplog.at_level(logging.INFO, "jaxcl"):
            results = train_seeds(config, folders, together=False, devices=jax.devices()[:2], progress=runs)
        lines = [record.getMessage() for record in caplog.records if record.name == "jaxcl"]
        assert len(lines) == expected and runs.begun == 3
        if lines:
            last = f"{100 * results[1]['average_accuracy']:.1f} %, top5 {100 * results[1]['average_top5']:.1f} %"
            assert lines[0].startswith("run 2 of 9, er, seed 0, task 1 of 3, ")
            assert lines[-1] == f"run 3 of 9, er, seed 1, task 3 of 3, {last}"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_bar_in_a_terminal_and_lines_elsewhere(stream, progress, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", stream())
    with caplog.at_level(logging.INFO, "jaxcl"), shown("er, seed 1", 2, 0, progress) as bar:
        bar.begin("task 1 of 1")
        bar.grow(1)
        bar.update()
        bar.end("task 1 of 1", {"accuracy": "97.9 %", "top5": "99.0 %"})
    said, drawn = [record.getMessage() for record in caplog.records], sys.stderr.getvalue()
    terminal = stream is Terminal
    assert said == ([] if terminal or not progress else ["er, seed 1, task 1 of 1, 97.9 %, top5 99.0 %"])
    assert ("er, seed 1, task 1 of 1:" in drawn and "1/3" in drawn) == (terminal and progress)
    assert terminal or not drawn
