"""The figures of the paper: their runs are run once, their numbers are those of the runs, the pages say what files say."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.pages.page import RESULTS, filled
from experiments.paper import accuracy, draw, gap, memory, page, phases, scaling, sweep
from experiments.paper.page import FIGURES
from experiments.paper.step_model import Load
from experiments.paper.study import STRATEGIES, Figures, Study
from experiments.studies.grid import Grid, changed
from jaxcl.errors import UserError
from tests.whole import REPO, flags, small

PLAIN = "er,loss.prior=none"  # the folder of rehearsal with the plain loss
VARIED = Figures(shares=(0.1, 0.4), representatives=(8,), candidates=(4, 8), new=8, drawn=4)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    config = small(buffer__share=0.1)
    devices, folder = jax.devices()[:2], tmp_path_factory.mktemp("study")
    return Study(Grid(config, folder, devices=devices, options={"progress": False}), VARIED)


def drawn(figure, found, folder):
    """What is written of a figure: JSON that survives the file, a picture, tables."""
    found = json.loads(json.dumps(found))
    draw.save(FIGURES[figure].picture, found, folder / "x.png")
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")
    text = FIGURES[figure].markdown(found)
    assert "nan" not in text
    return text


def test_figures_1_and_2_share_their_runs_and_say_what_these_found(study, tmp_path):
    found = accuracy.measure(study)
    folders = {path.parent for path in study.grid.workdir.rglob("result.json")}
    trained = {*STRATEGIES, PLAIN}
    assert {str(x.relative_to(study.grid.workdir)) for x in folders} == {f"runs/mlp/{name}/seed_0" for name in trained}
    results = {x.parent.name: json.loads((x / "result.json").read_text()) for x in folders}
    top5 = {name: np.mean(result["top5_matrix"][-1]) for name, result in results.items()}
    [model] = found["models"].values()
    assert model["top5_over_from_scratch"] == pytest.approx(top5["er"] / top5["from_scratch"])
    assert model["er"]["top1_so_far"][0][-1] == pytest.approx(results["er"]["average_accuracy"])
    assert model["er_plain"]["top1_so_far"][0][-1] == pytest.approx(results[PLAIN]["average_accuracy"])
    assert results["er"]["prior"] == "balanced" and results[PLAIN]["prior"] == "none"
    steps = results["er"]["seconds_by_phase"]
    assert model["er"]["seconds_of_steps"][0] == pytest.approx(steps["load"] + steps["train"])
    assert found["goal"] == pytest.approx(1.02 * 24 / 16)
    text = drawn("accuracy", found, tmp_path)
    assert f"{100 * model['top5_over_from_scratch']:.1f} %" in text and f"{100 * top5['er']:.1f}" in text
    stamps = {x: (x / "result.json").stat().st_mtime_ns for x in folders}
    swept = sweep.measure(dataclasses.replace(study, grid=dataclasses.replace(study.grid)))  # as another process would
    assert {x: (x / "result.json").stat().st_mtime_ns for x in folders} == stamps
    more = {path.parent.parent.name for path in study.grid.workdir.rglob("result.json")} - trained
    assert more == {"er,buffer.share=0.4", "er,buffer.candidates=4"}
    base = results["er"]["top5_so_far"]
    at_own = [x["top5_so_far"] for field in swept["swept"] for x in swept["swept"][field] if x["value"] in (0.1, 8)]
    assert at_own == [[base]] * 3
    assert [x["capacity"] for x in swept["swept"]["buffer.share"]] == [144, 575]
    drawn("sweep", swept, tmp_path)


def test_several_seeds_have_a_deviation(tmp_path):
    def strategy(top5):
        return {"top5_so_far": [[1.0, x] for x in top5], "top1_so_far": [[0.5, 0.25]] * 2, "seconds_of_steps": [3, 4]}

    top5 = {"from_scratch": (0.9, 0.8), "incremental": (0.4, 0.2), "er": (0.7, 0.6)}
    model = {name: strategy(values) for name, values in top5.items()}
    model |= {"top5_over_from_scratch": 0.765, "time_over_incremental": 1.1, "time_over_from_scratch": 0.5}
    found = {"name": "a", "tasks": 2, "classes": 8, "capacity": 9, "goal": 1.2, "models": {"net": model}}
    found["sizes"] = {"batch_size": 8, "representatives": 1, "candidates": 2, "epochs": 3}
    text = drawn("accuracy", found, tmp_path)
    assert "| net | rehearsal | 2 | 65.0 ± 7.1 | 25.0 ± 0.0 | 3.5 ± 0.7 |" in text


def test_the_front_sets_rehearsal_beside_training_from_scratch(tmp_path):
    def row(name, fields, *top5):
        so_far = [[0.8, x] for x in top5]
        values = {"top5": list(top5), "top1": [0.25] * len(top5), "top5_so_far": so_far, "top1_so_far": so_far}
        return {"row": name, "fields": fields, **values}

    er = {"strategy": "er"}
    rows = [
        row("from_scratch", {"strategy": "from_scratch"}, 0.5),
        row("er+balanced", er, 0.4, 0.5),
        row("er+balanced r=b", er | {"buffer.representatives": 64}, 0.5),
        row("uer", {"strategy": "uer"}, 0.1),
    ]
    found = {
        "name": "n",
        "sizes": {"batch_size": 64, "representatives": 8, "share": 0.3, "capacity": None},
        "rows": rows,
    }
    found |= {"devices": {"count": 1, "kind": "cpu"}, "machine": {"cores": 2}, "versions": {"jax": "0.9"}}
    text = gap.front(found)
    assert "| from scratch at every task | 64 | 1 | 50.0 | 25.0 | 100 % | 100 % |" in text and "uer" not in text
    assert "| rehearsal | 64 + 8 | 2 | 45.0 ± 7.1 | 25.0 ± 0.0 | 90 % | 100 % |" in text
    assert "| rehearsal, r = b | 64 + 64 | 1 |" in text and text.endswith(
        "n; a memory of 30 %; 1 cpu device of 2 cores; jax 0.9."
    )
    draw.save(gap.picture, found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_expensive_model_may_have_fewer_seeds(study, monkeypatch):
    asked = []
    monkeypatch.setattr(Grid, "runs", lambda self, place, fields, seeds: asked.append((place, seeds)))
    varied = Figures(models={"small": {}, "large": {}}, most_seeds={"large": 2})
    for seeds in (1, 3):
        for model in varied.models:
            Study(dataclasses.replace(study.grid, seeds=seeds), varied).runs(model, "er")
    assert asked == [("runs/small/er", 1), ("runs/large/er", 1), ("runs/small/er", 3), ("runs/large/er", 2)]


def test_five_classes_have_no_figure_1():
    with pytest.raises(UserError, match="top-5 accuracy says nothing of five classes"):
        accuracy.summary([{"accuracy_matrix": [[1.0]]}])


def test_a_phase_is_the_median_over_runs_a_step():
    def run(train, steps=10):
        return {"steps": steps, "seconds_by_phase": {"train": train, "load": 0.01, "evaluate": 9.0}}

    found = phases.per_step([run(0.1), run(0.2), run(0.6)])
    assert found["loop"] | {"train": 20.0, "load": 1.0, "wait": 0.0} == found["loop"] and found["background"] == {}
    assert found["step"] == pytest.approx([11, 21, 61])
    host = phases.per_step([run(0.1) | {"background_seconds": {"copy": 0.03}}])
    assert host["background"] == {"copy": 3.0, "sample": 0.0, "exchange": 0.0, "populate": 0.0}


def test_phases_of_short_runs(study, monkeypatch, tmp_path):
    monkeypatch.setattr(phases, "REPEATS", 1)
    found = phases.measure(study)
    kinds = found["kinds"]
    steps = [kinds[kind]["steps"] for kind in kinds]
    assert steps[0] == steps[2] == steps[3] > steps[1]  # more rows a step, fewer steps
    assert [bool(x["background"]) for x in kinds.values()] == [False, False, False, True]
    assert all(x["loop"]["train"] > 0 for x in kinds.values()) and kinds["rehearsal, host"]["background"]["copy"] > 0
    text = drawn("phases", found, tmp_path)
    assert f"**{np.median(kinds['plain, b rows']['step']):.2f}**" in text


def test_memory_keeps_to_its_budget(study, tmp_path):
    found = memory.measure(study)
    rows = found["rows"]
    assert [(x["tier"], x["capacity"]) for x in rows] == [
        (tier, capacity) for tier in memory.TIERS for capacity in (144, 575)
    ]
    for x in rows:
        assert x["row_bytes"] == 64 + 8 and x["budget"] == x["capacity"] * 72
        assert x["budget"] <= x["on_device"] + x["on_host"] <= x["budget"] + 300  # a class's counters
        slots = 2 * -(-x["capacity"] // 2)
        assert x["on_host"] == (slots * 64 if x["tier"] == "host" else 0)
    for tier in memory.TIERS:
        assert len({x["temporaries"] for x in rows if x["tier"] == tier}) == 1
    assert drawn("memory", found, tmp_path).count("\n| ") == 2 + 4


SIZES = {"new": 56, "representatives": 7, "parameters": 10**6, "row_bytes": 3080, "tasks": 4}


@pytest.mark.parametrize("shared", [False, True])
def test_a_machine_that_obeys_the_model_is_predicted(shared):
    costs = np.array([1e-3, 2e-9, 1e-4])

    def measured(n, factor=1.0):
        times = {
            kind: 1e3 * float(np.array(scaling.step_load(kind, n, SIZES, shared)) @ costs) for kind in scaling.KINDS
        }
        return {"devices": n, "step_ms": {kind: {"median": factor * ms} for kind, ms in times.items()}}

    exact = [measured(n) for n in (1, 2, 4, 8)]
    found = scaling.check(exact, SIZES, shared)
    assert len(found) == 8 and max(abs(x["error"]) for x in found) < 1e-6
    off = scaling.check([*exact[:3], measured(8, 2.0)], SIZES, shared)
    assert [round(x["error"], 3) for x in off[-2:]] == [-0.5, -0.5]  # the last is judged by the others alone
    assert scaling.check(exact[:2], SIZES, shared) == []


def test_fake_devices_add_up_and_real_ones_do_not():
    assert scaling.step_load("incremental", 8, SIZES, False) == Load(56, 2 * 7 / 8 * 4 * 10**6, 6)
    assert scaling.step_load("incremental", 8, SIZES, True) == Load(8 * 56, 2 * 7 * 4 * 10**6, 48)
    assert scaling.step_load("er", 1, SIZES, True) == Load(63, 0, 0)


def test_scaling_on_two_devices(study, monkeypatch, tmp_path):
    for name, value in (("RUNS", 2), ("STEPS", 1), ("WARM_UP", 1)):
        monkeypatch.setattr(scaling, name, value)
    found = scaling.measure(study)
    assert [x["devices"] for x in found["measured"]] == [1, 2] and found["checked"] == []
    assert found["sizes"]["tasks"] == 3 and found["sizes"]["row_bytes"] == 72
    assert len(found["modelled"]) == 11
    assert "too few to check the step model" in drawn("scaling", found, tmp_path)
    ms = found["measured"][1]["step_ms"]["incremental"]["median"]
    found["checked"] = [{"devices": 2, "kind": "er", "measured_ms": 1.0, "predicted_ms": 1.5, "error": 0.5}]
    assert f"| {2 * 1e3 * ms / 16:,.0f} | {1e3 * ms / 16:,.0f} |" in drawn("scaling", found, tmp_path)


def test_fields_are_replaced_as_a_whole_and_must_exist():
    config = small()
    one = changed(config, {"model.options": {"hidden": (8,)}, "epochs": 3})
    assert one.model.options.to_dict() == {"hidden": (8,)} and one.epochs == 3 and config.epochs == 1
    for field in ("epoch", "model.nam", "modell.name", "epochs.a"):
        with pytest.raises(UserError, match=f"config.{field}: no such field"):
            changed(config, {field: 1})


def test_some_of_the_models():
    fields = {"models": {"a": {}, "b": {"epochs": 2}}, "new": 3}
    assert Figures.of(fields) == Figures(**fields) and Figures.of(fields, ["b"]).models == {"b": {"epochs": 2}}
    with pytest.raises(UserError, match="--models: 'c' is unknown, allowed are a, b"):
        Figures.of(fields, ["c"])
    with pytest.raises(UserError, match=r"get_figures\(\): modles: no such field, did you mean models\?"):
        Figures.of({"modles": {}})
    with pytest.raises(UserError, match="--models: 'a' is unknown, the config names none"):
        Figures.of({}, ["a"])


def test_pages_say_what_the_result_files_say():
    for path, parts in ((page.PAGE, page.sections()), (page.FRONT, {"front": page.front()})):
        text = path.read_text()
        assert text == filled(text, parts)
    assert all((page.IMAGES / f"paper_{name}.png").is_file() for name in FIGURES if page.read(name))


def test_a_section_is_filled_from_its_file(tmp_path):
    by = {"drawn": [3, 1], "expected": [2.0, 2.0], "z": [1.0, -1.0], "reference_over_expected": [1.0, 1.0]}
    by["drawn_over_expected"] = [1.5, 0.5]
    found = {
        "name": "n",
        "draws": 2,
        "rows_per_shard": [1, 2],
        "shard": by,
        "class": by,
        "command": "c",
        "note": "Alone.",
    }
    (tmp_path / "paper_uniformity.json").write_text(json.dumps(found))
    parts = page.sections(tmp_path)
    text = parts["uniformity"]
    assert text.startswith("![6. Uniformity") and "| 0.500 to 1.500 |" in text and text.endswith("`c`. Alone.")
    assert parts["memory"] == page.front(tmp_path) == "Not measured yet."


def test_command(tmp_path):
    """The whole way by the command, of a figure that trains nothing, and its mistakes."""

    def command(*more):
        line = [sys.executable, "-m", "experiments.paper", *flags({}), f"--workdir={tmp_path}", "--devices=2", *more]
        return subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)

    done = command("--figure=uniformity")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures" / "paper_uniformity.json").read_text())
    assert found["command"].startswith("python -m experiments.paper --config=configs/digits.py")
    assert (tmp_path / "figures" / "paper_uniformity.png").is_file() and "| shard |" in done.stdout
    wrong = command("--figure=acuracy")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --figure: 'acuracy' is not allowed")


def test_results_name_no_place_of_a_machine():
    for name in FIGURES:
        path = RESULTS / f"paper_{name}.json"
        assert not path.is_file() or not re.search(r"=(npz:)?[/~]", path.read_text())
