"""A folder of images: trained on, loaded, asked about files. A folder for each class, images of any size.

    python -m examples.own_folder

Writes the squares of `own_arrays` as PNG files first. With a folder of your own the commands are

    jaxcl train --config=split_cifar10:cpu --config.data.source=folder:DIR --config.data.image_size=32 --workdir=RUN
    jaxcl predict RUN NEW.png
"""

import pathlib
import tempfile

import numpy as np
from PIL import Image

import jaxcl
from examples.own_arrays import CLASSES, squares
from jaxcl.commands.predict import images_of
from jaxcl.mesh import use_fake_devices


def write(folder: pathlib.Path, rows: int, seed: int) -> list[pathlib.Path]:
    """FOLDER/CLASS/NUMBER.png, each image scaled to a size of its own -> the files."""
    found, rng = squares(rows, seed), np.random.default_rng(seed)
    paths = []
    for i, (image, label) in enumerate(zip(found["images"], found["labels"], strict=True)):
        paths.append(folder / CLASSES[int(label)] / f"{i:04}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        side = int(rng.integers(12, 25))
        Image.fromarray(np.asarray(image)).resize((side, side)).save(paths[-1])
    return paths


def main(root: pathlib.Path) -> float:
    """The share of new images that are classified correctly."""
    write(root / "images" / "train", 1200, seed=0)
    new = write(root / "images" / "test", 300, seed=1)
    config = jaxcl.default_config()
    config.data.source, config.data.image_size = f"folder:{root / 'images'}", 12
    config.data.tasks, config.epochs, config.batch_size = 3, 4, 32
    config.model.name = "convnet"
    config.model.options = {"width": 8}
    config.buffer.capacity, config.buffer.representatives, config.buffer.candidates = 120, 32, 16
    jaxcl.train_and_evaluate(config, root / "run", progress=False)
    model = jaxcl.load(root / "run")
    images = np.stack([image for path in new for _, image in images_of(model, path)])
    named = [model.class_names[k] for k in model.predict(images).argmax(axis=1)]
    return float(np.mean([name == path.parent.name for name, path in zip(named, new, strict=True)]))


if __name__ == "__main__":
    use_fake_devices(4)
    with tempfile.TemporaryDirectory() as root:
        accuracy = main(pathlib.Path(root))
    print(f"accuracy over all tasks: {accuracy:.2f}")
    assert accuracy > 0.7
