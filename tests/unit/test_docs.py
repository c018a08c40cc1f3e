"""The site is built as `make docs` does it: strict, so that a link, an anchor or an object that is not there is an error."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.whole import REPO


def build(config, out):
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: requirements-docs.txt")
def test_the_site_is_built_without_a_warning(tmp_path):
    done = build(REPO / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "site" / "api" / "buffer.html").read_text()
    assert "make_buffer" in text and "representatives" in text
    assert (tmp_path / "site" / "results" / "bench_step.png").stat().st_size
    (tmp_path / "docs").mkdir()  # the guard itself
    (tmp_path / "docs" / "index.md").write_text("[nowhere](nowhere.md) [anchor](#nothing)\n")
    lines = (REPO / "mkdocs.yml").read_text().splitlines()
    validation = lines[lines.index("validation:") :][:3]
    (tmp_path / "mkdocs.yml").write_text("\n".join(["site_name: x", "strict: true", *validation]))
    broken = build(tmp_path / "mkdocs.yml", tmp_path / "broken")
    assert broken.returncode != 0 and "nowhere.md" in broken.stdout + broken.stderr
