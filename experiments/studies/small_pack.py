"""Cuts a data set down to the first rows of each class, or of some classes, as an archive for `data.source = npz:FILE`.

python -m experiments.studies.small_pack --from=tfds:cifar10 [--from_dir=TFDS_DIR] --train=500 --test=100 [--every=1] --out=FILE
"""

import numpy as np
from absl import flags

from jaxcl import cli, data
from jaxcl.check import POSITIVE, check

SOURCE = flags.DEFINE_string("from", None, "as config.data.source")
DATA_DIR = flags.DEFINE_string("from_dir", None, "as config.data.data_dir")
TRAIN = flags.DEFINE_integer("train", 500, "training rows of each class")
TEST = flags.DEFINE_integer("test", 100, "test rows of each class")
EVERY = flags.DEFINE_integer("every", 1, "of the classes, in order, the first of every so many; they are numbered anew")


def main() -> None:
    train, test = data.open_source(cli.required(SOURCE), DATA_DIR.value)
    arrays = pack(train, test, TRAIN.value, TEST.value, EVERY.value)
    np.savez_compressed(cli.required(cli.OUT), allow_pickle=False, **arrays)
    print(f"{cli.OUT.value}: {len(arrays['y_train']):,} training and {len(arrays['y_test']):,} test rows")


def pack(
    train: data.Source, test: data.Source, train_rows: int, test_rows: int, every: int = 1
) -> dict[str, np.ndarray]:
    """The archive's arrays: of classes 0, every, 2 every, ... the first rows, or all where one has fewer, in the order of the
    source.

    Raises:
      UserError: a number is not positive.
    """
    for flag, number in (("train", train_rows), ("test", test_rows), ("every", every)):
        check(f"--{flag}", number, POSITIVE)
    classes = range(0, train.num_classes, every)
    arrays: dict[str, np.ndarray] = {"class_names": np.array([train.class_names[k] for k in classes])}
    for split, source, count in (("train", train, train_rows), ("test", test, test_rows)):
        rows = np.sort(np.concatenate([np.flatnonzero(source.labels == k)[:count] for k in classes]))
        arrays |= {f"x_{split}": source.read(rows), f"y_{split}": source.labels[rows] // every}
    return arrays


if __name__ == "__main__":
    cli.run(main)
