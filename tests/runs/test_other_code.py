"""What a run says of the code that made it, and what becomes of one whose code has changed since."""

import importlib
import json
import logging
import subprocess
import sys

import jax
import pytest

import jaxcl
from jaxcl.errors import Preempted, UserError
from jaxcl.runs import code
from jaxcl.training.loop import train_and_evaluate
from tests import whole

STRATEGY = """
from {name}_part import weight
from jaxcl.strategies import Strategy


def mine():
    return Strategy()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module of a user's, which imports another one."""
    name = f"code_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(STRATEGY.format(name=name))
    (tmp_path / f"{name}_part.py").write_text("def weight():\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for one in (name, f"{name}_part"):
        sys.modules.pop(one, None)


def change(tmp_path, module):
    """Edits the module that the user's strategy imports; as if by another process, both are loaded anew."""
    (tmp_path / f"{module}_part.py").write_text("def weight():\n    return 0.5  # other\n")
    for name in (f"{module}_part", module):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def train(folder, strategy, **more):
    changes = {name: more.pop(name) for name in list(more) if "__" in name}
    config = whole.small(data__tasks=2, **changes)
    config.strategy = strategy
    return train_and_evaluate(config, folder, devices=jax.devices()[:1], progress=False, **more)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "jaxcl")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "jaxcl"]


def test_a_result_names_version_digest_and_modules(module, tmp_path, said):
    result = train(tmp_path / "run", f"{module}:mine")
    assert result["versions"]["jaxcl"] == result["code"]["jaxcl"] == jaxcl.__version__
    assert result["code"]["digest"] == code.own_digest() and len(code.own_digest()) == 16
    assert set(result["code"]["modules"]) == {module, f"{module}_part"} and "earlier_code" not in result
    assert train(tmp_path / "run", f"{module}:mine") == result and not said()
    assert train(tmp_path / "built in", "incremental")["code"]["modules"] == {}


def test_a_finished_run_of_other_modules_is_refused_unless_it_is_asked_for(module, tmp_path, said):
    result = train(tmp_path / "run", f"{module}:mine")
    before = (tmp_path / "run" / "result.json").read_bytes()
    change(tmp_path, module)
    wanted = rf"workdir: .* was trained with other code \({module}_part is \w+ there, \w+ here\); train anew with --overwrite"
    with pytest.raises(UserError, match=wanted):
        train(tmp_path / "run", f"{module}:mine")
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    again = train(tmp_path / "run", f"{module}:mine", checkpoint__accept_other_code=True)
    assert again == result and [f"{module}_part is" in line for line in said()] == [True]
    anew = train(tmp_path / "run", f"{module}:mine", overwrite=True)
    assert anew["code"] != result["code"] and anew["accuracy_matrix"] == result["accuracy_matrix"]


def test_an_unfinished_run_likewise_and_its_result_tells_of_both(module, tmp_path, said, monkeypatch):
    whole.stop_at(monkeypatch, [20])
    with pytest.raises(Preempted):
        train(tmp_path / "run", f"{module}:mine")
    first = code.code_of(whole.small(strategy=f"{module}:mine"))
    change(tmp_path, module)
    with pytest.raises(UserError, match="was begun with other code"):
        train(tmp_path / "run", f"{module}:mine")
    result = train(tmp_path / "run", f"{module}:mine", checkpoint__accept_other_code=True)
    assert result["earlier_code"] == [first] and result["code"]["modules"] != first["modules"]
    assert any("continued by this" in line for line in said())


def test_other_source_of_jaxcl_is_said_in_one_line(tmp_path, said, monkeypatch):
    """Versions say what a run may not be continued with: of the same one a finished run is returned, not silently."""
    result = train(tmp_path / "run", "incremental")
    monkeypatch.setattr(code, "own_digest", lambda: "0" * 16)
    assert train(tmp_path / "run", "incremental") == result
    (line,) = said()
    there = (
        f"jaxcl {jaxcl.__version__} of source {result['code']['digest']} there, {jaxcl.__version__} of {'0' * 16} here"
    )
    assert line == f"{tmp_path}/run: made by other code ({there}); returned as it is; --overwrite trains anew"


def test_the_digest_is_of_the_source_alone(tmp_path, monkeypatch):
    """The same in another folder; another for another line, or another name."""
    for folder in ("one", "two"):
        (tmp_path / folder / "configs").mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    (tmp_path / "two" / "configs" / "mine.py").write_text("")
    (tmp_path / "two" / "notes.txt").write_text("")
    found = []
    for folder, edit in (("one", None), ("two", None), ("two", "x = 2\n")):
        if edit:
            (tmp_path / folder / "a.py").write_text(edit)
        monkeypatch.setattr(code, "_PACKAGE", tmp_path / folder)
        found.append(code.own_digest.__wrapped__())
    assert found[0] == found[1] != found[2]


def test_a_strategy_of_a_script_is_told_by_its_text(tmp_path):
    """Registered by a program of one's own, of which the function alone counts."""
    program = """
import json, sys
from jaxcl.runs import code
from jaxcl.strategies import STRATEGIES, Strategy
from jaxcl.training.config import default_config

@STRATEGIES.register
def of_a_script():
    return Strategy()

config = default_config()
config.strategy = "of_a_script"
print(json.dumps(code.code_of(config)["modules"]))
"""
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, env={"PYTHONPATH": str(whole.REPO)}
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["__main__:of_a_script"]
