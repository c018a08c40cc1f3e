"""One self-contained HTML page."""

import base64
import functools
import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcl import marks
from jaxcl.errors import StorageError, UserError
from jaxcl.report.runs import Group, Run, common_measure, group_runs
from jaxcl.report.tables import rows_of, unfinished

PAGE = "report.html"
# Functions of jaxcl/report/pictures.py, each with a title and a caption.
PICTURES = {
    "average_accuracy": (
        "Average {measure.name}",
        "Mean {measure.name} over the tasks seen so far, after each task. Bands: one standard deviation over seeds.",
    ),
    "accuracy_by_task": (
        "{measure.name} on each task",
        "Each line is one task, from the moment it was trained. A line that {measure.forgets} is forgetting.",
    ),
    "accuracy_matrix": (
        "{measure.name} matrix",
        "Mean over seeds, accuracies in percent. Above the stair: tasks not trained yet.",
    ),
    "time_by_phase": (
        "Time by phase",
        "Seconds, mean over seeds. Hatched: the thread of the buffer in host memory, working while the loop goes on.",
    ),
    "time_of_steps": ("Time of the steps", "The same without what comes once or between tasks."),
}
_CSS = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: #23292f; background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem }
p { margin: .25rem 0 .75rem; color: #5b6670 }
img { display: block; width: 100%; min-width: 36rem; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .5rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e8ec }
th { color: #5b6670; font-weight: 600; border-bottom: 2px solid #c9d1d8 }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600 }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }
ul { padding-left: 1.2rem; overflow-wrap: anywhere }
"""


def _html_table(rows: Iterable[Sequence[str]], colors: Iterable[str] = ()) -> str:
    """Rows of text, the header first; `colors` of a dot in front of each row below it."""
    header, *cells = ([html.escape(cell) for cell in row] for row in rows)
    for color, row in zip(colors, cells, strict=False):
        row[0] = f'<span class="dot" style="background:{color}"></span>{row[0]}'
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _about(groups: Sequence[Group]) -> str:
    """One line: what was run, on what."""
    facts: list[Callable[[dict[str, Any]], str]] = [
        lambda r: r["source"],
        lambda r: f"{len(r['tasks'])} tasks",
        lambda r: r["model"],
        lambda r: f"{r['devices']['count']} x {r['devices'].get('kind', 'device')}",
        lambda r: ", ".join(f"{name} {version}" for name, version in r["versions"].items()),
    ]
    parts = [" / ".join(dict.fromkeys(fact(r) for group in groups for r in group.results)) for fact in facts]
    return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Section:
    """A table that a command adds to the page: text, and rows of equally many cells with the header first."""

    title: str
    caption: str
    rows: Sequence[Sequence[str]]


def check_out(out: str | Path) -> None:
    """Whether a report may be written into `out`; changes nothing.

    Raises:
      UserError: it is a file, or holds a page or a picture of someone else under a name of the report's.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {str(out)!r} is a file; allowed: a folder, or a path to make one at")
    for name in (PAGE, *(f"{picture}.png" for picture in PICTURES)):
        marks.check_ours("out", out / name)


def write_report(runs: Sequence[Run], out: str | Path, sections: Sequence[Section] = ()) -> Path:
    """Writes five PNGs and report.html, which embeds them, into `out` (created if need be) -> path of the page.

    The sections come after the runs' own table. Runs without a result are listed on the page; with no finished run there
    are no pictures.

    Raises:
      UserError: see `check_out`; nothing is written then.
      StorageError: it cannot be written; every file in it is whole, of this report or of the one before.
    """
    out = Path(out)
    check_out(out)
    files = _files(runs, sections)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"out: {out} cannot be made: {error.strerror}; give another folder") from error
    for name, content in files.items():
        _write(out / name, content)
    return out / PAGE


def _files(runs: Sequence[Run], sections: Sequence[Section]) -> dict[str, bytes]:
    """What a report consists of, by the names of its files."""
    from jaxcl.report import pictures  # here: Matplotlib takes a second to import, and a run does without

    files: dict[str, bytes] = {}
    groups = group_runs(runs)
    body = ["<h1>Continual learning runs</h1>"]
    if groups:
        colors = [pictures.color_of(group.strategy) for group in groups]
        body += [f"<p>{html.escape(_about(groups))}</p>", _html_table(rows_of(groups), colors)]
        body.append(
            "<p>Mean ± standard deviation over seeds. Forgetting: best earlier accuracy minus the last (Chaudhry et "
            "al. 2018). Backward transfer: last accuracy minus the first (Lopez-Paz &amp; Ranzato 2017). Of errors, the "
            "same with their signs turned: where an error rises, forgetting is positive.</p>"
        )
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.caption)}</p>"]
        body.append(_html_table(section.rows))
    if groups:
        measure = common_measure(groups)
        for name, texts in PICTURES.items():
            title, caption = (text.format(measure=measure) for text in texts)
            title = title[0].upper() + title[1:]
            picture = pictures.png(functools.partial(getattr(pictures, name), groups))
            files[f"{name}.png"] = picture
            source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            body += [f"<h2>{title}</h2>", f"<p>{caption}</p>"]
            body.append(f'<div class="scroll"><img alt="{title}" src="{source}"></div>')
    if problems := unfinished(runs):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in problems)
        body += ["<h2>Runs without a result</h2>", f"<ul>{items}</ul>"]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{marks.HTML}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>jaxcl report</title><style>{_CSS}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    return {**files, PAGE: page.encode()}


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, whenever the command is stopped."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"out: {path} cannot be written: {error.strerror}; make room or give another folder"
        ) from error
