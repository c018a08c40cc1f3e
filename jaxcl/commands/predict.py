"""Classifies images by the network that a run has trained.

jaxcl predict WORKDIR FILES... [--top=3] [--json=FILE]

FILES are images (PNG, JPEG and what else Pillow reads) and arrays: .npy, or .npz with images or x_test, uint8 `[n, H, W]` or
`[n, H, W, C]`. Images are cut as in the run's evaluation if its config says data.image_size, and else have the size that the
network reads. A line an image: the likeliest classes and their probabilities; --json writes all of them, `-` prints them.
"""

import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from absl import flags

from jaxcl import cli
from jaxcl.check import POSITIVE, check
from jaxcl.data import window
from jaxcl.errors import StorageError, UserError
from jaxcl.report import text_table
from jaxcl.training.trained import Trained, load

TOP = flags.DEFINE_integer("top", 3, "how many classes to print, the likeliest first")
ARRAYS = ("images", "x_test")  # of an .npz file, the first that is there


def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise UserError("WORKDIR FILES...: missing; give the folder of a run and at least one file")
    check("--top", TOP.value, POSITIVE)
    model = load(arguments[0])
    found = [(name, image) for file in arguments[1:] for name, image in images_of(model, pathlib.Path(file))]
    probabilities = model.predict(np.stack([image for _, image in found]))
    if isinstance(probabilities, dict):
        raise UserError(
            f"WORKDIR: {arguments[0]} holds a network that reconstructs images; use jaxcl.load(...).predict"
        )
    names = [name for name, _ in found]
    if cli.JSON.value is not None:
        write_json(cli.JSON.value, model, names, probabilities)
    if cli.JSON.value != "-":
        print(text_table(rows_of(model, names, probabilities)))


def images_of(model: Trained, path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """The images of a file, uint8 `[H, W, C]` as the network reads them, each with a name.

    Raises:
      UserError: the file cannot be read, or holds other images.
    """
    try:
        if path.suffix in (".npy", ".npz"):
            yield from ((f"{path}[{i}]", image) for i, image in enumerate(_arrays(model, path)))
        else:
            yield str(path), _image(model, path)
    except UserError:
        raise
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "is it damaged, or no image?"
        raise UserError(f"FILES: {path} cannot be read: {why}") from None


def _image(model: Trained, path: pathlib.Path) -> np.ndarray:
    from PIL import Image

    content, (height, width, channels) = path.read_bytes(), model.image_shape
    if model.config.data.image_size is not None:
        return window.middle(content, model.image_shape)
    with Image.open(path) as image:
        if image.size != (width, height):
            size = f"{image.size[0]}x{image.size[1]}"
            raise UserError(f"FILES: {path} is {size}, the network reads {width}x{height}; scale it first")
        return np.asarray(image.convert(window.MODES[channels])).reshape(model.image_shape)


def _arrays(model: Trained, path: pathlib.Path) -> np.ndarray:
    found = np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        key = next((key for key in ARRAYS if key in found), None)
        if key is None:
            raise UserError(f"FILES: {path} holds {', '.join(found)}, give {' or '.join(ARRAYS)}")
        found = found[key]
    images = found[..., None] if found.ndim == 3 and model.image_shape[2] == 1 else found
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != model.image_shape or not len(images):
        wanted = ", ".join(map(str, model.image_shape))
        raise UserError(f"FILES: {path} holds {found.dtype} {found.shape}, give uint8 [n, {wanted}]")
    return images


def rows_of(model: Trained, names: list[str], probabilities: np.ndarray) -> list[list[str]]:
    """The header, then a row an image: class and per cent, the likeliest first."""
    top = min(TOP.value, len(model.class_names))
    rows = [["image", *(head for _ in range(top) for head in ("class", "%"))]]
    for name, mine in zip(names, probabilities, strict=True):
        best = np.argsort(-mine, kind="stable")[:top]
        rows.append([name, *(cell for k in best for cell in (model.class_names[k], f"{100 * mine[k]:.1f}"))])
    return rows


def write_json(path: str, model: Trained, names: list[str], probabilities: np.ndarray) -> None:
    """{"class_names": [...], "images": [{"name", "class", "probabilities"}]}; `-` is standard output."""
    images = [
        {"name": name, "class": model.class_names[int(mine.argmax())], "probabilities": mine.tolist()}
        for name, mine in zip(names, probabilities, strict=True)
    ]
    text = json.dumps({"class_names": list(model.class_names), "images": images}, indent=1)
    if path == "-":
        print(text)
        return
    try:
        pathlib.Path(os.path.expanduser(path)).write_text(text + "\n")
    except OSError as error:
        raise StorageError(f"--json: {path} cannot be written: {error.strerror}") from error


def command() -> None:
    cli.run(main, positional=True, takes=(TOP, cli.JSON, cli.DEVICES, cli.CACHE))
