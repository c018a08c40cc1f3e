"""Bad values of every field that is declared: each is one line that names the field, before anything is made or claimed."""

import math
import shutil

import jax
import numpy as np
import pytest

from jaxcl import fields as fields_lib
from jaxcl.contrastive import config as contrastive
from jaxcl.contrastive import train as contrastive_train
from jaxcl.data import open_source
from jaxcl.errors import UserError
from jaxcl.runs import frame
from jaxcl.search.seeds import train_seeds
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
    "a name or a path, of parts of at most 255 bytes": ("a\x00b", "b/" + LONG),
    "0 or more": (-1, -(2**62)),
    "at least 1": (0, -1),
    "a number from 0 to less than 1": (-0.1, 1.0, 2.0, 1e37),
    "a number from 0 to 1": (-0.1, 1.0001, 7.0),
    "a number above 0 and at most 1": (0.0, -0.5, 1.0001),
    "a share above 0 and below 1": (0.0, 1.0, -1.0, 2.0),
    "a number from 1 to 256": (0, -1, 257, 2**40),
    "a number from 0 to 256": (-1, 257, 2**40),
    "a number from 1 to 65536": (0, -1, 2**17),
    "a number from 0 to 1048576": (-1, 2**20 + 1, 2**40),
    "a number from 1 to 1048576": (0, -1, 2**20 + 1, 2**40),
    "a number from 2 to 268435456": (1, 0, -1, 2**40),
    "a whole number from 0 to 2^31 - 1": (-1, 2**31, 2**32, 2**62),
    "a name, or module:name": ("", "a:", "a:b:c", ":"),
    "a number from 0 to 64": (-1, 65, 2**40),
    "a number from 1 to 4096": (0, -1, 4097, 2**40),
    "16 digits 0-9a-f": ("", "abc", "0" * 15, "G" * 16, "A" * 16, "0" * 16 + "\n", LONG),
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
    "a list with each item a pattern and a list of fsdp, model or None": (
        (None,),
        ("ab",),
        (("a",),),
        ((1, ("fsdp",)),),
        (("a(", ("fsdp",)),),
        (("a", "fsdp"),),
        (("a", ("data",)),),
        (("a", (0,)),),
    ),
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


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("os:path", "os:path is no source: "),
        ("os:getcwd", "os:getcwd is no source: "),
        ("json:loads:1", "json:loads is no source: "),
        ("npz:nowhere", "cannot be read: there is no file"),
        ("ptychography:²", "is not allowed, give ptychography:SIDE"),
    ],
)
@pytest.mark.parametrize("kind", RUNS)
def test_a_source_that_is_none(kind, source, words, tmp_path):
    line = said(kind, tmp_path / "run", data__source=source)
    assert line.startswith("data.source: ") and words in line


SIZES = {
    "training": ("batch_size", "eval.batch_size", "buffer.capacity", "epochs", "data.tasks"),
    "contrastive": ("batch_size", "eval.batch_size", "dim", "model.image_width", "model.text_width", "epochs"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in SIZES.items() for name in names])
def test_sizes_without_bound_are_refused_before_anything_is_made(kind, name, tmp_path):
    for value in (2**40, 2**62):
        line = said(kind, tmp_path / "run", **{name.replace(".", "__"): value})
        assert line.startswith(f"{name}: "), line


def test_the_towers_are_counted_with_their_embeddings(tmp_path):
    line = said("contrastive", tmp_path / "run", dim=2**30, model__text_width=2**30)
    assert line.startswith("model: {'dim': 1073741824, "), line


def cut(raw):
    return raw[: len(raw) // 2]


DAMAGE = {
    "a record file, half": ("digits-test.array_record-00000-of-00001", cut),
    "a record file, zeros": ("digits-train.array_record-00000-of-00001", lambda raw: bytes(len(raw))),
    "a record file, gone": ("digits-train.array_record-00000-of-00001", None),
    "its description, half": ("dataset_info.json", cut),
    "its description, empty": ("dataset_info.json", lambda raw: b"{}"),
    "too many rows": ("dataset_info.json", lambda raw: raw.replace(b'"1438"', b'"14380000000000"')),
    "too few rows": ("dataset_info.json", lambda raw: raw.replace(b'"1438"', b'"-3"')),
}


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    open_source("digits", str(folder))
    return folder


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("source", ["digits", "tfds:digits"])
def test_a_damaged_set_costs_one_line(source, name, damage, digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "data")
    path = tmp_path / "data" / "digits" / "1.0.0" / name
    raw = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(raw))
    line = said("training", tmp_path / "run", data__source=source, data__data_dir=str(tmp_path / "data"))
    assert line.startswith("data.source: ")


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, "x"])
def test_a_time_to_wait_that_is_none(seconds, tmp_path):
    with pytest.raises(UserError, match=f"^stall_seconds: .*{seconds}.* is not allowed, give 0 or more"):
        frame.in_sessions([], [], None, None, begin=0.0, stall_seconds=seconds)


@pytest.mark.parametrize("seeds", [[0, 2**31], [2**32], [-1]])
def test_seeds_that_are_none_are_refused_before_the_first_is_trained(seeds, tmp_path):
    folders = {seed: tmp_path / str(seed) for seed in seeds}
    with pytest.raises(UserError, match=r"^seed: -?\d+ is not allowed, give a whole number from 0 to 2\^31 - 1"):
        train_seeds(training.default_config(), folders, together=False)
    assert not any(tmp_path.iterdir())


def test_a_refused_config_leaves_no_folder_also_with_seeds_together(tmp_path):
    config = changed(training.default_config(), data__source="npz:nowhere")
    with pytest.raises(UserError, match=r"data\.source"):
        train_seeds(config, {seed: tmp_path / str(seed) for seed in (0, 1)}, together=True)
    assert not any(tmp_path.iterdir())
