"""Strategies by their names: documented, with defaults, from outside, and every mistake one clear line."""

import ast
import itertools
import pathlib
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.strategies import STRATEGIES, Strategy, make_strategy
from jaxcl.training.config import default_config
from tests.rig import SHAPE, K

OLD, SEEN = np.arange(K) < 2, np.arange(K) < 4  # in task 1 of three


def test_rows_of_a_task():
    from jaxcl.data import class_incremental

    labels = np.arange(12) % 6
    scenario = class_incremental(labels, labels, 6, 3)
    rows = {name: [sorted(make_strategy(name).rows(scenario, t)) for t in range(3)] for name in STRATEGIES}
    alone = [sorted(task.train) for task in scenario.tasks]
    assert rows["from_scratch"] == [sorted(x) for x in itertools.accumulate(alone)]
    assert rows["joint"] == [list(range(12)), [], []]
    assert all(found == alone for name, found in rows.items() if name not in ("from_scratch", "joint"))


def test_the_example_of_the_documentation_is_the_file():
    root = pathlib.Path(__file__).resolve().parents[2]
    (example,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "strategies.md").read_text(), re.DOTALL)
    tree = ast.parse((root / "jaxcl" / "strategies" / "der.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    assert ast.dump(ast.parse(example)) == ast.dump(tree)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_documented_with_its_options(name):
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "strategies.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    assert re.findall(r"`(\w+)`", row.split("|")[4]) == list(STRATEGIES.options(name))


@pytest.mark.parametrize("name", STRATEGIES)
def test_defaults_make_a_strategy(name):
    assert isinstance(make_strategy(name, STRATEGIES.options(name)), Strategy)


def test_mistakes():
    for name, options, message in (
        ("err", {}, "strategy: 'err' is unknown, did you mean er?"),
        ("plain", {}, "strategy: 'plain' is unknown, choose one of "),
        ("der", {"beta": 1.0}, "strategy: der has no option 'beta'; choose one of alpha"),
        ("er", {"alpha": 1.0}, "strategy: er has no option 'alpha'; it has none"),
        ("mir", {"replayed": 0}, "strategies.mir.replayed: 0 is not allowed, give a positive number"),
        ("bic", {"held_out": 1.0}, "strategies.bic.held_out: 1.0 is not allowed, give a share between 0 and 1"),
        ("uer", {"gamma": 0.0}, "strategies.uer.gamma: 0.0 is not allowed, give a positive number"),
        ("gdumb", {"epochs": 0}, "strategies.gdumb.epochs: 0 is not allowed, give a positive number"),
    ):
        with pytest.raises(UserError) as info:
            make_strategy(name, options)
        assert str(info.value).startswith(message)


def test_mir_cannot_replay_more_rows_than_a_step_draws():
    config = ConfigDict({"buffer": {"representatives": 64}})
    make_strategy("mir", {"replayed": 64}).check(config)
    with pytest.raises(UserError) as info:
        make_strategy("mir", {"replayed": 99}).check(config)
    assert str(info.value) == ("strategies.mir.replayed: 99 is not allowed, give at most buffer.representatives = 64")


def test_dytox_mixes_no_labels_of_two_heads():
    config = default_config()
    config.data.loss_classes = "task"
    make_strategy("dytox").check(config)
    with pytest.raises(
        UserError, match=r"^strategies.dytox.mixup: 0.8 is not allowed, give 0 with data.loss_classes = task"
    ):
        make_strategy("dytox", {"mixup": 0.8}).check(config)


def test_a_strategy_from_outside(tmp_path, monkeypatch):
    (tmp_path / "outside_strategy.py").write_text(
        "from jaxcl.strategies import Strategy\n\n\ndef twice(draws: int = 2) -> Strategy:\n    return Strategy(draws=draws)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert make_strategy("outside_strategy:twice").draws == 2
    assert make_strategy("outside_strategy:twice", {"draws": 3}).draws == 3
    assert STRATEGIES.options("outside_strategy:twice") == {"draws": 2}
    with pytest.raises(UserError, match="strategy: 'outside_strategy:thrice' cannot be imported"):
        make_strategy("outside_strategy:thrice")


def test_a_record_of_outputs_that_are_not_there_is_one_clear_line():
    forgotten = make_strategy("der")._replace(stores_outputs=False)
    with pytest.raises(UserError, match=r"reads the model's output 'logits'; .* set stores_outputs=True"):
        forgotten.stored(np.zeros((2, *SHAPE), np.uint8), {}, {})
