"""The paper's protocol: its learning rates, its sizes, the share of the training set that the memory holds."""

import pathlib

import jax
import numpy as np
import pytest

from configs import paper_imagenet, paper_tinyimagenet
from experiments.paper.study import Figures, Study
from experiments.studies.grid import Grid
from jaxcl.errors import UserError
from jaxcl.optimizer import make_schedule
from jaxcl.training.build import build
from jaxcl.training.config import check_config, default_config
from tests.whole import small


@pytest.mark.parametrize(("devices", "scale"), [(1, 1), (16, 16), (64, 64), (128, 64)])
def test_learning_rate_warms_up_to_the_scaled_one_and_decays_by_steps(devices, scale):
    """The reference's rule, lr * (epoch * (scale - 1) / 5 + 1) for 5 epochs, then its table; every task begins at epoch 0."""
    config = paper_imagenet.get_config(f"resnet50-{devices}")
    schedule = make_schedule(config.optimizer, config.epochs)
    for epoch in (0.0, 0.3, 2.5, 4.99):
        assert float(schedule(epoch)) == pytest.approx(0.0125 * (epoch * (scale - 1) / 5 + 1), rel=1e-5)
    for epoch, factor in ((5, 1), (20.99, 1), (21, 0.5), (25.99, 0.5), (26, 0.05), (28, 0.01), (29.99, 0.01)):
        assert float(schedule(epoch)) == pytest.approx(0.0125 * scale * factor, rel=1e-5)


def test_sizes_count_rows_of_all_devices():
    config = paper_imagenet.get_config("ghostnet-128")
    check_config(config, 128)
    per_device = [x / 128 for x in (config.batch_size, config.buffer.candidates, config.buffer.representatives)]
    assert per_device == [56, 14, 7] and config.epochs == 30 and config.data.tasks == 4
    assert config.optimizer.learning_rate == 0.01 * 64
    assert (config.optimizer.momentum, config.optimizer.weight_decay, config.buffer.share) == (0.9, 5e-5, 0.3)
    for size in ("gpu", "cpu"):
        small, figures = paper_tinyimagenet.get_config(size), Figures.of(paper_tinyimagenet.get_figures(size))
        Study(Grid(small, pathlib.Path(), devices=jax.devices()[:8]), figures).check()
        c, b = small.buffer.candidates, small.batch_size
        assert (4 * c, 8 * small.buffer.representatives, small.buffer.share) == (b, b, 0.3)


@pytest.mark.parametrize("run", ["resnet50", "vgg-16", "resnet50-0", "resnet50-many", ""])
def test_a_wrong_run_is_refused(run):
    with pytest.raises(UserError, match="allowed is MODEL-DEVICES"):
        paper_imagenet.get_config(run)


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_a_share_counts_rows_of_all_tasks(share):
    config = small(data__tasks=4, buffer__policy="reservoir")
    config.buffer.share = share
    run = build(config, jax.devices()[:2])
    rows = sum(len(task.train) for task in run.scenario.tasks)
    assert run.buffer is not None and run.buffer.capacity == round(share * rows)


@pytest.mark.parametrize(
    ("field", "value"), [("buffer.share", 0.0), ("buffer.share", 1.5), ("optimizer.warmup_from", -0.1)]
)
def test_a_share_out_of_range_is_refused(field, value):
    config = default_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"{field}: {value} is not allowed"):
        check_config(config, 1)


def test_the_small_size_runs_from_the_pack_shaped_set(tmp_path):
    """20 classes in 4 tasks: the shipped config and its models on a file of the pack's shape build, with the memory's share."""
    rng, labels = np.random.default_rng(0), np.arange(80) % 20
    images = rng.integers(0, 256, (80, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    config = paper_tinyimagenet.get_config("cpu")
    config.data.source = f"npz:{tmp_path / 'tiny.npz'}"
    figures = Figures.of(paper_tinyimagenet.get_figures("cpu"))
    study = Study(Grid(config, tmp_path, devices=jax.devices()[:8]), figures)
    study.check()
    for model in study.models:
        run = build(study.configured(model, "er"), study.devices)
        assert [task.classes for task in run.scenario.tasks][1] == (5, 6, 7, 8, 9)
        assert run.buffer is not None and run.buffer.capacity == round(0.3 * 80)
