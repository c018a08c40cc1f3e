"""What a run has trained, loaded from its folder: it answers as it was evaluated, wherever its weights come from."""

import functools
import json
import logging
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export
from PIL import Image
from safetensors.numpy import load_file

import jaxcl
from jaxcl.data import open_source
from jaxcl.errors import Preempted, UserError
from jaxcl.mesh import AXIS, make_mesh
from jaxcl.models import make_model
from jaxcl.strategies import Strategy
from jaxcl.training.state import Weights
from jaxcl.training.trained import Trained
from tests import whole

STRATEGIES = ("er", "icarl", "bic")
# What exported programs need: neither jaxcl nor the network's code.
ELSEWHERE = """
import sys, jax, numpy as np
from jax import export
program = export.deserialize(open(sys.argv[1], "rb").read())
np.save(sys.argv[3], program.call(np.load(sys.argv[2])))
assert not {"jaxcl", "flax"} & set(sys.modules)
"""


def train(folder, strategy, **changes):
    config = whole.small(data__tasks=2, data__mean=(0.3,), data__std=(0.4,), **changes)
    config.strategy = strategy
    return jaxcl.train_and_evaluate(config, folder, devices=jax.devices()[:2], progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`finished(strategy)`: result and folder of a run."""
    root = tmp_path_factory.mktemp("trained")
    return functools.cache(lambda strategy: (train(root / strategy, strategy), root / strategy))


@pytest.fixture(scope="module")
def test_rows():
    test = open_source("digits")[1]
    return test.read(np.arange(len(test))), test.labels


# With scores of their own, or weights that end otherwise than a step leaves them; and er.
OWN = "bic", "dytox", "er", "icarl", "ranpac", "slca", "wa"


@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=() if s in OWN else pytest.mark.exhaustive) for s in STRATEGIES]
)
def test_it_answers_as_it_was_evaluated(strategy, finished, test_rows):
    """By the strategy's own scores, on normalised images, on any number of devices."""
    result, folder = finished(strategy)
    images, labels = test_rows
    found = {}
    for devices in (1, 4):
        model = jaxcl.load(folder, devices=jax.devices()[:devices])
        found[devices] = model.predict(images)
        right = found[devices].argmax(axis=1) == labels
        accuracy = [right[np.isin(labels, classes)].mean() for classes in result["tasks"]]
        np.testing.assert_allclose(accuracy, result["accuracy_matrix"][-1], rtol=1e-12)
    np.testing.assert_allclose(found[1], found[4], atol=1e-6)
    np.testing.assert_allclose(found[1].sum(axis=1), 1, rtol=1e-5)
    assert found[1].dtype == np.float32 and model.class_names == tuple(result["class_names"]) == tuple("0123456789")
    assert repr(model) == f"Trained(mlp by {strategy}, 10 classes, images 8x8x1, step {result['steps']})"
    assert model.features(images[:5]).shape == (5, 16)
    np.testing.assert_array_equal(model.predict(images[:3, ..., 0]), model.predict(images[:3]))
    assert model.predict(images[:0]).shape == (0, 10)


def test_where_an_average_is_evaluated_it_is_loaded(tmp_path, test_rows):
    """From the file, and from the checkpoint, which has both."""
    result = train(tmp_path, "er", optimizer__average=0.9)
    images, labels = test_rows
    for _ in range(2):
        right = jaxcl.load(tmp_path).predict(images).argmax(axis=1) == labels
        accuracy = [right[np.isin(labels, classes)].mean() for classes in result["tasks"]]
        np.testing.assert_allclose(accuracy, result["accuracy_matrix"][-1], rtol=1e-12)
        (tmp_path / "weights.safetensors").unlink(missing_ok=True)


def test_the_file_of_weights_is_plain_safetensors_of_the_last_state(finished):
    _, folder = finished("icarl")
    tensors, (_, arrays) = load_file(folder / "weights.safetensors"), whole.last(folder)
    assert {name.partition(".")[0] for name in tensors} == {"params", "strategy_state", "task"}
    for name, x in tensors.items():
        np.testing.assert_array_equal(x, arrays[name])


def test_without_the_file_the_newest_checkpoint_is_taken_which_is_said(finished, test_rows, caplog):
    _, folder = finished("bic")
    want = jaxcl.load(folder).predict(test_rows[0])
    content = (folder / "weights.safetensors").read_bytes()
    try:
        for damaged in (None, content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]), b"hello"):
            (folder / "weights.safetensors").unlink() if damaged is None else (
                (folder / "weights.safetensors").write_bytes(damaged)
            )
            caplog.clear()
            with caplog.at_level(logging.WARNING, "jaxcl"):
                np.testing.assert_array_equal(jaxcl.load(folder).predict(test_rows[0]), want)
            (said,) = [record.getMessage() for record in caplog.records if record.name == "jaxcl"]
            assert ("is damaged" in said) == (damaged is not None) and "weights of checkpoint 0002-000000000" in said
    finally:
        (folder / "weights.safetensors").write_bytes(content)


def test_an_unfinished_run_can_be_loaded(tmp_path, monkeypatch, test_rows, caplog):
    whole.stop_at(monkeypatch, [20])
    with pytest.raises(Preempted):
        train(tmp_path / "run", "er", buffer__tier="host")
    with caplog.at_level(logging.WARNING, "jaxcl"):
        model = jaxcl.load(tmp_path / "run")
    assert model.step == 20 and model.predict(test_rows[0]).shape == (len(test_rows[0]), 10)
    assert "is not finished; loaded are the weights of checkpoint" in caplog.text and "at step 20" in caplog.text


def test_an_exported_program_runs_without_the_code_of_the_network(finished, test_rows, tmp_path):
    model = jaxcl.load(finished("icarl")[1])
    model.export(tmp_path / "program")
    np.save(tmp_path / "images.npy", test_rows[0][:7])
    command = [sys.executable, "-c", ELSEWHERE, *(tmp_path / name for name in ("program", "images.npy", "out.npy"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), model.predict(test_rows[0][:7]), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnet", {"width": 4, "norm": "sync"}),
        ("resnet18", {"width": 4, "stem": "small"}),
        ("dytox", {"width": 12, "depth": 2, "heads": 2, "patch": 4}),
    ],
)
def test_other_networks_can_be_exported(name, options, tmp_path):
    """In training some read the length of their batch, which no exported program knows; untrained here."""
    shape, classes = (16, 16, 3), np.eye(2, dtype=bool).repeat(3, axis=1)
    config = whole.small(eval__batch_size=8)
    model = make_model(name, 6, options=options, axis_name=AXIS, classes=classes)
    variables = model.init(jax.random.key(0), shape)
    weights = Weights(variables["params"], variables["batch_stats"], {}, np.int32(0))
    names = tuple(map(str, range(6)))
    trained = Trained(config, names, shape, 0, model, Strategy(), weights, make_mesh(jax.devices()[:2]))
    trained.export(tmp_path / "program")
    images = np.random.default_rng(0).integers(0, 255, (3, *shape), np.uint8)
    program = export.deserialize((tmp_path / "program").read_bytes())
    np.testing.assert_allclose(program.call(images), trained.predict(images), atol=1e-5)


def test_mistakes(finished, tmp_path):
    _, folder = finished("er")
    with pytest.raises(UserError, match=r"^workdir: .* is not allowed, give the folder of a run"):
        jaxcl.load(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no weights and no whole checkpoint of a run"):
        jaxcl.load(tmp_path)
    model = jaxcl.load(folder)
    for images in (np.zeros((2, 8, 8, 1)), np.zeros((2, 9, 8, 1), np.uint8), np.zeros((8, 8), np.uint8)):
        with pytest.raises(UserError, match=r"^images: .* is not allowed, give uint8 \[n, 8, 8, 1\]"):
            model.predict(images)


def predict(*arguments, status=0):
    command = [sys.executable, "-m", "jaxcl", "predict", *map(str, arguments)]
    done = subprocess.run(command, cwd=whole.REPO, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_the_command_classifies_images_and_arrays(finished, test_rows, tmp_path):
    _, folder = finished("er")
    images, _ = test_rows
    Image.fromarray(images[0, ..., 0]).save(tmp_path / "one.png")
    np.savez(tmp_path / "more.npz", x_test=images[1:3])
    table = predict(folder, tmp_path / "one.png", tmp_path / "more.npz", "--top=2", f"--json={tmp_path / 'out.json'}")
    want = jaxcl.load(folder).predict(images[:3])
    lines = table.splitlines()
    assert lines[0].split() == ["image", "class", "%", "class", "%"] and len(lines) == 5
    names = [f"{tmp_path}/one.png", f"{tmp_path}/more.npz[0]", f"{tmp_path}/more.npz[1]"]
    for line, name, mine in zip(lines[2:], names, want, strict=True):
        assert line.split()[:2] == [name, str(mine.argmax())]
    found = json.loads(pathlib.Path(tmp_path / "out.json").read_text())
    np.testing.assert_allclose([x["probabilities"] for x in found["images"]], want, atol=1e-6)


def test_mistakes_of_the_command(finished, tmp_path):
    _, folder = finished("er")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("x")
    for arguments, message in (
        ((), "WORKDIR FILES...: missing"),
        (
            (folder, tmp_path / "large.png"),
            f"FILES: {tmp_path}/large.png is 8x9, the network reads 8x8; scale it first",
        ),
        ((folder, tmp_path / "text.png"), f"FILES: {tmp_path}/text.png cannot be read: is it damaged, or no image?"),
    ):
        assert predict(*arguments, status=2).startswith(f"error: {message}")
