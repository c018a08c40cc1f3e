"""Cuts a data set down to the first rows of each class, as a NumPy archive for `data.source = npz:FILE`.

python -m experiments.small_pack --from=tfds:cifar10 [--from_dir=TFDS_DIR] --train=500 --test=100 --out=FILE
"""

import numpy as np
from absl import flags

from experiments import main as common
from jaxcl import data
from jaxcl.errors import UserError

SOURCE = flags.DEFINE_string("from", None, "as config.data.source")
DATA_DIR = flags.DEFINE_string("from_dir", None, "as config.data.data_dir")
TRAIN = flags.DEFINE_integer("train", 500, "training rows of each class")
TEST = flags.DEFINE_integer("test", 100, "test rows of each class")
OUT = flags.DEFINE_string("out", None, "the file to write")


def main() -> None:
    train, test = data.open_source(common.required(SOURCE), DATA_DIR.value)
    arrays = pack(train, test, TRAIN.value, TEST.value)
    np.savez_compressed(common.required(OUT), allow_pickle=False, **arrays)
    print(f"{OUT.value}: {len(arrays['y_train']):,} training and {len(arrays['y_test']):,} test rows")


def pack(train: data.Source, test: data.Source, train_rows: int, test_rows: int) -> dict[str, np.ndarray]:
    """The archive's arrays: of each class its first rows, or all where it has fewer, in the order of the source.

    Raises:
      UserError: a number of rows is not positive.
    """
    arrays: dict[str, np.ndarray] = {"class_names": np.array(train.class_names)}
    for split, source, count in (("train", train, train_rows), ("test", test, test_rows)):
        if count < 1:
            raise UserError(f"--{split}: {count} is not allowed, give a positive number")
        of_class = [np.flatnonzero(source.labels == k)[:count] for k in range(source.num_classes)]
        rows = np.sort(np.concatenate(of_class))
        arrays |= {f"x_{split}": source.read(rows), f"y_{split}": source.labels[rows]}
    return arrays


if __name__ == "__main__":
    common.run(main)
