"""The tool that breaks files: what it changes, that every mutant is a program, and which of them a test notices."""

import ast
import pathlib
import subprocess

import pytest

from jaxcl import losses
from tests.mutate import measure, mutants, select

SOURCE = '''"""A module: 1 + 1."""


def größe(x: int = 3, y: "1 < 2" = -1) -> float:
    """Not 5."""
    if not x < 2 and y == 0:
        raise ValueError(1 + 2)
    return f(x * 2, scale=True, shift=y)


def f(x, scale=False, shift=0):
    return f"{x:3}" if scale is None else x  # 7
'''


def test_what_is_changed():
    found = [(one.line, one.before, one.after) for one in mutants(SOURCE)]
    assert sorted(found) == sorted(
        [
            *((4, "3", "4"), (4, "-1", "1"), (4, "1", "2")),
            (6, "not x < 2 and y == 0", "not x < 2 or y == 0"),
            *((6, "not x < 2", "x < 2"), (6, "x < 2", "x <= 2"), (6, "2", "3"), (6, "y == 0", "y != 0"), (6, "0", "1")),
            *((8, "x * 2", "x + 2"), (8, "2", "3"), (8, "True", "False")),
            (8, "f(x * 2, scale=True, shift=y)", "f(x * 2, shift=y)"),
            (8, "f(x * 2, scale=True, shift=y)", "f(x * 2, scale=True)"),
            *((11, "False", "True"), (11, "0", "1"), (12, "scale is None", "scale is not None")),
        ]
    )


@pytest.mark.parametrize("source", [SOURCE, pathlib.Path(losses.__file__).read_text()], ids=["small", "losses"])
def test_every_mutant_is_another_program(source):
    whole = ast.dump(ast.parse(source))
    found = [ast.dump(ast.parse(one.source)) for one in mutants(source)]
    assert len(found) > 10 and whole not in found


def test_some_of_them():
    found = mutants(SOURCE)
    assert {one.line for one in select(found, "6-8", None)} == {6, 8}
    assert {one.line for one in select(found, "4", None)} == {4}
    few = select(found, None, 5)
    assert len(few) == 5 and few == select(found, None, 5) and set(few) <= set(found)


@pytest.mark.slow
def test_those_that_no_test_notices_survive(tmp_path):
    """Of a small project: a bound that no test reaches survives, a change of the sum does not, nor one that hangs or breaks."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "small.py").write_text("def add(x, y):\n    return x + y if x < 100 else 0\n")
    (root / "test_small.py").write_text("from small import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    found = mutants((root / "small.py").read_text())
    result = measure(root, "small.py", found, ["test_small.py"])
    assert [one["after"] for one in result["killed"]] == ["x - y"]
    assert [one["after"] for one in result["survived"]] == ["x <= 100", "101", "1"]
    assert result["killed_share"] == 0.25 and result["survived"][0]["line"] == 2
    assert (root / "small.py").read_text().count("x + y if x < 100 else 0") == 1  # the project itself is as it was
    (root / "test_small.py").write_text("def test_wrong():\n    assert False\n")
    with pytest.raises(ValueError, match="ends with 1 without any change"):
        measure(root, "small.py", found, ["test_small.py"])
