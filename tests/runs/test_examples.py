"""The examples run as a user would run them, and keep the laws that they assert at their ends."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (REPO / "examples").glob("replay*.py"))
OWN = ("own_strategy", "own_model", "own_arrays", "own_folder")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    command = [sys.executable, "-W", "error", "-m", f"examples.{name}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy over all tasks: 0.9" in done.stdout or "accuracy over all tasks: 1.0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_an_example_of_ones_own(name):
    """Each asserts the accuracy that it reaches."""
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}"], cwd=REPO, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy over all tasks: 0." in done.stdout or "accuracy over all tasks: 1." in done.stdout
    assert name != "own_arrays" or "holds another config's run (config.data.source is 'given:" in done.stdout


def test_flax_loop():
    command = [sys.executable, "-W", "error", "-m", "examples.flax_loop"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy over all tasks: 0.8" in done.stdout or "accuracy over all tasks: 0.9" in done.stdout


def test_notebook():
    """Its cells, one after the other, as a program, which asserts at its end what it shows."""
    book = json.loads((REPO / "examples" / "digits.ipynb").read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    program = "\n".join("".join(cell["source"]) for cell in cells)
    environment = os.environ | {"MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "er: " in done.stdout and done.stdout.endswith("report.html\n")


def test_there_is_one_for_each_tier():
    assert EXAMPLES == ["replay_loop", "replay_loop_host"]
