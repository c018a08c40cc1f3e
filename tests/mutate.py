"""Breaks a file in one place at a time and tells which breaks a test notices: a measure of what the tests guard.

    python tests/mutate.py jaxcl/losses.py [--lines=20-60] [--most=40] [--json=FILE] -- tests/unit/test_losses.py [-k ...]

A mutant is the file with one comparison or operation turned into another one, `not` or a minus sign left out, `and` and `or`
swapped, a number or a truth value changed, or an argument given by name left out. Annotations, strings and `raise` statements
stay as they are. The file is written into a copy of the checkout, where the tests named behind `--` run with `-x -q`, in one
process. A mutant that no test notices has survived: a test is missing, or the two programs do the same.

Prints JSON: every mutant that was killed or survived, by line and column, with what stood there and what took its place.
"""

import argparse
import ast
import copy
import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATIONS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NOTICED, UNNOTICED = (1, 2), 0  # statuses of pytest: a test failed, or the mutant cannot even be imported
ANNOTATIONS = ("annotation", "returns", "type_params")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A file with one change.

    Attributes:
      line, column: where, both from 1.
      before, after: the expression there and what took its place.
      source: the whole file.
    """

    line: int
    column: int
    before: str
    after: str
    source: str

    def record(self) -> dict[str, Any]:
        return {name: x for name, x in dataclasses.asdict(self).items() if name != "source"}


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its text."""
    lines = [0]
    raw = source.encode()  # columns of the tree count bytes
    for line in raw.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = []
    for node in _expressions(ast.parse(source)):
        begin = lines[node.lineno - 1] + node.col_offset
        assert node.end_lineno is not None and node.end_col_offset is not None
        end = lines[node.end_lineno - 1] + node.end_col_offset
        for changed in _changes(node):
            after = ast.unparse(changed)
            text = raw[:begin] + f"({after})".encode() + raw[end:]
            column = len(raw[lines[node.lineno - 1] : begin].decode()) + 1
            found.append(Mutant(node.lineno, column, raw[begin:end].decode(), after, text.decode()))
    return sorted(found, key=lambda one: (one.line, one.column))


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """All of a tree that may be changed."""
    for name, value in ast.iter_fields(node):
        if name in ANNOTATIONS or (name == "format_spec" and value is not None):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                continue
            if isinstance(child, ast.expr):
                yield child
            yield from _expressions(child)


def _changes(node: ast.expr) -> Iterator[ast.expr]:
    """What may take the place of an expression."""
    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                yield _with(node, ops=[*node.ops[:i], COMPARISONS[type(operator)](), *node.ops[i + 1 :]])
        case ast.BinOp() if type(node.op) in OPERATIONS:
            yield _with(node, op=OPERATIONS[type(node.op)]())
        case ast.BoolOp():
            yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1 if value + 1 != value else 2 * value)
        case ast.Call():
            for i, keyword in enumerate(node.keywords):
                if keyword.arg is not None:
                    yield _with(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])


def _with(node: ast.expr, **fields: Any) -> ast.expr:
    """A copy with other fields; its children are those of the node."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def measure(root: pathlib.Path, file: str, chosen: list[Mutant], tests: list[str]) -> dict[str, Any]:
    """Which of these mutants of `file`, a path within the checkout at `root`, the tests notice.

    Raises:
      ValueError: the tests do not pass as the file is.
    """
    with tempfile.TemporaryDirectory(prefix="mutate_") as name:
        folder = pathlib.Path(name) / root.name
        _copy(root, folder)
        begin = time.perf_counter()
        status = _run(folder, root, tests, None)
        if status != UNNOTICED:
            raise ValueError(f"pytest {' '.join(tests)} ends with {status} without any change")
        limit = 60 + 3 * (time.perf_counter() - begin)
        killed, survived = [], []
        for i, mutant in enumerate(chosen):
            (folder / file).write_text(mutant.source)
            status = _run(folder, root, tests, limit)
            if status not in (*NOTICED, UNNOTICED, None):
                raise ValueError(f"pytest ends with {status} at {file}:{mutant.line}")
            (survived if status == UNNOTICED else killed).append(mutant.record())
            said = "survived" if status == UNNOTICED else "killed"
            print(f"{i + 1}/{len(chosen)} {file}:{mutant.line} {said}: {mutant.after}", file=sys.stderr, flush=True)
    share = len(killed) / len(chosen) if chosen else None
    return {"file": file, "tests": tests, "killed_share": share, "killed": killed, "survived": survived}


def _copy(root: pathlib.Path, folder: pathlib.Path) -> None:
    """What git knows of the checkout and does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, check=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


def _run(folder: pathlib.Path, root: pathlib.Path, tests: list[str], limit: float | None) -> int | None:
    """The status of pytest; None if it took longer than `limit` seconds."""
    # Files of bytecode go by the second and the size of their source, which mutants have in common.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    environment.setdefault("JAXCL_PACKS", str(root.parent / "shared" / "data"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return None


def select(found: list[Mutant], lines: str | None, most: int | None) -> list[Mutant]:
    """Those within `lines`, FIRST-LAST; of these `most` at random, the same every time."""
    if lines is not None:
        first, _, last = lines.partition("-")
        found = [one for one in found if int(first) <= one.line <= int(last or first)]
    if most is not None and most < len(found):
        found = [found[i] for i in sorted(random.Random(0).sample(range(len(found)), most))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="to break, relative to the checkout")
    parser.add_argument("--lines", help="FIRST-LAST: only there")
    parser.add_argument("--most", type=int, help="mutants to try, chosen at random")
    parser.add_argument("--json", type=pathlib.Path, help="file for the result, beside standard output")
    parser.add_argument("tests", nargs="+", help="of pytest, behind --")
    asked = parser.parse_args()
    chosen = select(mutants((ROOT / asked.file).read_text()), asked.lines, asked.most)
    text = json.dumps(measure(ROOT, asked.file, chosen, asked.tests), indent=1, ensure_ascii=False)
    print(text)
    if asked.json is not None:
        asked.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
