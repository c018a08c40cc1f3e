"""The parts of docs/paper.md and of the README that are written from result files, between marks; do not edit there.

python -m experiments.paper.page
"""

import json
import pathlib
import re

from experiments.pages.page import RESULTS, ROOT, where
from experiments.paper import accuracy, draw
from experiments.paper.figures import FIGURES

IMAGES = ROOT / "docs" / "images"
PAGES = {"docs/paper.md": "images", "README.md": "docs/images"}  # page -> its pictures, from where it lies


def places(
    figure: str, results: pathlib.Path = RESULTS, images: pathlib.Path = IMAGES
) -> tuple[pathlib.Path, pathlib.Path]:
    """Where a figure's numbers and its picture lie."""
    return results / f"paper_{figure}.json", images / f"paper_{figure}.png"


def section(mark: str, images: str, results: pathlib.Path = RESULTS) -> str:
    """What stands behind a mark: a figure's picture and paragraph, or the front page's sentence."""
    figure = "accuracy" if mark == "front" else mark
    numbers, _ = places(figure, results)
    if not numbers.is_file():
        return "Not measured yet."
    found, title = json.loads(numbers.read_text()), FIGURES[figure].title
    picture = f"![{title}]({images}/paper_{figure}.png)"
    if mark == "front":
        swept, _ = places("sweep", results)
        text = accuracy.sentence(found, json.loads(swept.read_text()) if swept.is_file() else None)
        return f"{text} {found.get('note', '')}".rstrip() + f"\n\n{picture}"
    return f"{picture}\n\n{FIGURES[figure].paragraph(found)}\n\n{where(found)} {found.get('note', '')}".rstrip()


def render(text: str, images: str, results: pathlib.Path = RESULTS) -> str:
    """A page with what stands between `<!-- MARK -->` and `<!-- end -->` written anew."""
    marks = "|".join(("front", *FIGURES))
    return re.sub(
        rf"(<!-- ({marks}) -->\n).*?(\n<!-- end -->)",
        lambda match: f"{match[1]}{section(match[2], images, results)}{match[3]}",
        text,
        flags=re.DOTALL,
    )


def write() -> None:
    for name, images in PAGES.items():
        page = ROOT / name
        page.write_text(render(page.read_text(), images))


if __name__ == "__main__":
    for figure in FIGURES:
        numbers, picture = places(figure)
        if numbers.is_file():
            draw.save(FIGURES[figure].picture, json.loads(numbers.read_text()), picture)
    write()
