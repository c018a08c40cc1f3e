"""The benchmarks can be imported together, say where they were measured, and their page says what the result files say."""

import importlib
import json
import pkgutil
import subprocess
import sys

import numpy as np
import pytest

from experiments import bench
from experiments.bench import harness, step
from experiments.bench.harness import Contender
from experiments.pages import page, performance


def test_the_page_is_that_of_the_result_files():
    text = performance.PAGE.read_text()
    assert page.filled(text, performance.parts()) == text


def test_a_mark_without_a_part_or_a_part_without_a_mark_is_refused():
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    done = page.filled(text, {"one": "new", "two": r"\1"})
    assert done == "a\n<!-- one -->\nnew\n<!-- end -->\nb\n<!-- two -->\n\\1\n<!-- end -->\n"
    for parts in ({"one": ""}, {"one": "", "two": "", "three": ""}):
        with pytest.raises(ValueError, match="marks"):
            page.filled(text, parts)


def test_all_benchmarks_can_be_imported_in_one_process():
    names = [found.name for found in pkgutil.walk_packages(bench.__path__, bench.__name__ + ".")]
    assert len(names) > 12
    for name in names:
        importlib.import_module(name)


def test_options_are_those_of_the_signature(tmp_path):
    program = tmp_path / "some.py"
    program.write_text(
        "from typing import Annotated, Literal\n"
        "from experiments.bench import harness\n"
        "def measure(*, sizes: Annotated[tuple[float, ...], 'GiB'] = (0.5, 1), way: Annotated[Literal['a', 'b'], 'w'] = 'a',\n"
        "            path: Annotated[str | None, 'p'] = None, host: Annotated[bool, 'h'] = False) -> dict:\n"
        "    return {'given': [sizes, way, path, host], 'records': [{'x': 1}, {'x': 2}]}\n"
        "harness.run(measure)\n"
    )

    def command(*arguments):
        line = [sys.executable, str(program), *arguments]
        env = {"PYTHONPATH": str(page.ROOT), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=env)

    done = command("--sizes=2,0.25", "--host", f"--json={tmp_path}/found.json")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "found.json").read_text()
    found = json.loads(text)
    assert found["given"] == [[2.0, 0.25], "a", None, True] and '\n  {"x": 2}\n' in text
    assert found["revision"] and found["command"].endswith("--sizes=2,0.25 --host --json=JSON")
    wrong = command("--sizes=2,-1")
    assert wrong.returncode == 2 and wrong.stderr == "error: --sizes: -1.0 is not allowed, give a positive number\n"


@pytest.mark.slow
def test_the_step_benchmark_measures_every_kind(mesh_of):
    sizes = step.Sizes(mesh_of(2), "float32", width=4, new=4, drawn=2, capacity=64, runs=1, steps=1)
    found = step.one_model(sizes, "mlp")
    assert all(found[kind]["median"] > 0 for kind in step.KINDS) and found["alone_ms"]["insert"] > 0


def test_contenders_take_turns():
    order = []

    def contender(name):
        return Contender(lambda state, batch: (order.append(name) or state + batch, None), np.zeros(()), 1.0)

    a, b, c = contenders = [contender(name) for name in "abc"]
    harness.in_turn(contenders, runs=6, steps=1)
    assert "".join(order) == "acbbaccbaabcbcacab"
    assert [len(one.seconds) for one in (a, b, c)] == [6, 6, 6] and a.state == 6
