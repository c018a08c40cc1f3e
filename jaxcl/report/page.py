"""One self-contained HTML page."""

import base64
import functools
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxcl import marks
from jaxcl.errors import StorageError, UserError
from jaxcl.report.facts import definitions, differences_table, facts, seeds_table, tasks_table, title
from jaxcl.report.gallery import PICTURES, drawer
from jaxcl.report.look import CSS, SCRIPT
from jaxcl.report.runs import Group, Run, common_measure, group_runs
from jaxcl.report.tables import rows_of, unfinished

PAGE = "report.html"


def _html_table(rows: Iterable[Sequence[str]], colors: Iterable[str] = (), *, words: bool = False) -> str:
    """Rows of text, the header first, which sort; `colors` of a dot in front of each row below it. With `words` cells hold
    sentences, which are broken into lines."""
    header, *cells = ([html.escape(cell) for cell in row] for row in rows)
    for color, row in zip(colors, cells, strict=False):
        row[0] = f'<span class="dot" style="background:{color}"></span>{row[0]}'
    lines = ["<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells]
    table = "\n".join(["<thead>", lines[0], "</thead><tbody>", *lines[1:], "</tbody>"])
    return f'<div class="scroll" tabindex="0"><table class="{"words" if words else "sorts"}">{table}</table></div>'


def _html_picture(title: str, caption: str, light: bytes, dark: bytes) -> str:
    """A picture for a light page, and one for a dark one, which paper never is."""
    source, night = (f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in (light, dark))
    return (
        f'<div class="picture"><h2>{title}</h2><p>{caption}</p><div class="scroll" tabindex="0"><picture>'
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{night}">'
        f'<img alt="{title}" src="{source}"></picture></div></div>'
    )


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
    """Writes PNGs and report.html, which embeds them, into `out` (created if need be) -> path of the page.

    The sections come after the runs' own table. Runs without a result are listed on the page; with no finished run there
    are no pictures.

    Raises:
      UserError: see `check_out`; nothing is written then.
      StorageError: it cannot be written; every file in it is whole, of this report or of the one before.
    """
    out = Path(out)
    check_out(out)
    files = _files(runs, sections, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"out: {out} cannot be made: {error.strerror}; give another folder") from error
    for name, content in files.items():
        _write(out / name, content)
    return out / PAGE


def _files(runs: Sequence[Run], sections: Sequence[Section], out: Path) -> dict[str, bytes]:
    """What a report consists of, by the names of its files."""
    from jaxcl.report.style import color_of  # here, as it imports Matplotlib

    files: dict[str, bytes] = {}
    groups = group_runs(runs)
    name = title(groups)
    body = [f"<h1>{html.escape(name)}</h1>"]
    if groups:
        colors = [color_of(group.strategy) for group in groups]
        body += [_html_table(rows_of(groups), colors)]
        body.append(
            "<p>Mean ± standard deviation over seeds. Forgetting: best earlier accuracy minus the last (Chaudhry et "
            "al. 2018). Backward transfer: last accuracy minus the first (Lopez-Paz &amp; Ranzato 2017). Of errors, the "
            "same with their signs turned: where an error rises, forgetting is positive.</p>"
        )
        body.append(definitions(facts(groups)))
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.caption)}</p>"]
        body.append(_html_table(section.rows))
    if groups:
        found, pictures = _pictures(groups)
        files |= found
        body += pictures
        if differ := differences_table(groups):
            body += ["<h2>What differs</h2>", "<p>The fields of the config in which these runs differ.</p>"]
            body.append(_html_table(differ, colors))
        body += ["<h2>Every seed</h2>", "<p>Each run by itself, and its folder.</p>"]
        each = [color for color, group in zip(colors, groups, strict=True) for _ in group.results]
        body.append(_html_table(seeds_table(groups, out), each))
        body += ["<h2>Tasks</h2>", _html_table(tasks_table(groups), words=True)]
    if problems := unfinished(runs):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in problems)
        body += ["<h2>Runs without a result</h2>", f"<ul>{items}</ul>"]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{marks.HTML}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)} · jaxcl report</title><style>{CSS}</style></head><body>\n"
        + "\n".join(body)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )
    return {**files, PAGE: page.encode()}


def _pictures(groups: Sequence[Group]) -> tuple[dict[str, bytes], list[str]]:
    """The files of the pictures, and the parts of the page that show them."""
    from jaxcl.report.style import drawn

    files, parts, measure = {}, [], common_measure(groups)
    for name, (_, *texts) in PICTURES.items():
        heading, caption = (text.format(measure=measure) for text in texts)
        images = [drawn(functools.partial(drawer(name), groups), dark) for dark in (False, True)]
        if images[0] is not None and images[1] is not None:
            files[f"{name}.png"] = images[0]
            parts.append(_html_picture(heading[0].upper() + heading[1:], caption, images[0], images[1]))
    return files, parts


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
