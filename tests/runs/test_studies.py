"""What all studies share: the grid, its records and its result files; every setting that a study names is allowed."""

import importlib
import json
import pathlib
import pkgutil
import subprocess
import sys

import numpy as np
import pytest

import experiments.paper
import experiments.studies
from experiments.studies import adab2n, choice, exchange_accuracy, grid, large_batch, latent, mesh, norm, rehearsal
from experiments.studies.grid import Grid, Setting
from jaxcl.data import array_source
from jaxcl.errors import UserError
from jaxcl.models import make_model
from jaxcl.training.config import check_config
from tests.whole import REPO, small


def test_all_commands_can_be_imported_together():
    """absl refuses a flag that two modules define."""
    for package in (experiments.studies, experiments.paper):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def counting(made, config, folders, **options):
    """As `train_seeds`, without training."""
    made.append((config.batch_size, sorted(folders), len(options["devices"]), options["overwrite"]))
    return [{"seed": seed, "average_accuracy": 0.5 + seed / 10} for seed in folders]


def test_a_record_holds_the_label_and_what_is_read_of_every_seed(tmp_path, capsys):
    made = []

    def train(*arguments, **options):
        return counting(made, *arguments, **options)

    one = Grid(small(), tmp_path, seeds=2, train=train, options={"overwrite": True})
    settings = [Setting("a", {"batch_size": 8}, {"b": 8}, devices=1), Setting("c", {}, {"b": 16})]
    found = one.records(settings, lambda runs: grid.each(runs, "average_accuracy"))
    assert found == [{"b": b, "average_accuracy": [0.5, 0.6]} for b in (8, 16)]
    assert made == [(8, [0, 1], 1, True), (16, [0, 1], len(one.devices), True)]
    assert "1 of 2" in capsys.readouterr().out and one.config == small()
    one.records(settings, lambda runs: {"average_accuracy": []} | grid.each(runs, "average_accuracy"))
    assert len(made) == 2  # shared, not trained again


def test_a_finished_run_is_read_by_the_next_study(tmp_path):
    first = Grid(small(epochs=1), tmp_path, options={"progress": False}).runs("place", {"strategy": "incremental"})
    path = tmp_path / "place" / "seed_0" / "result.json"
    stamp = path.stat().st_mtime_ns
    again = Grid(small(epochs=1), tmp_path, seeds=2, options={"progress": False})
    both = again.runs("place", {"strategy": "incremental"})
    assert path.stat().st_mtime_ns == stamp and [run["seed"] for run in both] == [0, 1]
    assert both[0]["accuracy_matrix"] == first[0]["accuracy_matrix"]


def test_a_field_that_does_not_exist_is_refused():
    assert grid.changed(small(), {"model.options": {"hidden": (4,)}}).model.options.to_dict() == {"hidden": (4,)}
    for field in ("buffer.capacty", "batch", "seed.x"):
        with pytest.raises(UserError, match=rf"^config.{field}: no such field"):
            grid.changed(small(), {field: 1})


def test_a_result_file_has_a_record_a_line(tmp_path):
    found = {"name": "é", "settings": [{"x": [1, 2]}, {"x": {"y": 1}}], "parts": {"one": {"settings": [{"z": 0.1}]}}}
    grid.write(tmp_path / "new" / "a.json", found)
    text = (tmp_path / "new" / "a.json").read_text()
    back = json.loads(text)
    assert {name: back[name] for name in found} == found and "command" in back and "é" in text
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert '{"x": [1, 2]}' in lines and '{"z": 0.1}' in lines


def test_every_setting_of_the_exchanges_is_allowed():
    config = importlib.import_module("configs.split_mnist").get_config()
    settings = list(exchange_accuracy.settings([]))
    assert len({one.place for one in settings}) == len(settings) == 6
    for one in settings:
        check_config(grid.changed(config, one.fields), 8)
    with pytest.raises(UserError, match=r"^--models: 'x' is not allowed"):
        list(exchange_accuracy.settings(["x"]))


def test_every_setting_of_norms_large_batches_and_meshes_is_allowed():
    """Their models too, for the batch of the setting."""
    split_cifar10 = importlib.import_module("configs.split_cifar10").get_config("cpu")
    permuted = importlib.import_module("configs.permuted_mnist_mammoth").get_config()
    mnist = importlib.import_module("configs.split_mnist").get_config()
    cases = [
        (split_cifar10, 8, list(norm.settings("split_cifar10", [], 8)), 33),
        (permuted, 8, list(norm.settings("permuted_mnist", [], 8)), 33),
        (mnist, 2, list(large_batch.settings([], 2)), 48),
        (split_cifar10, 1, adab2n.settings(), 2),
        (split_cifar10, 8, list(mesh.settings([])), 4),
    ]
    for config, devices, settings, count in cases:
        assert len({one.place for one in settings}) == len(settings) == count
        for one in settings:
            changed = grid.changed(config, one.fields)
            check_config(changed, one.devices or devices)
            model = make_model(changed.model.name, 10, options=changed.model.options.to_dict())
            if model.fits is not None:
                model.fits(changed.batch_size)


@pytest.mark.parametrize("name", ["digits", "split_mnist", "split_cifar10", "paper_tinyimagenet"])
def test_every_row_of_the_rehearsal_study_is_allowed(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    for fields in rehearsal.rows_of(config).values():
        check_config(grid.changed(config, fields), 1)
    assert set(choice.CHOICES.default) <= set(rehearsal.rows_of(config))


def test_every_row_of_the_latent_study_is_allowed():
    rng = np.random.default_rng(0)
    for name, classes in (("cifar10", 10), ("tinyimagenet", 100)):
        config = importlib.import_module("configs.pretrained").get_config(name)
        images = rng.integers(0, 256, (500, 32, 32, 3)).astype(np.uint8)
        source = array_source(images, np.arange(500) % classes, tuple(map(str, range(classes))))
        rows = latent.rows_of(config, source, pathlib.Path("features"), "block_14")
        for fields in rows.values():
            check_config(grid.changed(config, fields), 1)
        assert rows["er 10 %"]["buffer.capacity"] == 50 and rows["latent 1 %"]["buffer.capacity"] == round(15360 / 772)
        slow = rows["slow 10 %"]
        assert (
            slow["buffer.capacity"] == rows["latent 10 %"]["buffer.capacity"]
            and slow["optimizer.scales"]["stem"] == 0.01
        )
        assert not {"block_15", "head"} & {*slow["optimizer.scales"]}
        assert rows["slca"]["strategies.slca.covariance"] == ("full" if classes == 10 else "diagonal")


def test_rows_of_the_latent_study_are_set_beside_the_bound():
    records = [{"row": "joint", "average_accuracy": [0.5, 0.7]}, {"row": "er", "average_accuracy": [0.3, 0.3]}]
    assert [one["part_of_joint"] for one in latent.with_parts(records)] == pytest.approx([1.0, 0.5])
    assert latent.with_parts(records[1:]) == records[1:]


def test_equal_steps_from_scratch_are_those_of_one_pass_over_the_tasks():
    """Tasks of n rows: from scratch E' (n + 2 n + 3 n + 4 n) rows, one after the other E 4 n."""
    config = importlib.import_module("configs.paper_tinyimagenet").get_config("medium")
    assert rehearsal.equal_steps(config) * 10 == config.epochs * 4 == 48
    fields = rehearsal.rows_of(config)["from_scratch equal steps"]
    assert fields["epochs"] == 5 and fields["optimizer.decay_epochs"] == pytest.approx((10 / 3, 25 / 6, 55 / 12))


def test_the_choice_is_the_best_on_validation_rows_and_ranked_where_it_is_judged():
    def records(**accuracies):
        return [{"row": name, "top1": x, "seconds": [1.0] * len(x)} for name, x in accuracies.items()]

    found = choice.judged(records(a=[0.1, 0.3], b=[0.4, 0.2], c=[0.1, 0.1]), records(a=[0.5], b=[0.3], c=[0.4]))
    assert {name: found[name] for name in ("choice", "rank", "best")} == {"choice": "b", "rank": 3, "best": "a"}
    assert found["seconds_of_search"] == 6


def test_the_table_of_rows_sets_them_beside_training_from_scratch():
    def row(name, top5, top1, called):
        same = {"steps": [1200], "in_task": [0.5] * len(top5)}
        return {"row": name, "top5": top5, "top1": top1, "called_new": [called] * len(top5), **same}

    rows = [row("from_scratch", [0.5], [0.25], 0.1), row("er", [0.2, 0.3], [0.1, 0.1], None)]
    sizes = {"epochs": 3, "batch_size": 64, "representatives": 8, "share": 0.3}
    text = rehearsal.markdown({"name": "a", "sizes": sizes, "rows": rows})
    assert "| from_scratch | 1 | 1,200 | 50.0 | 25.0 | 100.0 % | 100.0 % | 10 % | 50.0 |" in text
    assert "| er | 2 | 1,200 | 25.0 ± 7.1 | 10.0 ± 0.0 | 50.0 % | 40.0 % |  | 50.0 |" in text
    assert "a: 3 epochs a task, b = 64, r = 8, a memory of 30 %" in text
    assert "a memory of 1,000 rows" in rehearsal.markdown(
        {"name": "a", "sizes": sizes | {"share": None, "capacity": 1000}, "rows": rows}
    )


def test_rows_that_the_file_holds_stay_if_they_are_of_the_same_sizes(tmp_path):
    path, order = tmp_path / "found.json", ("from_scratch", "er", "joint")
    new = {"name": "a", "sizes": {"epochs": 3}, "rows": [{"row": "er", "top5": [0.5]}]}
    assert rehearsal.merged(path, new, order) == new
    old = {"name": "a", "sizes": {"epochs": 3}, "revision": "abc"}
    old |= {"rows": [{"row": "joint", "top5": [0.1]}, {"row": "er", "top5": [0.2]}]}
    path.write_text(json.dumps(old))
    # A row that stays says of which commit it is.
    assert rehearsal.merged(path, new, order)["rows"] == [*new["rows"], {"commits": ["abc"], **old["rows"][0]}]
    path.write_text(json.dumps(old | {"sizes": {"epochs": 4}}))
    assert rehearsal.merged(path, new, order) == new


def test_rows_of_old_tasks_that_are_called_a_new_class_are_counted():
    confusion = [[1, 0, 3], [0, 4, 0], [0, 0, 9]]
    assert rehearsal.called_new({"confusion": confusion, "tasks": [[0, 1], [2]]}) == 3 / 8
    assert rehearsal.called_new({"tasks": [[0, 1], [2]]}) is None


def command(module, *more):
    line = [sys.executable, "-m", f"experiments.studies.{module}", *more]
    return subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=100, check=False)


def test_mistakes_cost_one_line(tmp_path):
    flags = ("--config=configs/digits.py", f"--workdir={tmp_path}")
    for module, more, error in (
        ("repeats", flags, "error: config.data.source: 'digits' is not allowed here, give npz:FILE"),
        ("repeats", (*flags, "--seeds=1"), "error: --seeds: 1 is not allowed, give at least 2"),
        (
            "memory_modes",
            (*flags, "--devices=2", "--counts=4"),
            "error: --counts: 4 is not allowed, give 2 to 2 devices",
        ),
        ("references", ("--protocol=nothing",), "error: --protocol: there is no configs/nothing.py"),
    ):
        done = command(module, *more)
        assert done.returncode == 2 and done.stderr.startswith(error) and done.stderr.count("\n") == 1
