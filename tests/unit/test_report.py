"""The report on made-up runs: what is found, grouped, drawn and written, and how broken runs are named."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcl import report, summaries
from jaxcl.errors import StorageError, UserError
from jaxcl.sealed import sealed

SOURCES = {
    "from_scratch": [[0.9, 0.1], [0.9, 0.9]],
    "er": [[0.9, 0.0], [0.7, 0.8]],
    "incremental": [[0.9, 0], [0, 0.9]],
}


def _result(strategy="er", seed=0, matrix=None, capacity=200, **changes):
    matrix = matrix or SOURCES[strategy]
    buffer = {"capacity": capacity, "rows": capacity, "bytes": 784 * capacity} if strategy == "er" else None
    return {
        "name": f"{strategy}-{seed}",
        "strategy": strategy,
        "seed": seed,
        "source": "mnist",
        "model": "mlp",
        "tasks": [[2 * t, 2 * t + 1] for t in range(len(matrix))],
        "accuracy_matrix": matrix,
        **summaries.summarize(matrix),
        "seconds": 10.0,
        "images_per_second": 1234.0,
        "seconds_by_phase": {"load": 1.0, "train": 6.0, "evaluate": 2.0, "compile": 1.0},
        "buffer": buffer,
        "devices": {"count": 8, "kind": "cpu", "platform": "cpu", "processes": 1},
        "versions": {"jax": "0.10.2"},
        "steps": 100,
        "config": {"seed": seed, "workdir": f"/runs/{seed}", "buffer": {"capacity": capacity}},
        **changes,
    }


def _write(folder, result):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(result if isinstance(result, str) else json.dumps(sealed(result)))
    (folder / "config.json").write_text("{}")


@pytest.fixture
def folder(tmp_path):
    """er with two seeds, one of each baseline; an unfinished and a malformed run; a checkpoint that keeps a config."""
    _write(tmp_path / "er" / "0", _result(seed=0))
    _write(tmp_path / "er" / "1", _result(seed=1, matrix=[[1.0, 0.0], [0.5, 0.8]]))
    _write(tmp_path / "base" / "from_scratch", _result("from_scratch"))
    _write(tmp_path / "incremental", _result("incremental", source="<b>mnist</b>"))
    _write(tmp_path / "broken", '{"strategy": ')
    for unfinished in (tmp_path / "half", tmp_path / "er" / "0" / "checkpoint"):
        unfinished.mkdir()
        (unfinished / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")  # of a comparison, above its runs
    return tmp_path


def test_load_runs(folder):
    runs = report.load_runs([folder, folder / "er"])  # each run once, though found twice
    assert [(run.path.relative_to(folder).as_posix(), bool(run.problem)) for run in runs] == [
        ("base/from_scratch", False),
        ("broken", True),
        ("er/0", False),
        ("er/1", False),
        ("half", True),
        ("incremental", False),
    ]
    assert runs[1].problem.startswith("result.json is damaged: Expecting value")
    assert runs[4].problem == "unfinished: no result.json"


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"accuracy_matrix": [[0.1, 0.2]]}, r"accuracy_matrix has shape \(1, 2\); allowed: \(2, 2\)"),
        ({"accuracy_matrix": [[0.1], [0.2, 0.3]]}, "inhomogeneous"),
        ({"accuracy_matrix": [[90, 0], [0, 90]]}, "outside 0..1"),
        ({"accuracy_matrix": [[float("nan"), 0], [0, 0]]}, "outside 0..1"),
        ({"seconds": float("inf")}, "not finite"),
        ({"forgetting": {"mammoth": 0.1}}, "no 'chaudhry'"),
        ({"buffer": {"rows": 1}}, "no 'bytes'"),
        ({"model": 3}, "model is not a string"),
        ({"devices": 8}, "devices is not an object"),
    ],
)
def test_malformed_results_are_named_in_one_line(tmp_path, changes, problem):
    _write(tmp_path / "run", _result(**changes))
    [run] = report.load_runs([tmp_path])
    assert re.search(problem, run.problem) and "\n" not in run.problem
    assert report.table([run]) == f"{run.path}: {run.problem}"


def test_an_altered_result_is_not_shown(tmp_path):
    _write(tmp_path / "run", json.dumps(sealed(_result(seed=0))).replace("1234.0", "1235.0"))
    [run] = report.load_runs([tmp_path])
    assert run.problem == "result.json is damaged: its checksum is that of other contents"


def test_no_runs(tmp_path):
    with pytest.raises(UserError, match="no run below"):
        report.load_runs([tmp_path])
    with pytest.raises(UserError, match=r"'.*nowhere' is not a folder"):
        report.load_runs([tmp_path / "nowhere"])


def test_table(folder):
    lines = report.table(report.load_runs([folder])).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["from_scratch", "incremental", "er"]
    accuracy = np.array([75.0, 65.0])
    assert f"{accuracy.mean():.2f} ± {accuracy.std(ddof=1):.2f}" in lines[4]  # two seeds
    assert "35.00 ± 21.21" in lines[4] and "-35.00 ± 21.21" in lines[4]  # forgetting 20, 50; backward transfer -20, -50
    assert lines[4].split()[-2:] == ["153.1", "KiB"] and "1,234" in lines[4]
    assert lines[2].endswith(" -") and "±" not in lines[2]  # no buffer, one seed
    assert len({len(line) for line in lines[:5]}) == 1  # aligned
    assert lines[5:] == [f"{run.path}: {run.problem}" for run in report.load_runs([folder]) if run.problem]


@pytest.mark.parametrize("name", ["report.html", "accuracy_matrix.png", "time_by_phase.png"])
def test_a_report_replaces_its_own_files_and_no_others(name, tmp_path):
    runs, out = [report.Run(Path("er"), _result())], tmp_path / "out"
    report.write_report(runs, out)
    again = report.write_report(runs, out)
    assert again.exists()
    before = {path: path.read_bytes() for path in out.iterdir()}
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"<html>an essay on jaxcl</html>")
    for make in (lambda: shutil.copy(theirs, out / name), lambda: (out / name).symlink_to(out / f"own-{name}")):
        (out / name).replace(out / f"own-{name}")
        make()
        with pytest.raises(UserError, match=rf"^out: {out / name} is not a file of jaxcl; remove it") as error:
            report.write_report(runs, out)
        assert "\n" not in str(error.value)
        if not (out / name).is_symlink():
            assert (out / name).read_bytes() == theirs.read_bytes()
        (out / f"own-{name}").replace(out / name)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=rf"^out: {tmp_path}/file/out cannot be made: Not a directory"):
        report.write_report([], tmp_path / "file" / "out")


def test_configurations_of_one_strategy_stay_apart():
    runs = [report.Run(Path(), _result(seed=s, capacity=c)) for s in (0, 1) for c in (200, 500)]
    groups = report.group_runs(runs)
    assert [(group.label, len(group.results)) for group in groups] == [("er, capacity=200", 2), ("er, capacity=500", 2)]
    longer = report.Run(Path(), _result(matrix=np.eye(3).tolist()))
    assert len(report.group_runs([*runs[:1], longer])) == 2  # matrices of two sizes are never averaged


def test_what_a_run_may_change_as_it_goes_on_sets_none_apart():
    """Runs from before a field of theirs was there go with the others."""
    config = {"buffer": {"capacity": 200}}
    more = {**config, "checkpoint": {"accept_other_code": True}, "data": {"threads": 4}}
    (group,) = report.group_runs([report.Run(Path(), _result(seed=i, config=c)) for i, c in enumerate((config, more))])
    assert group.label == "er" and len(group.results) == 2


def test_colors_do_not_depend_on_the_other_runs():
    known = [report.color_of(strategy) for strategy in ("from_scratch", "incremental", "er")]
    assert len(set(known)) == 3
    assert report.color_of("my_strategy") == "#44AA99"  # in every process: hash() would differ


def test_top5_column_only_where_measured():
    runs = [report.Run(Path(), _result(average_top5=0.987)), report.Run(Path(), _result("incremental"))]
    assert "top-5 %" in report.table(runs) and "98.70" in report.table(runs)
    assert "top-5 %" not in report.table(runs[1:])


def test_page_is_self_contained(folder):
    page = report.write_report(report.load_runs([folder]), folder / "new" / "out")
    assert page == folder / "new" / "out" / "report.html"
    text = page.read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    names = [
        "average_accuracy",
        "accuracy_by_task",
        "accuracy_matrix",
        "time_by_phase",
        "time_of_steps",
    ]  # no logs, no classes
    assert embedded == [(page.parent / f"{name}.png").read_bytes() for name in names]
    assert all(png.startswith(b"\x89PNG") for png in embedded)
    assert not re.search(r"https?://|<script[^>]|<link|url\(|@import", text) and text.count("<script>") == 1
    assert 'name="viewport"' in text
    assert "<b>" not in text and "&lt;b&gt;mnist&lt;/b&gt;" in text
    assert "half: unfinished" in text and "result.json is damaged" in text
    with pytest.raises(UserError, match=r"out: .* is a file"):
        report.write_report([], page)


def test_pictures_show_the_numbers():
    groups = report.group_runs([report.Run(Path(), _result(s)) for s in SOURCES])
    lines = [axes.lines for axes in report.pictures.accuracy_by_task(groups).axes]
    np.testing.assert_allclose(lines[2][0].get_ydata(), [90, 70])  # er, task 1
    np.testing.assert_allclose(lines[2][1].get_ydata(), [80])  # task 2, from the moment it was trained
    assert {axes.get_ylim() for axes in report.pictures.accuracy_by_task(groups).axes} == {(0, 100)}
    [axes] = report.pictures.average_accuracy(groups).axes
    assert [line.get_label() for line in axes.lines] == ["from_scratch", "incremental", "er"]
    np.testing.assert_allclose([line.get_ydata() for line in axes.lines], [[90, 90], [90, 45], [90, 75]])
    assert [text.get_text() for text in report.pictures.accuracy_matrix(groups).axes[1].texts] == ["90", "0", "0", "90"]
    [axes] = report.pictures.time_by_phase(groups).axes
    assert [bar.get_width() for bar in axes.patches[::3]] == [1, 6, 1, 2]  # load, train, compile, evaluate


def test_time_by_phase_of_loop_and_background():
    """Each phase by its own name in the order of a step, unknown ones last; the background beside the loop, mean over seeds."""
    loop = {"new": 1.0, "train": 6.0, "accumulate": 4.0, "assemble": 3.0, "wait": 2.0, "load": 1.0}
    runs = [report.Run(Path(), _result("incremental"))]
    for seed, copied in ((0, 1.0), (1, 3.0)):
        background = {"own": 5.0, "populate": 4.0, "exchange": 3.0, "sample": 2.0, "copy": copied}
        runs.append(report.Run(Path(), _result(seed=seed, seconds_by_phase=loop, background_seconds=background)))
    [axes] = report.pictures.time_by_phase(report.group_runs(runs)).axes
    names = [bars.get_label() for bars in axes.containers]
    steps = ["load", "wait", "assemble", "accumulate", "train", "compile", "evaluate", "new"]
    background = ["copy", "sample", "exchange", "populate", "own"]
    assert names == steps + [f"{name} (background)" for name in background]
    er = {bars.get_label(): bars.patches[1] for bars in axes.containers}
    assert [er[name].get_width() for name in steps] == [1, 2, 3, 4, 6, 0, 0, 1]
    assert [er[f"{name} (background)"].get_width() for name in background] == [2, 2, 3, 4, 5]
    above, below = er["load"], er["copy (background)"]
    assert above.get_y() + above.get_height() < below.get_y()  # the axis points down: side by side, no overlap
    assert below.get_x() == 0
    [axes] = report.pictures.time_of_steps(report.group_runs(runs)).axes
    assert [bars.get_label() for bars in axes.containers] == steps[:5] + names[8:]


def test_classes_over_time():
    rows = np.array([[30, 0, 10], [0, 10, 10]])
    figure = report.classes_over_time({"mine": rows, "even": np.ones((1, 2))})
    mesh = figure.axes[0].collections[0]
    np.testing.assert_allclose(np.reshape(mesh.get_array(), (3, 2)), [[0.75, 0], [0, 0.5], [0.25, 0.5]])
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 40, 60]  # a task is as wide as it has rows
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["mine", "even"]


def test_sections_are_tables_of_the_page(tmp_path):
    section = report.Section("Sweep <1>", "a & b", [["rate", "accuracy %"], ["<0.1>", "50.00"]])
    text = report.write_report([report.Run(Path(), _result())], tmp_path, [section]).read_text()
    assert "<h2>Sweep &lt;1&gt;</h2>" in text and "a &amp; b" in text
    assert "<tr><td>&lt;0.1&gt;</td><td>50.00</td></tr>" in text


@pytest.mark.parametrize("tasks, seeds", [(1, 1), (20, 2)])
def test_one_task_and_many(tmp_path, tasks, seeds):
    matrix = np.tril(np.full((tasks, tasks), 0.5)).tolist()
    runs = [report.Run(Path(), _result("from_scratch", seed=seed, matrix=matrix)) for seed in range(seeds)]
    assert report.write_report(runs, tmp_path).is_file()


def test_words_of_a_user_are_no_formulas(tmp_path):
    words = r"$\frac{$ <b>"
    runs = [report.Run(Path(), _result(model=words, config={"option": x}) | {"strategy": words}) for x in (1, words)]
    page = report.write_report(runs, tmp_path).read_text()
    assert r"$\frac{$ &lt;b&gt;" in page and len(list(tmp_path.glob("*.png"))) >= 4


def test_the_page_says_where_runs_come_from_and_what_differs(tmp_path):
    names = ["zero", "one <1>", "two", "three"]
    runs = []
    for seed, capacity in ((0, 200), (1, 200), (0, 500)):
        more = {"name": "my <title>", "class_names": names, "command": "jaxcl train --x=1", "commit": "0123456789ab"}
        more |= {"finished": f"2026-11-0{seed + 1} 10:00:00+00:00", "versions": {"jaxcl": "0.3.0", "jax": "0.10.2"}}
        runs.append(
            report.Run(tmp_path / f"{capacity}" / f"seed_{seed}", _result(seed=seed, capacity=capacity, **more))
        )
    text = report.write_report(runs, tmp_path).read_text()
    assert "<h1>my &lt;title&gt;</h1>" in text and "<title>my &lt;title&gt; · jaxcl report</title>" in text
    for told in ("jaxcl train --x=1", "0123456789ab", "jaxcl 0.3.0, jax 0.10.2", "mnist", "8 x cpu"):
        assert f"<dd>{told}</dd>" in text
    assert "<dd>2026-11-01 10:00:00+00:00 to 2026-11-02 10:00:00+00:00</dd>" in text
    assert "<td>1</td><td>zero, one &lt;1&gt;</td>" in text and "<td>2</td><td>two, three</td>" in text
    groups = report.group_runs(runs)
    assert report.facts.differences_table(groups) == [
        ["", "buffer.capacity"],
        ["er, capacity=200", "200"],
        ["er, capacity=500", "500"],
    ]
    header, *rows = report.facts.seeds_table(groups, tmp_path)
    assert header[:3] == ["strategy", "seed", "accuracy %"] and header[-1] == "folder" and len(rows) == 3
    assert [(row[1], row[-1]) for row in rows] == [("0", "200/seed_0"), ("1", "200/seed_1"), ("0", "500/seed_0")]


def test_tasks_of_several_kinds_are_told_apart():
    runs = [report.Run(Path(), _result()), report.Run(Path(), _result("incremental", tasks=[[1], [0]]))]
    found = report.facts.tasks_table(report.group_runs(runs))
    assert found[0] == ["task", "classes", "in"] and ["1", "1", "incremental, tasks=[[1], [0]]"] not in found
    assert ["1", "1", "incremental"] in found and ["1", "0, 1", "er"] in found


def test_curves_and_classes_are_those_of_the_runs(tmp_path):
    lines = [{"kind": "train", "step": i, "task": i // 500, "loss": float(i % 7)} for i in range(1000)]
    other = '{"kind": "evaluation", "loss": 9}\n{"kind": "train"}\n[1]\n{"kind": "train", "step": 1, "task": 0, "loss": NaN}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + other + '{"torn')
    rows = report.curves.read_loss(tmp_path)
    assert rows.shape == (1000, 3) and rows[999].tolist() == [999, 1, 5]
    thin = report.curves.thinned(rows)
    assert len(thin) == 300 and thin[0].tolist() == [1.5, 0, 1.5]  # of four neighbours
    confusion = np.array([[3, 1, 0, 0], [0, 4, 0, 0], [2, 0, 2, 0], [0, 0, 0, 4]])
    classes = {"per_class_accuracy": [0.75, 1.0, 0.5, None], "confusion": confusion.tolist()}
    run = report.Run(tmp_path, _result(tasks=[[2, 3], [0, 1]], class_names=list("abcd"), **classes))
    groups = report.group_runs([run])
    [axes] = report.classes.per_class_accuracy(groups).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [50, np.nan, 75, 100])  # in the order of the tasks
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "d", "a", "b"]
    shown = report.classes.confusion(groups).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, [[50, 0, 50, 0], [0, 100, 0, 0], [0, 0, 75, 25], [0, 0, 0, 100]])
    bare = report.group_runs([report.Run(tmp_path / "nowhere", _result())])
    assert report.curves.loss(bare) is report.classes.confusion(bare) is report.classes.per_class_accuracy(bare) is None


def test_the_axis_fits():
    high = report.group_runs([report.Run(Path(), _result(matrix=[[0.97, 0.9], [0.91, 0.97]]))])
    assert report.pictures.average_accuracy(high).axes[0].get_ylim() == (80, 100)
    low = report.group_runs([report.Run(Path(), _result(s)) for s in SOURCES])
    assert report.pictures.average_accuracy(low).axes[0].get_ylim() == (40, 100)


def test_only_unfinished_runs(tmp_path):
    runs = [report.Run(tmp_path / "half", problem="unfinished: no result.json")]
    assert "half: unfinished" in report.write_report(runs, tmp_path / "out").read_text()
    assert not list((tmp_path / "out").glob("*.png"))


def command(*arguments, module="experiments.report"):
    program = [sys.executable, "-m", module, *map(str, arguments)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(program, cwd=root, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_scenario_command(tmp_path):
    flags = ("--config=configs/digits.py", "--scenarios=class,si_blurry", f"--out={tmp_path / 'x.png'}")
    done = command(*flags, module="experiments.scenario")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_command(folder):
    done = command(folder)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(folder / "report.html")
    assert (folder / "report.html").is_file() and "from_scratch" in done.stdout
    wrong = command(folder / "nowhere")
    assert wrong.returncode == 2 and re.fullmatch(r"error: run folder: .* is not a folder; allowed: .*\n", wrong.stderr)
