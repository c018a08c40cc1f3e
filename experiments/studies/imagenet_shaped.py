"""Makes a TFDS set of JPEG files shaped like those of ImageNet from a data set of small images.

python -m experiments.studies.imagenet_shaped --from=tfds:cifar10 [--from_dir=TFDS_DIR] --out=TFDS_DIR
    [--train_rows=2000] [--test_rows=500]

The set, `tfds:imagenet_shaped` in that folder, is for measuring input, not for learning. Its images are enlarged, with detail
and noise added so that a file takes about as many bytes a pixel as one of ImageNet: 100 KB at 500 x 375. Half of them have that
shape, the others sides of many lengths, and a few are large, grey, CMYK, progressive or not subsampled, as there.
"""

import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from experiments.studies.small_pack import DATA_DIR, SOURCE
from jaxcl import cli, data
from jaxcl.check import POSITIVE, check
from jaxcl.errors import UserError

TRAIN = flags.DEFINE_integer("train_rows", 2000, "training rows")
TEST = flags.DEFINE_integer("test_rows", 500, "test rows")

NAME, VERSION = "imagenet_shaped", "1.0.0"
SIZE = (500, 375)  # width and height of most
COMMON = 0.5  # the share of images of this size; a fifth of the rest stand upright with it
SIDES, LARGE, LARGE_SIDES = (200, 640), 0.03, (1000, 2000)
DETAIL, NOISE = 40.0, 9.0  # standard deviations, of 255
QUALITY = 95


def main() -> None:
    for flag in (TRAIN, TEST):
        check(f"--{flag.name}", flag.value, POSITIVE)
    folder = pathlib.Path(cli.required(cli.OUT)).expanduser()
    if (folder / NAME).exists():
        raise UserError(f"--out: {folder / NAME} is there already, remove it or give another folder")
    train, test = data.open_source(cli.required(SOURCE), DATA_DIR.value)
    prepare(folder, train, test, TRAIN.value, TEST.value)
    print(f"data.source=tfds:{NAME} data.data_dir={folder}: {TRAIN.value:,} training and {TEST.value:,} test rows")


def prepare(folder: pathlib.Path, train: data.Source, test: data.Source, train_rows: int, test_rows: int) -> None:
    """Writes the set below `folder`; of a source with fewer rows some come several times, each with another shape."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_metadata

    class Shaped(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(VERSION)

        @classmethod
        def get_metadata(cls) -> dataset_metadata.DatasetMetadata:
            return dataset_metadata.DatasetMetadata(description="Enlarged images.", citation="", tags=[])

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=list(train.class_names)),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": examples(train, train_rows, 0), "test": examples(test, test_rows, 1)}

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # the splits bring theirs

    Shaped.name = NAME
    Shaped(data_dir=str(folder), file_format="array_record").download_and_prepare()


def examples(source: data.Source, rows: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """`rows` numbered examples of the set."""
    for i in range(rows):
        rng = np.random.default_rng((seed, i))
        row = i % len(source)
        yield i, {"image": io.BytesIO(jpeg(source.read(np.array([row]))[0], rng)), "label": int(source.labels[row])}


def jpeg(image: np.ndarray, rng: np.random.Generator) -> bytes:
    """A file of an image uint8 `[h, w, C]`, enlarged to a size that is drawn."""
    return encoded(enlarged(image, draw_size(rng), rng), rng)


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height."""
    kind = rng.random()
    if kind < COMMON:
        return SIZE
    if kind < COMMON + (1 - COMMON) / 5:
        return SIZE[::-1]
    width, height = rng.integers(*(LARGE_SIDES if kind > 1 - LARGE else SIDES), 2)
    return int(width), int(height)


def enlarged(image: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """An image uint8 `[h, w, C]` as RGB of `size`, with detail of every scale from 2 to 16 pixels, and noise of each pixel."""
    width, height = size
    small = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.float32)
    for scale in (2, 4, 8, 16):
        coarse = rng.integers(0, 256, (-(-height // scale), -(-width // scale)), np.uint8)
        detail = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
        pixels = pixels + DETAIL / 4 * detail[..., None]
    pixels = pixels + NOISE * rng.standard_normal((height, width, 1), np.float32)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, rng: np.random.Generator) -> bytes:
    """A JPEG file; one of a hundred each is grey, CMYK, progressive, or keeps its colours in full resolution."""
    options: dict[str, Any] = {}
    match int(rng.integers(100)):
        case 0:
            image = image.convert("L")
        case 1:
            image = image.convert("CMYK")
        case 2:
            options["progressive"] = True
        case 3:
            options["subsampling"] = "4:4:4"
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, **options)
    return file.getvalue()


if __name__ == "__main__":
    cli.run(main)
