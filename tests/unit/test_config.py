"""The fields of a config: what is refused and in which words, what stands in the page, what cannot be held in memory."""

import math

import jax
import pytest

from configs import digits
from experiments.pages import config as config_page
from experiments.pages import page
from jaxcl import check as rules
from jaxcl import fields as fields_lib
from jaxcl import mesh as mesh_lib
from jaxcl import shipped
from jaxcl.contrastive import config as contrastive
from jaxcl.contrastive.train import build as build_pairs
from jaxcl.errors import UserError
from jaxcl.fields import Field
from jaxcl.training import config as training
from jaxcl.training import sizes
from jaxcl.training.build import build

KINDS = {"training": training, "contrastive": contrastive}
EVERY = [(kind, name, field) for kind, module in KINDS.items() for name, field in fields_lib.flat(module.fields())]


def changed(config, **changes):
    """`config` with other values, of any type; __ for the dots of a field."""
    with config.unlocked(), config.ignore_type():
        for field, value in changes.items():
            *path, name = field.split("__")
            group = config
            for part in path:
                group = group[part]
            group[name] = value
    return config


def refusal(kind, devices=1, **changes):
    module = KINDS[kind]
    with pytest.raises(UserError) as error:
        module.check_config(changed(module.default_config(), **changes), devices)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_are_allowed_and_of_their_types(kind):
    config = KINDS[kind].default_config()
    KINDS[kind].check_config(config, 8)
    for name, field in fields_lib.flat(KINDS[kind].fields()):
        group, last = config, name.split(".")[-1]
        for part in name.split(".")[:-1]:
            group = group[part]
        if field.kinds[0] is not dict:
            assert group[last] == field.default and group.get_type(last) is field.kinds[0], name
        assert field.meaning, name


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_refused_where_a_field_is_not_optional(kind):
    for other, name, field in EVERY:
        if other != kind:
            continue
        if field.default is None:
            KINDS[kind].check_config(changed(KINDS[kind].default_config(), **{name.replace(".", "__"): None}), 1)
        else:
            said = refusal(kind, **{name.replace(".", "__"): None})
            assert said.startswith(f"{name}: None is not allowed, give "), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_must_be_finite(kind, bad):
    for other, name, field in EVERY:
        if other == kind and set(field.kinds) & {int, float}:
            said = refusal(kind, **{name.replace(".", "__"): bad})
            assert said.startswith(f"{name}: {bad} is not allowed, give "), name


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_another_type_are_refused(kind):
    for other, name, field in EVERY:
        if other != kind:
            continue
        wrong = 3 if set(field.kinds) & {str, tuple, dict, bool} - {int} and int not in field.kinds else "x"
        assert refusal(kind, **{name.replace(".", "__"): wrong}).startswith(f"{name}: {wrong!r} is not allowed"), name
        if int in field.kinds:
            assert "True is not allowed" in refusal(kind, **{name.replace(".", "__"): True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__decay_epochs": ("a",), "optimizer__decay_factors": (1.0,)}, "optimizer.decay_epochs: ('a',)"),
        ({"optimizer__decay_epochs": (1, 0), "optimizer__decay_factors": (1.0, 0.1)}, "give epochs that ascend"),
        ({"optimizer__decay_epochs": (1,), "optimizer__decay_factors": (math.nan,)}, "optimizer.decay_factors: (nan,)"),
        ({"optimizer__decay_epochs": (1,)}, "optimizer.decay_factors: () is not allowed, give one for each of the 1"),
        ({"data__std": (0.1, "b")}, "data.std: (0.1, 'b') is not allowed, give a list with each item a positive"),
        ({"data__std": (0.0,)}, "data.std: (0.0,)"),
        ({"data__mean": (None,)}, "data.mean: (None,) is not allowed, give a list of numbers"),
        ({"data__mean": (math.inf,)}, "data.mean: (inf,)"),
        (
            {"data__augment": (3,)},
            "data.augment: (3,) is not allowed, give a list with each item one of crop, flip, or module:name",
        ),
        ({"eval__metrics": ("a:b:c",)}, "eval.metrics: ('a:b:c',)"),
        ({"finetune__frozen": (None,)}, "finetune.frozen: (None,)"),
        ({"data__tasks": 0}, "data.tasks: 0 is not allowed, give a positive number, or the classes of each task"),
        ({"data__tasks": ()}, "data.tasks: ()"),
        ({"data__tasks": ((0, 1), ())}, "data.tasks: ((0, 1), ())"),
        ({"data__tasks": ((0, "a"),)}, "data.tasks: ((0, 'a'),)"),
        ({"data__tasks": (0, 1)}, "data.tasks: (0, 1)"),
        ({"data__tasks": 2.5}, "data.tasks: 2.5 is not allowed"),
        ({"seed": -1}, "seed: -1 is not allowed, give a whole number from 0 to 2^31 - 1"),
        ({"seed": 2**31}, "seed: 2147483648 is not allowed"),
        ({"optimizer__momentum": 2.0}, "optimizer.momentum: 2.0 is not allowed, give a number from 0 to less than 1"),
        ({"optimizer__clip_norm": 0.0}, "optimizer.clip_norm: 0.0 is not allowed, give a positive number"),
        ({"optimizer__clip_norm": -1.0}, "optimizer.clip_norm: -1.0"),
        ({"buffer__selection__ways": 1000}, "buffer.selection.ways: 1000 is not allowed, give at most buffer.capacity"),
        ({"buffer__representatives": 201}, "buffer.representatives: 201 is not allowed, give at most buffer.capacity"),
        ({"batch_size": 10**30}, "batch_size: 10000"),
        ({"data__threads": 10**6}, "data.threads: 1000000 is not allowed, give a number from 1 to 256"),
        ({"strategy": "ewk"}, "strategy: 'ewk' is not allowed, give one of agem, "),
        ({"strategy": "module:"}, "strategy: 'module:'"),
        ({"strategies__mir": 3}, "strategies.mir: 3 is not allowed, give a group of fields"),
        ({"strategies__er": {"a": 1}}, "strategies.er: no such field; did you mean uer?"),
        ({"data__scenario": "scattered"}, "data.scenario: 'scattered' is not allowed, give one of blurry, domain, "),
        ({"data__scattered": 1.5}, "data.scattered: 1.5 is not allowed, give a number from 0 to 1"),
        ({"buffer__policy": "lru"}, "buffer.policy: 'lru' is not allowed, give one of "),
        ({"optimizer__warmup_epochs": 1.0}, "optimizer.warmup_epochs: 1.0 is not allowed, give less than epochs = 1"),
    ],
)
def test_what_is_said(changes, message):
    assert message in refusal("training", **changes)


def test_what_is_allowed():
    for changes in (
        {"seed": 2**31 - 1},
        {"data__tasks": [[0, 1], (2,)]},
        {"optimizer__momentum": 0},  # a whole number where the default is none
        {"data__mean": [0.5], "data__std": [1]},
        {"data__augment": ("some.module:cutout",)},
        {"buffer__representatives": 400, "buffer__memory": "independent"},
        {"model__options": {"anything": (1, 2)}},
    ):
        training.check_config(changed(training.default_config(), **changes), 2)


def test_names_come_from_a_registry_or_from_outside():
    rule = rules.found_in({"a": 1, "b": 2})
    assert [rule.ok(x) for x in ("a", "c", "m.n:c", "m:", ":c", "a:b:c", 3, None)] == [
        *(True, False, True),
        *(False,) * 5,
    ]
    assert rule.allowed == "one of a, b, or module:name"


def test_options_of_a_strategy_from_outside_stand_under_its_short_name(monkeypatch):
    def mine(strength: float = 1.0) -> None:
        """Stands in for a strategy of another package."""

    monkeypatch.setitem(training.STRATEGIES._found, "m:mine", mine)
    made = []
    strategy = training.make_strategy("incremental")._replace(check=made.append)
    monkeypatch.setattr(training, "make_strategy", lambda name, options: made.append((name, dict(options))) or strategy)
    config = changed(training.default_config(), strategy="m:mine", strategies__mine={"strength": 2.0})
    training.check_config(config, 1)
    assert made == [("m:mine", {"strength": 2.0}), config]  # and its own check was called
    for options, message in (
        ({"strength": "a"}, "strategies.mine.strength: 'a' is not allowed, give a number"),
        ({"strenth": 1.0}, "strategies.mine.strenth: no such field; did you mean strength?"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            training.check_config(changed(config, strategies__mine=options), 1)


def test_the_page_is_what_is_declared():
    text = config_page.PATH.read_text()
    assert page.filled(text, config_page.tables()) == text, "run python -m experiments.pages.config"
    for _, name, _ in EVERY:
        assert f"| `{name}` |" in text


def test_a_page_of_text_is_as_wide_as_the_terminal():
    text = fields_lib.text({"a": {"b": Field(1, "word " * 40, rules.POSITIVE)}, "c": Field(None, "x", kind=str)}, 60)
    lines = text.splitlines()
    assert lines[0] == "--config.a.b=1" and lines[-1] == "    x (str or None)" and "--config.c=None" in lines
    assert len(lines) > 5 and max(map(len, lines)) <= 60 and "positive number)" in " ".join(text.split())


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("batch_size", {"batch_size": 4 * 10**12}),
        ("eval.batch_size", {"eval__batch_size": 4 * 10**12}),
        ("model.options", {"model__options": {"hidden": (10**6, 10**6)}}),
        ("buffer.capacity", {"buffer__capacity": 4 * 10**12}),
        ("buffer.capacity", {"buffer__capacity": 10**12, "buffer__memory": "replicated"}),
        ("buffer.representatives", {"buffer__representatives": 10**11, "buffer__memory": "independent"}),
        ("data.tasks", {"data__tasks": 10**9, "data__scenario": "permuted"}),
        ("data.tasks", {"data__tasks": 10**6, "data__scenario": "rotated"}),
    ],
)
def test_what_cannot_be_held_is_refused_before_it_is_made(field, changes, monkeypatch):
    monkeypatch.setattr(sizes, "free_memory", lambda: 2**34)
    with pytest.raises(
        UserError, match=rf"^{field}: .* is not allowed, give less: .* GB are needed and .* GB are free"
    ):
        build(changed(digits.get_config(), **changes), jax.devices()[:4])


def test_what_is_held_is_counted_for_each_device(monkeypatch):
    """Of a memory of 4 MB the devices hold a part each, or a copy each."""
    for memory, capacity, fits in (("sharded", 4000, True), ("replicated", 4000, False), ("sharded", 40000, False)):
        monkeypatch.setattr(sizes, "free_memory", lambda: 5 * 10**6)
        config = changed(digits.get_config(), buffer__memory=memory, buffer__capacity=capacity)
        record = {"image": jax.ShapeDtypeStruct((1000,), "uint8")}
        options = {"record": record, "capacity": capacity, "draws": 1}
        mesh = mesh_lib.make_mesh(jax.devices()[:4])
        if fits:
            sizes.check_sizes(config, mesh, lambda key: (), (1,), **options)
        else:
            with pytest.raises(UserError, match=r"buffer.capacity: .* on each device"):
                sizes.check_sizes(config, mesh, lambda key: (), (1,), **options)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("batch_size", {"batch_size": 4 * 10**12}),
        ("bank.capacity", {"negatives": "fifo", "bank__capacity": 4 * 10**12}),
        ("model", {"model__image_width": 10**9}),
    ],
)
def test_contrastive_sizes_too(field, changes, monkeypatch):
    monkeypatch.setattr(sizes, "free_memory", lambda: 2**34)
    with pytest.raises(UserError, match=rf"^{field}: .* is not allowed, give less: "):
        build_pairs(changed(contrastive.default_config(), **changes), jax.devices()[:4])


@pytest.mark.parametrize("name", shipped.names())
def test_every_config_that_ships_is_allowed(name):
    config = shipped.load(name).get_config()
    KINDS["contrastive" if "negatives" in config else "training"].check_config(config, devices=1)
