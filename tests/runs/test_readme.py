"""The README's program runs as printed, and configs expect the accuracies that it and docs/configs.md show."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

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
    assert "'rows': 2000" in done.stdout and "(32, 28, 28, 1)" in done.stdout


def test_the_readme_stays_short_and_its_links_lead_somewhere():
    assert "@@" not in README and len(README.splitlines()) <= 120
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README)]
    assert links and not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize(("number", "config"), list(enumerate(["digits", "split_mnist", "split_cifar10"])))
def test_a_config_expects_the_accuracies_of_its_table(number, config):
    tables = re.findall(
        r"^from_scratch +\d+ +([\d.]+).*\nincremental +\d+ +([\d.]+).*\ner +\d+ +([\d.]+)", README + CONFIGS, re.M
    )
    expected = importlib.import_module(f"configs.{config}").__doc__.partition("Expected:")[2]
    assert tuple(re.findall(r"([\d.]+) %", expected)) == tables[number]
