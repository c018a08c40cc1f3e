"""Split-CIFAR-10 cut down to a CPU, beside Mammoth; one row of docs/benchmarks.md each: STRATEGY-CAPACITY, for example der-200.

    python -m experiments.studies.small_pack --from=tfds:cifar10 --from_dir=TFDS_DIR --train=1000 --test=200 --out=FILE
    python -m experiments.studies.references --protocol=split_cifar10_small --source=npz:FILE --workdir=DIR
    python -m experiments.studies.references --protocol=split_cifar10_small --source=npz:FILE --mammoth=CHECKOUT

5 tasks of 2 classes, the first 1,000 training and 200 test images of each class, one epoch, batch 10 + 10, not augmented, an
MLP of 2 x 100 with Xavier-uniform weights, float32, SGD without momentum, a reservoir; coefficients are those of the DER
paper's Split-CIFAR-10 (ResNet-18, 50 epochs), whose accuracies are out of reach here: the rows compare two programs, not
methods. A net without a norm, because Mammoth's DER sends new and replayed rows through it one after the other, and a batch
norm then sees each by itself; here all rows pass together. Time: the last column of the table in docs/benchmarks.md.
"""

from ml_collections import ConfigDict

from jaxcl import shipped

ROWS: dict[str, tuple[float, dict[str, float]]] = {
    "er-200": (0.03, {}),
    "er-500": (0.03, {}),
    "der-200": (0.03, {"alpha": 0.3}),
    "der-500": (0.03, {"alpha": 0.3}),
    "der_pp-200": (0.03, {"alpha": 0.1, "beta": 0.5}),
    "der_pp-500": (0.03, {"alpha": 0.2, "beta": 0.5}),
}


def get_config(row: str = "er-200") -> ConfigDict:
    config = shipped.load("split_mnist_mammoth").protocol("split_cifar10_small", ROWS, row, batch_size=10)
    config.name = f"Split-CIFAR-10 cut down, {row}"
    config.log_every = 100
    config.data.source = "npz:cifar10_small.npz"
    config.data.tasks = 5
    large = shipped.load("split_cifar10")
    config.data.mean, config.data.std = large.MEAN, large.STD
    return config
