"""Whole runs: the configs of README and docs/configs.md, shrunk; what a run leaves; the commands; mistakes in one line."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxcl
from jaxcl import summaries
from jaxcl.errors import UserError
from jaxcl.training.build import build
from jaxcl.training.loop import train_and_evaluate

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> pathlib.Path:
    """Two little data sets, as files: 10 classes of noise around a class-dependent mean, in MNIST's and CIFAR's shapes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, shape in (("mnist", (28, 28, 1)), ("cifar", (32, 32, 3))):
        arrays = {}
        means = rng.integers(40, 215, (10, *shape))
        for split, n in (("train", 203), ("test", 51)):
            labels = np.arange(n) % 10
            noisy = means[labels] + rng.normal(0, 20, (n, *shape))
            arrays |= {f"x_{split}": noisy.clip(0, 255).astype(np.uint8), f"y_{split}": labels}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def shrunk(module: str, images: pathlib.Path, *arguments: str):
    """A shipped config with less of everything, but every feature it uses still on."""
    config = importlib.import_module(f"configs.{module}").get_config(*arguments)
    config.batch_size, config.epochs, config.log_every, config.eval.batch_size = 16, 2, 2, 24
    config.buffer.capacity, config.buffer.representatives, config.buffer.candidates = 24, 8, 8
    if module == "split_mnist":
        config.data.source = f"npz:{images / 'mnist.npz'}"
        config.model.options.hidden = (16, 16)
    if module == "split_cifar10":
        config.data.source = f"npz:{images / 'cifar.npz'}"
        config.model.options.width = 4
    return config


SHRUNK = [
    *((("split_mnist",), strategy, ()) for strategy in ("from_scratch", "incremental", "er")),
    (("split_cifar10", "cpu"), "er", ()),
    *(
        ((name,), strategy, pytest.mark.exhaustive)
        for name in ("digits",)
        for strategy in ("from_scratch", "incremental", "er")
    ),
    *((("split_cifar10", "cpu"), strategy, pytest.mark.exhaustive) for strategy in ("from_scratch", "incremental")),
    (("split_cifar10", "gpu"), "er", pytest.mark.exhaustive),  # ResNet-18 compiles for two minutes
]


@pytest.mark.parametrize(
    "shipped, strategy", [pytest.param(*one, marks=marks, id="-".join((*one[0], one[1]))) for *one, marks in SHRUNK]
)
def test_a_shrunk_config_runs(shipped, strategy, images, tmp_path, mesh_of):
    config = shrunk(shipped[0], images, *shipped[1:])
    config.strategy = strategy
    result = train_and_evaluate(config, tmp_path, devices=jax.devices()[:4], progress=False)

    run = build(config, jax.devices()[:4])
    rows = [len(task.train) for task in run.scenario.tasks]
    seen = np.cumsum(rows) if strategy == "from_scratch" else rows
    assert result["steps"] == sum(2 * -(-n // 16) for n in seen)
    assert result["images"] == 2 * sum(seen)

    matrix, tests = np.array(result["accuracy_matrix"]), [len(task.test) for task in run.scenario.tasks]
    assert matrix.shape == (5, 5)
    # Exact counts over each task's own test rows: every entry is a whole number of rows.
    np.testing.assert_allclose(matrix * tests, np.round(matrix * tests), atol=1e-6)
    assert result["average_accuracy"] == pytest.approx(np.mean(matrix[-1]))
    assert result["forgetting"] == summaries.summarize(matrix)["forgetting"]
    assert result["average_top5"] >= result["average_accuracy"]
    assert {"load", "train", "evaluate", "compile"} <= set(result["seconds_by_phase"])
    assert sum(result["seconds_by_phase"].values()) == pytest.approx(result["seconds"])
    assert result["devices"]["count"] == 4 and result["versions"]["jax"] == jax.__version__

    if strategy == "er":
        assert result["buffer"]["rows"] == 24 and sum(result["buffer"]["class_histogram"]) == 24
        assert max(result["buffer"]["class_histogram"]) == 3  # 24 rows over 10 classes
        row = np.prod(run.train.image_shape) + 8
        assert result["buffer"]["bytes"] == pytest.approx(24 * row, abs=4 * (2 * 10 + 2) * 4)
    else:
        assert result["buffer"] is None

    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert json.loads((tmp_path / "config.json").read_text()) == {"jaxcl": jaxcl.__version__, **result["config"]}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["accuracy"] for line in evaluations] == result["accuracy_matrix"]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == result["steps"]
    assert all(np.isfinite(line["loss"]) for line in lines if line["kind"] == "train")
    assert list(tmp_path.glob("events.out.*"))


def test_a_run_repeats_itself_exactly_and_is_not_run_twice(images, tmp_path):
    """Same config and seed: the same matrix; another seed: another; a finished workdir is returned as it is."""
    config = shrunk("digits", images)
    one = train_and_evaluate(config, tmp_path / "a", devices=jax.devices()[:2], progress=False)
    two = train_and_evaluate(config, tmp_path / "b", devices=jax.devices()[:2], progress=False)
    assert one["accuracy_matrix"] == two["accuracy_matrix"]
    stamp = (tmp_path / "a" / "result.json").stat().st_mtime_ns
    assert train_and_evaluate(config, tmp_path / "a", devices=jax.devices()[:2], progress=False) == one
    assert (tmp_path / "a" / "result.json").stat().st_mtime_ns == stamp
    config.seed = 1
    three = train_and_evaluate(config, tmp_path / "c", devices=jax.devices()[:2], progress=False)
    assert three["accuracy_matrix"] != one["accuracy_matrix"]
    with pytest.raises(UserError, match=r"another config's run \(config.seed is 0 there, 1 here\)"):
        train_and_evaluate(config, tmp_path / "a", devices=jax.devices()[:2], progress=False)


@pytest.mark.slow
def test_rehearsal_closes_the_gap(tmp_path):
    """The digits config as it ships on 8 devices: rehearsal is far nearer to from-scratch than to incremental. Accuracies are
    those of README's table, but for rounding, which turns a few of the 359 test rows."""
    accuracy = {}
    for strategy in ("from_scratch", "incremental", "er"):
        config = importlib.import_module("configs.digits").get_config()
        config.strategy = strategy
        result = train_and_evaluate(config, tmp_path / strategy, devices=jax.devices()[:8], progress=False)
        accuracy[strategy] = result["average_accuracy"]
    assert accuracy["er"] - accuracy["incremental"] > 4 * (accuracy["from_scratch"] - accuracy["er"])
    shown = dict(re.findall(r"^(from_scratch|incremental|er) +1 +([\d.]+)", (REPO / "README.md").read_text(), re.M))
    assert {name: float(x) for name, x in shown.items()} == pytest.approx(
        {name: 100 * x for name, x in accuracy.items()}, abs=1.5
    )


def command(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """An entry point as a user calls it: in a process of its own, without what conftest sets for tests."""
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"}
    line = [sys.executable, "-m", f"experiments.{name}", *arguments]
    return subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_compare_and_report_commands(tmp_path):
    done = command(
        "compare",
        "--config=configs/digits.py",
        f"--workdir={tmp_path / 'runs'}",
        "--strategies=incremental,er",
        "--seeds=2",
        "--devices=8",
        "--config.epochs=1",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / "er" / "seed_1" / "result.json").read_text())
    shape = {"data": 8, "fsdp": 1, "model": 1}
    assert result["devices"] == {"count": 8, "kind": "cpu", "platform": "cpu", "processes": 1, "mesh": shape}
    assert result["config"]["epochs"] == 1 and result["seed"] == 1
    table = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in table if line and line[0] in ("incremental", "er")] == [
        ["incremental", "2"],
        ["er", "2"],
    ]
    assert (tmp_path / "runs" / "accuracy_by_task.png").stat().st_size > 10_000

    done = command("report", str(tmp_path / "runs"), f"--out={tmp_path / 'page'}")
    assert done.returncode == 0, done.stderr
    assert "data:image/png;base64" in (tmp_path / "page" / "report.html").read_text()


BAD = {  # overrides of the digits config on 4 devices -> what the one line must say
    "strategy": ({"strategy": "ewk"}, ("strategy", "ewk", "er")),
    "policy": ({"buffer.policy": "lru"}, ("buffer.policy", "lru", "reservoir")),
    "capacity below devices": ({"buffer.capacity": 3, "buffer.policy": "reservoir"}, ("buffer.capacity", "3", "32")),
    "capacity below classes": ({"buffer.capacity": 9, "buffer.representatives": 8}, ("buffer.capacity", "9", "10")),
    "batch": ({"batch_size": 30}, ("batch_size", "30", "4")),
    "evaluation batch": ({"eval.batch_size": 30}, ("eval.batch_size", "30", "4")),
    "representatives": ({"buffer.representatives": 30}, ("buffer.representatives", "30", "4")),
    "candidates": ({"buffer.candidates": 64}, ("buffer.candidates", "64", "32")),
    "tasks": ({"data.tasks": 11}, ("tasks", "11", "10")),
    "epochs": ({"epochs": 0}, ("epochs", "0", "positive")),
    "learning rate": ({"optimizer.learning_rate": -0.1}, ("learning_rate", "-0.1")),
    "optimizer": ({"optimizer.name": "lion"}, ("optimizer.name", "lion", "adamw")),
    "schedule": ({"optimizer.schedule": "linear"}, ("optimizer.schedule", "linear", "cosine")),
    "decay": ({"optimizer.schedule": "steps"}, ("optimizer.decay_epochs",)),
    "warmup": ({"optimizer.warmup_epochs": 10.0}, ("optimizer.warmup_epochs", "10")),
    "model": ({"model.name": "vgg"}, ("model", "vgg", "resnet18")),
    "model option": ({"model.options": {"widht": 3}}, ("mlp", "widht", "hidden")),
    "dtype": ({"model.dtype": "float8"}, ("dtype", "float8", "bfloat16")),
    "augmentation": ({"data.augment": ("spin",)}, ("augment", "spin", "flip")),
    "source": ({"data.source": "digit"}, ("digit", "digits")),
    "file": ({"data.source": "npz:nowhere.npz"}, ("nowhere.npz",)),
    "not prepared": ({"data.source": "tfds:mnist", "data.data_dir": "nowhere"}, ("tfds:mnist", "nowhere")),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_mistakes_cost_one_line(change, words, images):
    """Nothing is compiled: the error comes from `build`, which only puts the parts together."""
    config = importlib.import_module("configs.digits").get_config()
    with config.unlocked():
        for field, value in change.items():
            *path, name = field.split(".")
            group = config
            for part in path:
                group = group[part]
            group[name] = value
    with pytest.raises(UserError) as error:
        build(config, jax.devices()[:4])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_unknown_and_missing_fields(images):
    config = importlib.import_module("configs.digits").get_config()
    with config.unlocked():
        config.buffer.capcity = 3
    with pytest.raises(UserError, match=r"^buffer.capcity: no such field; did you mean capacity\?"):
        build(config, jax.devices()[:1])
    with config.unlocked():
        del config.buffer["capcity"]
        del config.optimizer["momentum"]
    with pytest.raises(UserError, match=r"^optimizer.momentum: missing"):
        build(config, jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/digits.py"], ("--workdir", "missing")),
        (["--config=configs/nowhere.py"], ("configs/nowhere.py",)),
        (["--config=configs/digits.py", "--config.bufer.capacity=3"], ("bufer", "buffer")),
        (["--config=configs/digits.py", "--config.buffer.capacity=many"], ("capacity", "many")),
        (["--config=configs/digits.py", "--workdir=x", "--devices=0"], ("devices", "0")),
        (["--config=configs/digits.py", "--workdir=x", "er"], ("'er'",)),
    ],
    ids=str,
)
def test_the_command_line_answers_in_one_line(arguments, words):
    done = command("train", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)
