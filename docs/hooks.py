"""What the site needs beside the pages: pictures of results, which lie with the figures that they show."""

import pathlib
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = "experiments/results"


def on_files(files: Files, config: Any) -> Files:
    """Adds them as results/*.png."""
    root = pathlib.Path(config["config_file_path"]).parent
    for path in sorted((root / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(f"](../{RESULTS}/", "](results/")
