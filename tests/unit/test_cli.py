"""The command line: commands imported together, one line for every mistake. tests/runs/test_commands.py has whole commands."""

import importlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from jaxcl import shipped
from jaxcl.cli.config_file import from_config_file
from jaxcl.commands import configs
from jaxcl.errors import UserError
from tests.whole import REPO

COMMANDS = ("train", "compare", "sweep", "report", "pairs", "scenario", "configs")
DIGITS = "--config=configs/digits.py"


def parsed(*arguments):
    """What a command says of these arguments: several in one process, since each start costs seconds."""
    program = """
import sys
import logging
from absl import flags
from jaxcl import cli
from jaxcl.errors import UserError
logging.disable(logging.WARNING)  # as cli.run does it
for line in sys.argv[1:]:
    cli.flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    sys.modules.pop("config_config", None)
    argv = sys.argv = ["command", *line.split(" ")]
    try:
        cli._begin(cli._parse(cli.__name__, argv), positional=False)
    except UserError as error:
        cli._say(error)
    except SystemExit as end:
        assert end.code == 2, end.code
    else:
        print("passed", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_all_commands_are_imported_together():
    for name in COMMANDS:
        assert callable(importlib.import_module(f"jaxcl.commands.{name}").command)


FILES = {
    "syntax": ("import os\n\ndef get_config(:\n    pass\n", ":3: SyntaxError: invalid syntax"),
    "zero": ("def get_config():\n    x = 0\n    return 1 / x\n", ":3: ZeroDivisionError: division by zero"),
    "type": (
        "from configs import digits\ndef get_config():\n    config = digits.get_config()\n    config.batch_size = 'a'\n",
        ":4: TypeError: Could not override field 'batch_size' (reference). a is of original type <class 'str'>",
    ),
    "key": ("def get_config():\n    return {}['a']\n", ":2: KeyError: a"),
    "os": ("def get_config():\n    return open('/nowhere/x')\n", ":2: FileNotFoundError: "),
    "import": ("import nothing_there\n", ":1: ModuleNotFoundError: No module named 'nothing_there'"),
    "exit": ("import sys\ndef get_config():\n    sys.exit('not today')\n", ":3: SystemExit: not today"),
    "exit with 0": ("import sys\nsys.exit(0)\n", ":2: SystemExit: 0"),
    "none": ("def get_config():\n    return None\n", " has no get_config() that returns a ConfigDict"),
    "no function": ("x = 1\n", " has no get_config() that returns a ConfigDict"),
}


def test_a_config_file_that_fails_costs_one_line(tmp_path):
    """The file, the line and the message."""
    paths = {name: tmp_path / f"{name.replace(' ', '_')}.py" for name in FILES}
    for name, (text, _) in FILES.items():
        paths[name].write_text(text)
    lines = parsed(*(f"--config={path}" for path in paths.values()), f"--config={paths['os']} --config.batch_size=3")
    wanted = [f"error: --config: {path}{FILES[name][1]}" for name, path in paths.items()]
    wanted.append(wanted[list(paths).index("os")])
    assert [line[: len(want)] for line, want in zip(lines, wanted, strict=True)] == wanted


MISTAKES = {
    f"{DIGITS}:foo": "--config: configs/digits.py: get_config() takes no argument 'foo'",
    "--config configs/digits.py:foo": "--config: configs/digits.py: get_config() takes no argument 'foo'",
    "--config=configs/split_cifar10.py:foo": "--config=configs/split_cifar10.py:foo: no such size",
    "--config=configs/nowhere.py": "--config: there is no file configs/nowhere.py",
    "--config=digts": "--config: no config called 'digts' is shipped; did you mean digits?",
    "--config split_cifar10:foo": "--config=configs/split_cifar10.py:foo: no such size",
    f"{DIGITS} --config.model.options.foo=3": "--config.model.options.foo: no such field; allowed are hidden; the network",
    f"{DIGITS} --config.bufer.capacity=3": "--config.bufer.capacity: no such field; did you mean buffer?",
    f"{DIGITS} --config.seed.a=3": "--config.seed.a: no such field",
    f"{DIGITS} --config.batch_size=many": "flag --config.batch_size=many: invalid literal",
    "--stall_seconds=nan": "--stall_seconds: nan is not allowed, give 0 or more",
    "--stall_seconds=-1": "--stall_seconds: -1.0 is not allowed",
    "--heartbeat_seconds=0": "--heartbeat_seconds: 0 is not allowed",
    "--devices=0": "--devices: 0 is not allowed, give a number from 1 to 512",
    "--devices=1000": "--devices: 1000 is not allowed, give a number from 1 to 512",
    "--devices=100000": "--devices: 100000 is not allowed",
    "--coordinator=here": "--coordinator: 'here' is not allowed, give HOST:PORT with a port from 1 to 65535",
    "--coordinator=here:0": "--coordinator: 'here:0' is not allowed",
    "--coordinator=here:70000": "--coordinator: 'here:70000' is not allowed",
    "--coordinator=:80": "--coordinator: ':80' is not allowed",
    "--coordinator=here:80": "--num_processes: missing",  # the address itself is right
    "--coordinator=[::1]:80": "--num_processes: missing",
    "er": "argument 'er' is not understood",
}


def test_a_mistake_costs_one_line():
    lines = parsed(*MISTAKES)
    wanted = [f"error: {message}" for message in MISTAKES.values()]
    assert [line[: len(want)] for line, want in zip(lines, wanted, strict=True)] == wanted
    assert parsed(f"{DIGITS} --config.buffer.capacity=300 --stall_seconds=0") == ["passed"]
    by_name = ("--config=digits --config.seed=3", "--config split_cifar10:cpu", "-config=paper_tinyimagenet:cpu")
    assert parsed(*by_name) == ["passed"] * 3


def test_what_lies_beside_a_config_can_be_imported(tmp_path):
    """Named as `module:name` in the config, or imported by it; installed packages come first."""
    (tmp_path / "of_mine.py").write_text("SEED = 7\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('not this one')\n")
    text = "import json\nimport of_mine\nfrom jaxcl import shipped\n\ndef get_config():\n"
    text += "    config = shipped.load('digits').get_config()\n    config.seed = of_mine.SEED\n    return config\n"
    (tmp_path / "mine.py").write_text(text)
    assert parsed(f"--config={tmp_path / 'mine.py'}") == ["passed"]


def test_the_command_lists_its_commands_and_knows_no_other():
    def jaxcl(*arguments):
        return subprocess.run([sys.executable, "-m", "jaxcl", *arguments], cwd=REPO, capture_output=True, text=True)

    listed = jaxcl("--help")
    assert listed.returncode == 0 and all(f"    {name} " in listed.stdout for name in COMMANDS)
    assert "sweep     Searches hyper-parameters" in listed.stdout
    wrong = jaxcl("trian")
    assert (wrong.returncode, wrong.stderr) == (2, "error: 'trian' is no command; did you mean train?\n")


def test_a_config_is_copied_and_no_file_replaced(tmp_path):
    assert configs.copy("digits", tmp_path / "new").read_bytes() == shipped.path_of("digits").read_bytes()
    (tmp_path / "new" / "digits.py").write_text("mine")
    with pytest.raises(UserError, match=r"--to: .*digits.py is there already; remove it or give another folder"):
        configs.copy("digits", tmp_path / "new")
    assert (tmp_path / "new" / "digits.py").read_text() == "mine"
    with pytest.raises(UserError, match="no config called 'digit' is shipped; did you mean digits"):
        configs.copy("digit", tmp_path)


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_config_is_described_and_works_as_a_copy(name, tmp_path):
    assert shipped.about(name)
    copy = configs.copy(name, tmp_path)
    assert isinstance(from_config_file(str(copy), "get_config"), ConfigDict)
