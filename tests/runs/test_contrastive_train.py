"""Contrastive runs: what they leave, interruption and other devices, mistakes in one line; retrieval, staleness, sources."""

import importlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcl.buffer import Shard
from jaxcl.contrastive import evaluate, storage
from jaxcl.contrastive.bank import SIDES, BankState
from jaxcl.contrastive.train import build, train_and_evaluate
from jaxcl.data import pairs, text
from jaxcl.errors import Preempted, UserError
from tests import whole as runs

N = 60


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """An archive like the emoji pack's: 60 images of noise around a colour, named by it; 40 in a second drawing."""
    path, rng = tmp_path_factory.mktemp("pairs") / "emoji.npz", np.random.default_rng(0)
    colours = rng.integers(0, 2, (N, 3))
    noisy = 40 + 150 * colours[:, None, None] + rng.integers(0, 40, (N, 8, 8, 3))
    names = [
        f"thing {i} " + " ".join(f"{c}{x}" for c, x in zip("rgb", row, strict=True)) for i, row in enumerate(colours)
    ]
    has = np.arange(N) % 3 > 0
    np.savez(
        path,
        noto=noisy.astype(np.uint8),
        caption=np.array(names),
        has_emojitwo=has,
        emojitwo=noisy[has].astype(np.uint8),
    )
    return path


SMALL = {
    "batch_size": 8,
    "epochs": 4,
    "dim": 8,
    "eval.rounds": 2,
    "eval.batch_size": 16,
    "log_every": 2,
    "model.image_width": 2,
    "model.text_width": 4,
    "data.vocabulary": 64,
    "data.length": 12,
    "bank.capacity": 16,
    "bank.drawn": 12,
    "checkpoint.every_seconds": 0.0,
}


def changed(emoji, **changes):
    """The fields in which the small config differs from that of the emoji."""
    return SMALL | {"data.source": f"emoji:{emoji}"} | {name.replace("__", "."): x for name, x in changes.items()}


def small(emoji, **changes):
    config = importlib.import_module("configs.memory_bank_emoji").get_config()
    config.update_from_flattened_dict(changed(emoji, **changes))
    return config


def train(config, folder, devices=2):
    return train_and_evaluate(config, folder, devices=jax.devices()[:devices], progress=False)


def test_a_run_stopped_twice_ends_as_if_it_had_not_been(emoji, tmp_path, monkeypatch):
    """Weights, keys, bank, what is pending, log and result, bit for bit; and what a run leaves."""
    config = small(emoji, negatives="momentum", momentum=0.9)
    result = train(config, tmp_path / "whole")
    assert result["steps"] == 4 * 6 and result["images"] == 4 * 48 and result["pairs"] == {"train": 48, "test": 12}
    assert [e["step"] for e in result["evaluations"]] == [12, 24]
    assert result["evaluations"][0]["staleness"]["age"] == [2.0, 3.0]  # two batches; the last is still pending
    assert result["bytes_per_device"]["bank"] > 8 * 8 * 4 * 2 and result["bytes_per_device"]["key_encoders"] > 0
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == result
    assert train(config, tmp_path / "whole") == result
    runs.stop_at(monkeypatch, (3, 17))
    for _ in range(2):
        with pytest.raises(Preempted):
            train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_evaluations_lie_in_the_checkpoint_and_not_in_the_log_alone(emoji, tmp_path, monkeypatch):
    config = small(emoji)
    whole = train(config, tmp_path / "whole")
    runs.stop_at(monkeypatch, (17,))
    with pytest.raises(Preempted):
        train(config, tmp_path / "stopped")
    (tmp_path / "stopped" / "metrics.jsonl").unlink()
    assert train(config, tmp_path / "stopped")["evaluations"] == whole["evaluations"]


@pytest.mark.slow
def test_kills_change_nothing(emoji, tmp_path):
    """SIGKILL of the command, once while a checkpoint is being written and once when one has been."""
    changes = {"negatives": "momentum", "momentum": 0.9, "epochs": 10, "checkpoint.every_steps": 5}
    train(small(emoji, **changes), tmp_path / "whole")
    killed, folder = tmp_path / "killed", tmp_path / "killed" / "checkpoints"
    fields = (f"--config.{name}={x}" for name, x in changed(emoji, **changes).items())
    line = ["--config=configs/memory_bank_emoji.py", "--devices=2", *fields]
    for moment in range(2):
        before = runs.saved_step(folder)
        process = runs.command("experiments.pairs", killed, *line)
        runs.until(lambda before=before: runs.saved_step(folder) > before, process)
        if moment == 0:
            runs.until(lambda: any("tmp" in path.name for path in folder.iterdir()), process)
        assert process.poll() is None, f"ended before it could be killed: {runs.wait(process)}"
        process.kill()
        runs.wait(process)
    status, errors = runs.wait(runs.command("experiments.pairs", killed, *line))
    assert status == 0, errors
    assert len(runs.lines(killed, "resume")) == 2
    runs.assert_same_run(tmp_path / "whole", killed)


def test_a_run_goes_on_with_other_devices(emoji, tmp_path, monkeypatch):
    """A full bank of 2 devices continued by 4: the same rows in the same slots, the same scores but for rounding."""
    config = small(emoji, negatives="full_bank", bank__proximal=0.1)
    config.optimizer.name = "sgd"  # Adam would blow rounding up
    train(config, tmp_path / "whole")
    runs.stop_at(monkeypatch, (13,))
    with pytest.raises(Preempted):
        train(config, tmp_path / "moved")
    train(config, tmp_path / "moved", devices=4)
    (_, a), (_, b) = (runs.last(tmp_path / name) for name in ("whole", "moved"))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=1e-4, err_msg=key)


BAD = {
    "negatives": ({"negatives": "queue"}, ("negatives", "queue", "fifo")),
    "field": ({"bank.storage": "int4"}, ("bank.storage", "int4", "int8")),
    "capacity": ({"negatives": "fifo", "bank.capacity": 4}, ("bank.capacity", "4", "batch_size = 8")),
    "capacity and devices": ({"negatives": "fifo", "bank.capacity": 17}, ("bank.capacity", "17", "4 devices")),
    "batch": ({"batch_size": 6}, ("batch_size", "6", "4 devices")),
    "drawn": ({"negatives": "full_bank", "bank.drawn": 49}, ("bank.drawn", "49", "48")),
    "proximal": ({"negatives": "fifo", "bank.proximal": 1.0}, ("bank.proximal", "full_bank")),
    "momentum": ({"momentum": 1.0}, ("momentum", "1.0", "less than 1")),
    "rounds": ({"eval.rounds": 3}, ("eval.rounds", "3", "epochs = 4")),
    "passes": ({"passes": 0}, ("passes", "0", "from 1 to")),
    "same side": ({"same_side": True}, ("same_side", "captions")),
    "same side of moco": ({"same_side": True, "negatives": "moco", "data.pairs": "views"}, ("same_side", "moco")),
    "schedule": ({"optimizer.schedule": "steps"}, ("optimizer.schedule", "steps", "cosine")),
    "styles of others": ({"data.source": "digits", "data.pairs": "styles"}, ("data.pairs", "styles", "emoji")),
    "file": ({"data.source": "emoji:nowhere.npz"}, ("nowhere.npz",)),
    "type": ({"data.held_out": 1.0}, ("data.held_out", "1.0", "below 1")),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_mistakes_cost_one_line(change, words, emoji):
    config = small(emoji)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError) as error:
        build(config, jax.devices()[:4])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_recall_counts_keys_not_rows():
    """Two images and one text of class 0, one of each of class 1; a third text nearest to everything is never right."""
    axes = np.eye(4, dtype=np.float32)
    image, text_ = axes[[0, 0, 1]] + 0.1 * axes[[2, 3, 2]], axes[[0, 0, 1]]
    found = {"left": image, "right": text_, "key": np.array([0, 0, 1])}
    assert set(evaluate.retrieval(found).values()) == {1.0}
    ranks = evaluate.ranks(
        image, found["key"], np.concatenate([text_, 9 * axes.sum(0, keepdims=True)]), np.array([0, 0, 1, 2])
    )
    assert ranks.tolist() == [1, 1, 1]
    collapsed = {"left": np.ones((30, 2)), "right": np.ones((30, 2)), "key": np.arange(30)}
    assert set(evaluate.retrieval(collapsed).values()) == {0.0}
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 500, 4)).astype(np.float32)
    # Chance: 10 of 500; a false alarm beyond 6 sigma, below 1e-8.
    assert abs(evaluate.retrieval({"left": a, "right": b, "key": np.arange(500)})["left_to_right@10"] - 0.02) < 0.04


def test_staleness_is_the_cosine_by_age(mesh_of):
    """Rows turned by a known angle for every step of age; slots without a row do not count."""
    mesh, steps = mesh_of(1), np.array([3, 3, 5, 9, 0], np.int32)
    angle = 0.1 * (10 - steps)
    stored = jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    record = {side: storage.encode("int8", stored) for side in SIDES} | {"step": jnp.asarray(steps)}
    shard = Shard(record, jnp.zeros(5, jnp.int32), jnp.array([4, 7, 1, 2, -1]), ())
    seen = []

    def fresh(ids):
        seen.extend(ids)
        return {side: np.tile(np.array([1.0, 0.0]), (len(ids), 1)) for side in SIDES}

    found = evaluate.make_staleness(mesh, 100)(BankState(shard, ()), 10, fresh)
    assert seen == [4, 7, 1, 2] and found["age"] == [1, 5, 7] and found["rows"] == [1, 1, 2]
    np.testing.assert_allclose(found["right"], np.cos([0.1, 0.5, 0.7]), atol=0.01)


def test_tokens():
    """Words first, then trigrams; the same words give the same numbers; what does not fit is cut."""
    one, other, empty, cut = text.tokens(["Red cat!", "cat, red", "", "a b c d"], 9, 512)
    assert set(one[:2]) == set(other[:2]) and not empty.any() and (cut[:4] > 0).all()
    assert (text.tokens(["ab"], 9, 512)[0] > 0).sum() == 3  # ab, <ab, ab>
    assert (text.tokens(["one two three four"], 3, 512) > 0).all()


def test_sources_of_pairs(emoji):
    options = {"length": 12, "vocabulary": 64}
    train_rows, test = pairs.open_pairs(f"emoji:{emoji}", "captions", **options)
    assert (len(train_rows), len(test)) == (48, 12) and not set(train_rows.labels) & set(test.labels)
    styles, _ = pairs.open_pairs(f"emoji:{emoji}", "styles", **options)
    np.testing.assert_array_equal(styles.read(np.arange(len(styles))), styles.targets["image"])
    named, _ = pairs.open_pairs("digits", "captions", **options)
    words = text.tokens(["a picture of 7"], 12, 64)[0]
    assert (named.targets["text"][named.labels == 7] == words).all()
    views, _ = pairs.open_pairs("digits", "views", **options)
    assert len(set(views.labels)) == len(views)


class Examples(list):
    """What TFDS gives: rows by number, several at once."""

    def __getitems__(self, rows):
        return [self[i] for i in rows]


@pytest.mark.parametrize("form", ["of dicts", "of lists"])
def test_captions_of_coco(form, monkeypatch):
    """Three images of two captions: six rows, keyed by image; the squares are the images'."""
    examples = Examples()
    for i in range(3):
        file = io.BytesIO()
        Image.fromarray(np.full((20, 30, 3), 60 * i + 40, np.uint8)).save(file, "PNG")
        words = [f"image {i} said {j}".encode() for j in range(2)]
        examples.append(
            {
                "image": file.getvalue(),
                "captions": {"text": words} if form == "of lists" else [{"text": w} for w in words],
            }
        )
    monkeypatch.setattr(pairs.tfds, "open_examples", lambda *_: [examples, examples])
    source, _ = pairs.open_pairs(pairs.COCO, "captions", image_size=8, length=6, vocabulary=64)
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2] and source.image_shape == (8, 8, 3)
    assert (source.read(np.array([5, 0]))[:, 4, 4] == [[160] * 3, [40] * 3]).all()
    np.testing.assert_array_equal(
        source.targets["text"], text.tokens([f"image {i} said {j}" for i in range(3) for j in range(2)], 6, 64)
    )
    alone, _ = pairs.open_pairs(pairs.COCO, "views", image_size=8)
    assert len(alone) == 3 and not alone.targets
