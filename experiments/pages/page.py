"""What the pages of docs share: their prose is markdown, and programs fill in what stands between marks.

<!-- NAME -->
written by a program
<!-- end -->
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
PLACE = re.compile(r"(<!-- (?!end -->)(.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Json = dict[str, Any]


def fill(path: pathlib.Path, parts: Mapping[str, str]) -> None:
    """Writes each mark's markdown into its place of the page at `path`; see `filled`."""
    path.write_text(filled(path.read_text(), parts))


def filled(text: str, parts: Mapping[str, str]) -> str:
    """The page `text` with the markdown of `parts` between its marks.

    Raises:
      ValueError: the marks of the page are not those of `parts`.
    """
    marks = [name for _, name, _ in PLACE.findall(text)]
    if sorted(marks) != sorted(parts):
        raise ValueError(f"the page has the marks {sorted(marks)}, the program fills {sorted(parts)}")
    return PLACE.sub(lambda place: f"{place[1]}{parts[place[2]]}\n{place[3]}", text)


def load(name: str) -> Json:
    """The result file `experiments/results/NAME.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def measured(name: str, markdown: Callable[[Json], str]) -> str:
    """The table of a result file, with where it was measured; a line where there is none yet."""
    if not (RESULTS / f"{name}.json").is_file():
        return "Not measured yet."
    found = load(name)
    return f"{markdown(found)}\n\n{where(found)}"


def as_json(found: Json) -> str:
    """JSON with a record a line: records are the elements of a list, or those of a dict that holds nothing else."""
    return _lines(found, "", opened=True) + "\n"


def _lines(x: Any, indent: str, opened: bool = False) -> str:
    inner = indent + " "
    if isinstance(x, dict) and (opened or _holds_records(x)):
        body = [f"{_line(str(key))}: {_lines(value, inner)}" for key, value in x.items()]
        return "{\n" + ",\n".join(inner + line for line in body) + f"\n{indent}}}"
    if _is_records(x):
        return "[\n" + ",\n".join(inner + _line(one) for one in x) + f"\n{indent}]"
    return _line(x)


def _line(x: Any) -> str:
    return json.dumps(x, ensure_ascii=False, default=lambda value: np.asarray(value).tolist())


def _is_records(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and isinstance(x[0], dict)


def _holds_records(x: Any) -> bool:
    if not isinstance(x, dict) or not x:
        return False
    values = x.values()
    return all(isinstance(y, dict) for y in values) or any(_is_records(y) or _holds_records(y) for y in values)


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table."""
    header = list(header)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def spread(values: Json) -> str:
    """Median and the range from p10 to p90."""
    return f"{values['median']:.3g} ({values['p10']:.3g} to {values['p90']:.3g})"


def where(result: Json) -> str:
    """Device, versions and command of a result, as far as it says."""
    machine, devices, versions = (result.get(name, {}) for name in ("machine", "devices", "versions"))
    said = [
        f"{devices['count']} {devices['kind']} device(s)" if devices else "",
        f"{machine['cores']} cores" if machine else "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"`{result['command']}`" if "command" in result else "",
    ]
    return "Measured on " + "; ".join(x for x in said if x) + "."
