"""Arrays of one's own handed to a run, which is stopped by nothing here but could be: its folder belongs to these arrays.

    python -m examples.own_arrays

Coloured squares in six classes, three tasks of two. Rows by random access, such as Grain's and TFDS's data sources, and a
`jaxcl.data.Source` are handed over alike.
"""

import pathlib
import tempfile

import numpy as np

import jaxcl
from jaxcl.errors import UserError
from jaxcl.mesh import use_fake_devices

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
CLASSES = tuple(f"{place} {colour}" for place in ("left", "right") for colour in COLOURS)


def squares(rows: int, seed: int) -> dict[str, np.ndarray | tuple[str, ...]]:
    """Images uint8 `[n, 12, 12, 3]`: noise with a square of one of three colours in the left or the right half."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % len(CLASSES)
    images = rng.integers(0, 120, (rows, 12, 12, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        left = rng.integers(0, 3) + 6 * (label // 3)
        image[4:8, left : left + 4] = list(COLOURS.values())[label % 3]
    return {"images": images, "labels": labels, "class_names": CLASSES}


def main(folder: pathlib.Path) -> float:
    """Average accuracy over all tasks."""
    config = jaxcl.default_config()
    config.data.tasks, config.epochs, config.batch_size = 3, 4, 32
    config.model.name = "convnet"
    config.model.options = {"width": 8}
    config.buffer.capacity, config.buffer.representatives, config.buffer.candidates = 120, 32, 16
    train, test = squares(1200, seed=0), squares(300, seed=1)
    result = jaxcl.train_and_evaluate(config, folder, train=train, test=test, progress=False)
    try:
        jaxcl.train_and_evaluate(config, folder, train=squares(1200, seed=2), test=test, progress=False)
    except UserError as error:
        print(error)  # other arrays do not belong here
    assert jaxcl.load(folder).class_names == CLASSES
    return result["average_accuracy"]


if __name__ == "__main__":
    use_fake_devices(4)
    with tempfile.TemporaryDirectory() as root:
        accuracy = main(pathlib.Path(root))
    print(f"accuracy over all tasks: {accuracy:.2f}")
    assert accuracy > 0.8
