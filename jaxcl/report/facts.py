"""What a report says of its runs beside their scores: where they come from, what differs, what each seed found."""

import html
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxcl.report.runs import Group, differences, names_of
from jaxcl.report.tables import rows_of


def title(groups: Sequence[Group]) -> str:
    """The names that the configs give."""
    names = dict.fromkeys(str(result.get("name") or "") for group in groups for result in group.results)
    return " / ".join(filter(None, names)) or "Continual learning runs"


def facts(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """What was run, on what, by what, when; each with all that the runs say of it."""
    told: dict[str, Callable[[dict[str, Any]], Any]] = {
        "data": lambda r: r["source"],
        "tasks": lambda r: f"{len(r['tasks'])}, scenario {r['config'].get('data', {}).get('scenario', 'class')}",
        "evaluated on": lambda r: r.get("evaluated_on"),
        "model": lambda r: r["model"],
        "devices": lambda r: f"{r['devices']['count']} x {r['devices'].get('kind', 'device')}",
        "versions": lambda r: ", ".join(f"{name} {version}" for name, version in r["versions"].items()),
        "commit": lambda r: r.get("commit"),
        "trained": lambda r: r.get("finished"),
        "command": lambda r: r.get("command"),
    }
    found = []
    for name, tell in told.items():
        values = dict.fromkeys(str(value) for g in groups for r in g.results if (value := tell(r)))
        if name == "trained" and len(values) > 1:
            values = dict.fromkeys((f"{min(values)} to {max(values)}",))
        found += [(name, " / ".join(values))] if values else []
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    called = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv[0] else ""
    return [*found, ("this page", f"{when}{', ' if called else ''}{called}")]


def tasks_table(groups: Sequence[Group]) -> list[list[str]]:
    """The classes of each task, one table for all groups of the same tasks; a row says which groups where they differ."""
    kinds: dict[str, list[str]] = {}
    tables: dict[str, list[list[str]]] = {}
    for group in groups:
        names = names_of(group.results[0])
        rows = [
            [str(i), ", ".join(names[x] for x in task)] for i, task in enumerate(group.results[0]["tasks"], start=1)
        ]
        kinds.setdefault(str(rows), []).append(group.label)
        tables[str(rows)] = rows
    if len(kinds) == 1:
        return [["task", "classes"], *next(iter(tables.values()))]
    return [["task", "classes", "in"], *([*row, "; ".join(kinds[key])] for key, rows in tables.items() for row in rows)]


def differences_table(groups: Sequence[Group]) -> list[list[str]]:
    """A row a group, a column a field in which they differ; [] for one group."""
    found = differences(groups)
    if not found.keys() - {"strategy"}:  # which every table tells
        return []
    return [["", *found], *([group.label, *(values[i] for values in found.values())] for i, group in enumerate(groups))]


def seeds_table(groups: Sequence[Group], out: Path) -> list[list[str]]:
    """What every run found by itself, and its folder, seen from the page's where it lies below that."""
    rows: list[list[str]] = []
    for group in groups:
        one_by_one = [
            Group(group.label, group.strategy, [r], [p]) for r, p in zip(group.results, group.paths, strict=True)
        ]
        header, *values = rows_of(one_by_one)
        for result, path, row in zip(group.results, group.paths, values, strict=True):
            row[1] = str(result["seed"])
            rows.append([*row, str(path.relative_to(out)) if path.is_relative_to(out) else str(path)])
        if len(rows) == len(values):
            rows.insert(0, [header[0], "seed", *header[2:], "folder"])
    return rows


def definitions(found: Sequence[tuple[str, str]]) -> str:
    """Facts as a list of HTML."""
    items = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in found)
    return f"<dl>{''.join(items)}</dl>"
