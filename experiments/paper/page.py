"""The parts of docs/paper.md and of the README that are filled from result files.

python -m experiments.paper.page        also draws the pictures anew
"""

import json
import pathlib

from experiments.pages import page
from experiments.pages.page import Json
from experiments.paper import accuracy, draw, memory, phases, scaling, sweep, uniformity
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
    return {name: section(name, read(name, results)) for name in FIGURES} | {"rehearsal": gap(results)}


def gap(results: pathlib.Path = page.RESULTS) -> str:
    """What `experiments.studies.rehearsal` found at the medium size."""
    path = results / "rehearsal_medium.json"
    if not path.is_file():
        return "Not measured yet."
    found = json.loads(path.read_text())
    return f"{rehearsal.markdown(found)}\n\n{page.where(found)}"


def section(figure: str, found: Json | None) -> str:
    if found is None:
        return "Not measured yet."
    one = FIGURES[figure]
    picture = f"![{one.TITLE}](images/paper_{figure}.png)"
    return f"{picture}\n\n{one.markdown(found)}\n\n{page.where(found)} {found.get('note', '')}".rstrip()


def front(results: pathlib.Path = page.RESULTS) -> str:
    """What the README shows."""
    found = read("accuracy", results)
    if found is None:
        return "Not measured yet."
    text = f"{accuracy.front(found, read('sweep', results))} {found.get('note', '')}".rstrip()
    return f"{text}\n\n![{accuracy.TITLE}](docs/images/paper_accuracy.png)"


def write() -> None:
    page.fill(PAGE, sections())
    page.fill(FRONT, {"front": front()})


if __name__ == "__main__":
    for name, one in FIGURES.items():
        if (found := read(name)) is not None:
            draw.save(one.picture, found, IMAGES / f"paper_{name}.png")
    write()
