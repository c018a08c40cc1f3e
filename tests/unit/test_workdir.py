"""A workdir that was damaged, altered or written by another version: one line, no trace, nothing lost in silence."""

import json
import logging

import pytest

import jaxcl
from jaxcl.errors import UserError
from jaxcl.runs import files, log, workdir
from jaxcl.sealed import read_json, read_sealed, sealed
from tests import folders
from tests.folders import begin, claim, config, contents, finish


@pytest.fixture
def unfinished(tmp_path):
    return begin(tmp_path / "run")


@pytest.fixture
def finished(unfinished):
    return finish(unfinished)


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(folder, words, **changes):
    """The one line with which the folder is refused; what it holds stays as it was."""
    before = contents(folder)
    with pytest.raises(UserError, match=words) as error:
        claim(folder, **changes)
    assert "\n" not in str(error.value) and str(error.value).startswith("workdir: ")
    assert before == contents(folder)


def test_a_whole_one_is_continued_at_its_checkpoint(unfinished):
    finished, found = claim(unfinished)
    assert finished is None and found["run"]["scores"] == {"accuracy": [[0.5, 0.25]]}
    assert steps(unfinished) == [1, 2]  # the third line comes again
    assert json.loads((unfinished / "config.json").read_text())["jaxcl"] == found["version"] == jaxcl.__version__
    assert claim(unfinished, checkpoint={"keep": 7}).found == found  # which may change


def test_a_finished_one_is_returned(finished, caplog):
    result, found = claim(finished)
    assert found is None and not caplog.records and result == json.loads((finished / "result.json").read_text())
    assert result["accuracy"] == 0.8125


BINARY = bytes(range(256))
BROKEN = {"empty": b"", "binary": BINARY, "half": b'{"name": "x", "se', "a list": b"[]", "deep": b"[" * 100_000}


@pytest.mark.parametrize("content", [*BROKEN.values(), b"{}"], ids=[*BROKEN, "nothing in it"])
def test_a_damaged_config_is_refused_and_can_be_removed(content, unfinished):
    (unfinished / "config.json").write_bytes(content)
    refused(unfinished, r"config.json is damaged: .*; remove it to continue")
    (unfinished / "config.json").unlink()
    assert claim(unfinished).found["run"]["step"] == 2


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_refused(name, unfinished):
    (unfinished / name).unlink(missing_ok=True)
    (unfinished / name).mkdir()
    refused(unfinished, rf"{name} is a folder; remove it")


def test_a_file_in_the_place_of_the_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    (tmp_path / workdir.MARK).write_text("a run")
    refused(tmp_path, "checkpoints is not a folder; remove it")


@pytest.mark.parametrize("there", ["unfinished", "finished"])
@pytest.mark.parametrize(
    ("changes", "field"), [({"seed": 1}, "config.seed is 0 there, 1 here"), ({"rate": 0.2}, "rate")]
)
def test_without_config_json_another_config_is_refused_all_the_same(there, changes, field, request):
    folder = request.getfixturevalue(there)
    (folder / "config.json").unlink()
    refused(folder, f"holds another config's run .*{field}", **changes)
    assert (claim(folder).found is None) == (there == "finished")


OPTIONS = {"der": {"alpha": 0.3}, "mir": {"replayed": 8}}


def with_strategies(**changes):
    """Fields of a config with the options of its strategy and of others."""
    return {"strategy": "der", "strategies": {**OPTIONS, **changes}}


@pytest.mark.parametrize("lost", [(), ("config.json",)], ids=["whole", "without config.json"])
@pytest.mark.parametrize("there", ["unfinished", "finished"])
def test_a_run_is_bound_to_the_options_of_its_own_strategy(there, lost, tmp_path, monkeypatch):
    """A strategy's file more or less, or other options of another strategy, are no other run; its own option is."""
    plain = config
    monkeypatch.setattr(folders, "config", lambda **changes: plain(**with_strategies() | changes))
    folder = begin(tmp_path / "run")
    folder = finish(folder) if there == "finished" else folder
    for name in lost:
        (folder / name).unlink()
    refused(folder, r"config.strategies.der.alpha is 0.3 there, 0.5 here", **with_strategies(der={"alpha": 0.5}))
    refused(
        folder,
        r"config.strategies.der.beta is None there, 1.0 here",
        **with_strategies(der={"alpha": 0.3, "beta": 1.0}),
    )
    refused(folder, r"config.strategy is 'der' there, 'mir' here", **with_strategies() | {"strategy": "mir"})
    refused(folder, r"config.seed is 0 there, 1 here", seed=1)
    refused(folder, r"config.rate is 0.1 there, 0.2 here", rate=0.2)
    for other in ({"mir": {"replayed": 9}}, {"new": {"gamma": 1.0}}):
        assert (claim(folder, **with_strategies(**other)).found is None) == (there == "finished")
    monkeypatch.setattr(
        folders, "config", lambda **changes: plain(**{**with_strategies(), "strategies": {"der": OPTIONS["der"]}})
    )
    assert (claim(folder).found is None) == (there == "finished")  # mir's file is gone


def other_digit(raw):
    return raw.replace(b"0.8125", b"0.8126")


ALTERED = {name: lambda raw, content=content: content for name, content in BROKEN.items()} | {
    "{}": lambda raw: b"{}",
    "a digit": other_digit,
    "no checksum": lambda raw: json.dumps({k: v for k, v in json.loads(raw).items() if k != "checksum"}).encode(),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_a_damaged_result_is_not_believed_but_made_anew_from_the_last_checkpoint(alter, finished, caplog):
    path = finished / "result.json"
    before = path.read_bytes()
    path.write_bytes(alter(before))
    assert path.read_bytes() != before
    with caplog.at_level(logging.WARNING, "jaxcl"):
        result, found = claim(finished)
    assert result is None and found["run"]["step"] == 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert "result.json is damaged" in said and said.endswith(f"made anew from checkpoint {found['name']}")


def test_a_damaged_result_without_a_checkpoint_is_refused(finished):
    (finished / "result.json").write_bytes(other_digit((finished / "result.json").read_bytes()))
    for path in (finished / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    (finished / "checkpoints").rename(finished / "moved")
    refused(finished, r"result.json is damaged: .* no checkpoint to make it anew; bring them back")


def test_a_run_of_the_version_before_is_refused_by_both_of_its_names(unfinished):
    """As 0.1.0 wrote it: config.json is the config alone, the manifest has neither version nor config."""
    (unfinished / "config.json").write_text(json.dumps(workdir.resolved(config())))
    words = rf"was written by jaxcl 0.1.0; this is {jaxcl.__version__}; continue it with 0.1.0 or give another folder"
    refused(unfinished, words)
    (unfinished / "config.json").unlink()
    (path,) = unfinished.glob("checkpoints/*/manifest.json")
    manifest = json.loads(path.read_text())
    run = {"step": 2, "task": 1, "rehearsing": False, "accuracy": [[0.5, 0.25]], "metrics_size": 9, "devices": 1}
    files.write_json(path, sealed({"run": run, "arrays": manifest["arrays"], "files": manifest["files"]}))
    refused(unfinished, words)


@pytest.mark.parametrize(("version", "allowed"), [("0.3.7", True), ("0.2.0", False), ("1.3.0", False)])
def test_versions_that_differ_in_the_last_number_go_on(version, allowed, unfinished, monkeypatch):
    monkeypatch.setattr(jaxcl, "__version__", version)
    if allowed:
        assert claim(unfinished).found is not None
    else:
        refused(unfinished, f"was written by jaxcl 0.3.0; this is {version}")


LOGS = {  # what became of the two lines that belong to the checkpoint -> the steps of the lines that can be kept
    "shorter": (lambda raw: raw.splitlines(keepends=True)[0], [1]),
    "torn in a line": (lambda raw: raw[:-9], [1]),
    "gone": (lambda raw: None, []),
    "empty": (lambda raw: b"", []),
    "binary": (lambda raw: BINARY * 9, []),
    "a bit in the first line": (lambda raw: bytes([raw[0] ^ 1]) + raw[1:], [2]),
    "a line of something else": (
        lambda raw: b'"kind'.ljust(raw.index(b"\n") - 1) + b'"' + raw[raw.index(b"\n") :],
        [2],
    ),
    "a digit": (lambda raw: raw.replace(b"1.0", b"2.0"), [1, 2]),
}


@pytest.mark.parametrize(("damage", "kept"), LOGS.values(), ids=LOGS)
def test_a_damaged_log_is_said_and_its_whole_lines_are_kept(damage, kept, unfinished, caplog):
    path = unfinished / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    content = damage(b"".join(lines[:2]))
    path.unlink() if content is None else path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "jaxcl"):
        found = claim(unfinished).found
    (said,) = [record.getMessage() for record in caplog.records]
    assert "metrics.jsonl is damaged" in said and "scores are in the checkpoint" in said
    assert found["run"]["scores"] == {"accuracy": [[0.5, 0.25]]}
    assert steps(unfinished) == kept
    aside = unfinished / "metrics.jsonl.corrupt"
    assert (aside.read_bytes() if aside.exists() else b"") == (content or b"")
    again = log.Log(
        unfinished, True, step=2
    )  # what is appended is whole again, and so is the next checkpoint's checksum
    again.write("train", 3, {"loss": 0.1})
    assert again.saved() == files.checksum(path)
    again.close()
    assert steps(unfinished) == [*kept, 3]


def test_a_run_without_a_checkpoint_begins_its_log_anew_and_says_so(unfinished, caplog):
    for path in unfinished.glob("checkpoints/*/manifest.json"):
        path.unlink()  # an interrupted save
    with caplog.at_level(logging.WARNING, "jaxcl"):
        assert claim(unfinished) == workdir.Claim(None, None)
    assert "no checkpoint to continue from: the run and its log begin anew" in caplog.text
    assert not (unfinished / "metrics.jsonl").exists()


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    """An interrupt in the last moment leaves what was there before."""
    path = tmp_path / "result.json"
    files.write_json(path, {"old": 1})

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}


def test_a_seal_is_of_what_json_gives_back(tmp_path):
    value = {"rows": {10: 1, 9: 2}, "pair": (1, 2), "third": 1 / 3, "nan": float("nan")}
    files.write_json(tmp_path / "x.json", sealed(value))
    assert read_sealed(tmp_path / "x.json")["rows"] == {"10": 1, "9": 2}


@pytest.mark.parametrize("there", ["unfinished", "finished"])
def test_one_that_does_not_tell_its_code_is_said_to_be_one(there, request, monkeypatch, caplog):
    """As runs of 0.3.0 do not."""
    monkeypatch.setattr(folders, "code_of", lambda config: None)
    folder = request.getfixturevalue(there)
    with caplog.at_level(logging.WARNING, "jaxcl"):
        workdir.finished(folder, config()) or claim(folder)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "jaxcl"]
    assert said.startswith(f"{folder}: does not tell by what code it was made; ")
