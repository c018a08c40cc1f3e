"""Bad values of every field that is declared: each is one line that names the field, before anything is made or claimed."""

import math

import jax
import numpy as np
import pytest

from jaxcl import fields as fields_lib
from jaxcl.contrastive import config as contrastive
from jaxcl.contrastive import train as contrastive_train
from jaxcl.errors import UserError
from jaxcl.training import config as training
from jaxcl.training import loop
from tests.unit.test_config import changed

RUNS = {
    "training": (training, loop.train_and_evaluate),
    "contrastive": (contrastive, contrastive_train.train_and_evaluate),
}
HUGE = 10**5000  # larger than any float, and than what Python writes
LONG = "x" * 10**6
# By type: no value of it, whatever the rule says.
NOT_OF = {
    bool: (0, 1, "True", math.nan, ()),
    int: (True, 1.5, "1", math.nan, math.inf, -math.inf, 2**63, -HUGE, (), {"a": 1}, 1j, b"1"),
    float: ("1", math.nan, math.inf, -math.inf, 3.5e38, 1e-39, (), {"a": 1}, 1j, np.ones((3, 3))),
    str: (1, True, math.nan, (), {"a": 1}, b"x", np.ones((30, 30))),
    tuple: (1.5, "x", LONG, math.nan, {"a": 1}, np.ones(3)),
    dict: (3, "x", (1,), math.nan),
}
# By what the rule allows, in its own words: values of the type that are not.
TOO = {
    "a positive number": (0, -1, -(2**62)),
    "a whole number from 1 to 2^31 - 1": (0, -1, 2**31, 2**62),
    "a path, of names of at most 255 bytes": ("a\x00b", "b/" + LONG),
    "0 or more": (-1, -(2**62)),
    "at least 1": (0, -1),
    "a number from 0 to less than 1": (-0.1, 1.0, 2.0, 1e37),
    "a number from 0 to 1": (-0.1, 1.0001, 7.0),
    "a number above 0 and at most 1": (0.0, -0.5, 1.0001),
    "a share above 0 and below 1": (0.0, 1.0, -1.0, 2.0),
    "a number from 1 to 256": (0, -1, 257, 2**40),
    "a number from 1 to 65536": (0, -1, 2**17),
    "a number from 2 to 268435456": (1, 0, -1, 2**40),
    "a whole number from 0 to 2^31 - 1": (-1, 2**31, 2**32, 2**62),
    "a positive number, or the classes of each task, such as ((0, 1), (2, 3))": (
        0,
        -3,
        (),
        ((),),
        ((0, -1),),
        ((0.5,), "a"),
    ),
    "a list of numbers": ((math.nan,), (None,), ("a",), (True,), (HUGE, math.inf)),
    "a list with each item a positive number": ((0.0,), (1.0, -1.0), (math.inf,), ("a",), (None,)),
    "a list with each item 0 or more": ((-1,), (0.0, -0.5), (math.nan,), (math.inf,), ((),)),
    "a list with each item a name, or module:name": ((1,), ("",), (None,), ("a:b:c",)),
}
NAMES = ("", "nonsense", " ", "a:", LONG, "\n\n", "a\x00b")


def bad_values(field):
    """Values of any kind that the field must refuse."""
    of_all = [NOT_OF[kind] for kind in field.kinds]
    values = [x for x in of_all[0] if all(any(x is y for y in others) for others in of_all[1:])]
    if tuple in field.kinds and int in field.kinds:
        values = [1.5, "x", math.nan, True, {"a": 1}]
    values += [] if field.default is None else [None]
    if field.rule is None:
        return values
    allowed = field.rule.allowed
    if allowed.startswith("one of "):
        return [*values, *NAMES]
    if allowed.startswith("a list with each item one of "):
        return [*values, *((name,) for name in NAMES), (1,), (None,)]
    return [*values, *TOO[allowed]]  # a new rule needs a line there


FIELDS = {
    f"{kind}: {name}": (kind, name, bad_values(field))
    for kind, (module, _) in RUNS.items()
    for name, field in fields_lib.flat(module.fields())
}


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    def pass_on(*_, **__):
        pytest.fail("not refused")

    for module in (loop, contrastive_train):
        monkeypatch.setattr(module, "in_sessions", pass_on)


def said(kind, folder, **changes):
    """The line with which a run is refused, whose folder is not made."""
    module, train = RUNS[kind]
    config = changed(module.default_config(), **changes)
    with pytest.raises(UserError) as error:
        train(config, folder, devices=jax.devices()[:1], progress=False)
    line = str(error.value)
    assert line == " ".join(line.split()) and len(line) < 600, line
    assert not folder.exists()
    return line


def test_there_are_enough():
    assert sum(len(values) for _, _, values in FIELDS.values()) > 1500


@pytest.mark.parametrize(("kind", "name", "values"), FIELDS.values(), ids=FIELDS)
def test_a_bad_value_costs_one_line_and_leaves_no_folder(kind, name, values, tmp_path):
    for value in values:
        line = said(kind, tmp_path / "run", **{name.replace(".", "__"): value})
        assert line.startswith(f"{name}: "), (value, line)
