"""The parts of docs/paper.md and of the README that are filled from result files.

python -m experiments.paper.page        also draws the pictures anew
"""

import json
import pathlib

from experiments.pages import page
from experiments.pages.page import Json
from experiments.paper import accuracy, draw, gap, memory, phases, scaling, sweep, uniformity
from experiments.studies import rehearsal

# Each has a TITLE, and measure(study) -> found, picture(found) and markdown(found).
FIGURES = {one.__name__.rpartition(".")[2]: one for one in (accuracy, sweep, scaling, phases, memory, uniformity)}
PAGE, FRONT, IMAGES = page.ROOT / "docs" / "paper.md", page.ROOT / "README.md", page.ROOT / "docs" / "images"


def read(figure: str, results: pathlib.Path = page.RESULTS) -> Json | None:
    """A figure's numbers; None before they are measured."""
    path = results / f"paper_{figure}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def sections(results: pathlib.Path = page.RESULTS) -> dict[str, str]:
    """Mark -> what docs/paper.md shows there."""
    return {name: section(name, read(name, results)) for name in FIGURES} | {"rehearsal": what_is_missing(results)}


def study(results: pathlib.Path = page.RESULTS) -> Json | None:
    """What `experiments.studies.rehearsal` found at the medium size; None before it is measured."""
    path = results / "rehearsal_medium.json"
    return json.loads(path.read_text()) if path.is_file() else None


def what_is_missing(results: pathlib.Path = page.RESULTS) -> str:
    found = study(results)
    if found is None:
        return "Not measured yet."
    picture = f"![{gap.TITLE}](images/rehearsal_medium.png)"
    return f"{picture}\n\n{rehearsal.markdown(found)}\n\n{page.where(found)}"


def section(figure: str, found: Json | None) -> str:
    if found is None:
        return "Not measured yet."
    one = FIGURES[figure]
    picture = f"![{one.TITLE}](images/paper_{figure}.png)"
    return f"{picture}\n\n{one.markdown(found)}\n\n{page.where(found)} {found.get('note', '')}".rstrip()


def front(results: pathlib.Path = page.RESULTS) -> str:
    """What the README shows."""
    found = study(results)
    return (
        "Not measured yet."
        if found is None
        else f"{gap.front(found)}\n\n![{gap.TITLE}](docs/images/rehearsal_medium.png)"
    )


def write() -> None:
    page.fill(PAGE, sections())
    page.fill(FRONT, {"front": front()})


if __name__ == "__main__":
    for name, one in FIGURES.items():
        if (found := read(name)) is not None:
            draw.save(one.picture, found, IMAGES / f"paper_{name}.png")
    if (found := study()) is not None:
        draw.save(gap.picture, found, IMAGES / "rehearsal_medium.png")
    write()
