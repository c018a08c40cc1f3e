"""The README's program runs; its links and anchors lead somewhere; configs expect the accuracies of their tables."""

import importlib
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
README, CONFIGS = (ROOT / "README.md").read_text(), (ROOT / "docs" / "configs.md").read_text()


def test_the_library_example_runs():
    """As a user would: a file of its own, on whatever devices there are, here 4 fake ones."""
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert (
        len([line for line in program.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 20
    )
    start = "from jaxcl.mesh import use_fake_devices\nuse_fake_devices(4)\n"
    command = [sys.executable, "-W", "error", "-c", start + program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    stats, shape, ids = re.fullmatch(r"(\{.*\}) (\(.*?\)) \[(.*)\]\n", done.stdout, re.DOTALL).groups()
    assert "'rows': 2000" in stats and shape == "(32, 28, 28, 1)" and len(ids.split()) == 32


def test_the_readme_stays_short_and_its_links_lead_somewhere():
    assert "@@" not in README and len(README.splitlines()) <= 120
    links = [link.partition("#")[::2] for link in re.findall(r"\]\(([^)]+)\)", README)]
    assert links and not [path for path, _ in links if not (ROOT / path).exists()]
    for path, anchor in links:
        assert not anchor or anchor in anchors((ROOT / path).read_text()), (path, anchor)


def anchors(text):
    """Of a page's headings, as GitHub and the site make them."""
    return [
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in re.findall(r"^#+ .*", text, re.M)
    ]


def test_the_digits_config_expects_the_accuracies_of_the_readme():
    rows = r"^from_scratch +\d+ +([\d.]+).*\nincremental +\d+ +([\d.]+).*\ner +\d+ +([\d.]+)"
    shown = re.search(rows, README[README.index("jaxcl compare --config=digits ") :], re.M).groups()
    expected = importlib.import_module("configs.digits").__doc__.partition("Expected:")[2]
    assert tuple(re.findall(r"([\d.]+) %", expected)) == shown
