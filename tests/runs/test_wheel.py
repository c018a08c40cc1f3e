"""The wheel, built and installed into an environment of its own, used from a folder that knows nothing of this checkout."""

import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest
from packaging.requirements import Requirement

import jaxcl
from jaxcl import shipped
from tests.whole import REPO

pytestmark = pytest.mark.slow
PURE = pathlib.Path(sysconfig.get_paths()["purelib"])
# The buffer in a loop, where nothing but the two packages that it needs can be imported.
ALONE = """
import importlib.abc, sys
class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {foreign}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Only())
import jax, numpy as np
import jaxcl, jaxcl.buffer.files
buffer = jaxcl.make_buffer(jax.ShapeDtypeStruct((3,), np.float32), capacity=8, representatives=4)
state, drawn = buffer.insert_and_draw(buffer.init(), jaxcl.Rows(np.ones((4, 3), np.float32)), jax.random.key(0))
print(int(drawn.valid.sum()), "rows drawn")
try:
    jaxcl.train_and_evaluate
except ModuleNotFoundError as error:
    print(error)
"""


def run(folder, *arguments, status=0):
    done = subprocess.run(list(map(str, arguments)), cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("jaxcl", "configs"):  # a copy: an earlier build in the checkout would leave its files in the wheel
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder)
    run(folder, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", ".")
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    """Of an environment into which the wheel is installed; what it needs is that of this one, to be quick."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(folder, sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", wheel)
    site = run(folder, python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    pathlib.Path(site, "theirs.pth").write_text(f"{PURE}\n")
    return folder / "bin"


def test_what_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"jaxcl", f"jaxcl-{jaxcl.__version__}.dist-info"}  # nothing that another package might be called
    assert {"jaxcl/py.typed", *(f"jaxcl/configs/{name}.py" for name in shipped.names())} <= set(names)
    assert {f"jaxcl/commands/{name}.py" for name in ("train", "compare", "sweep", "report", "predict")} <= set(names)
    metadata = zipfile.ZipFile(wheel).read(f"jaxcl-{jaxcl.__version__}.dist-info/METADATA").decode()
    needed = [Requirement(line) for line in re.findall("^Requires-Dist: (.*)$", metadata, re.M)]
    assert {x.name for x in needed if x.marker is None} == {"jax", "numpy"}
    assert all(not any(part.operator == "==" for part in x.specifier) for x in needed)


def test_every_range_holds_what_is_pinned():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ranges = [Requirement(x) for x in (*project["dependencies"], *extras["train"], *extras["report"])]
    pinned = [Requirement(x) for x in re.findall(r"^\w\S*==[^#\n]*", (REPO / "requirements.txt").read_text(), re.M)]
    for wanted in ranges:
        versions = [next(iter(x.specifier)).version for x in pinned if x.name == wanted.name]
        assert wanted.name == "jaxcl" or versions, wanted
        assert all(wanted.specifier.contains(version) for version in versions), (wanted, versions)


def test_commands_and_configs_from_anywhere(bin_folder, tmp_path):
    (tmp_path / "of_mine.py").write_text(
        "from jaxcl.strategies.base import Strategy\n\ndef plain():\n    return Strategy()\n"
    )
    small = ["--config=mine.py", "--config.epochs=1", "--config.data.tasks=2", "--workdir=run", "--devices=2"]
    jaxcl_command = bin_folder / "jaxcl"
    assert "split_cifar10 " in run(tmp_path, jaxcl_command, "configs")
    assert run(tmp_path, jaxcl_command, "configs", "--copy=digits", "--to=own") == "own/digits.py\n"
    text = (tmp_path / "own" / "digits.py").read_text()
    assert text == shipped.path_of("digits").read_text()
    (tmp_path / "mine.py").write_text(
        text.replace("    return config\n", '    config.strategy = "of_mine:plain"\n    return config\n')
    )
    table = run(tmp_path, jaxcl_command, "train", *small)
    assert "of_mine:plain" in table and "average" not in table
    shown = run(tmp_path, jaxcl_command, "scenario", "--config=paper_tinyimagenet:tpu", "--out=x.png", status=2)
    assert "no such size, choose gpu" in shown and shown.count("\n") == 1


def test_the_buffer_needs_jax_and_numpy_alone(bin_folder, tmp_path):
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    modules = {"orbax-checkpoint": "orbax", "absl-py": "absl", "pillow": "PIL", "scikit-learn": "sklearn"}
    extras = [Requirement(x).name for x in project["optional-dependencies"]["train"]]
    foreign = {modules.get(name, name) for name in extras} - {"jaxcl"} | {"chex", "matplotlib"}
    out = run(tmp_path, bin_folder / "python", "-W", "error", "-c", ALONE.format(foreign=sorted(foreign)))
    assert out.splitlines()[0] == "4 rows drawn"
    assert out.splitlines()[1].endswith("pip install 'jaxcl[train]'")
