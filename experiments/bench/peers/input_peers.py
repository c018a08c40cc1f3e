"""Programs that read and cut JPEG files behind one small interface, so that the input benchmark can run them beside jaxcl's.

Peers are optional; nothing of theirs is copied here. An environment for them (Python 3.11, CPU):

    pip install torch==2.14.1 torchvision==0.29.1 tensorflow

A peer runs in a process of its own, which prints one line of JSON:

    python -m experiments.bench.peers.input_peers --peer=torchvision_pil --files=FOLDER --cores=1 --seconds=5 --train

`--files` is a folder of files NUMBER.jpg, for jaxcl the folder of the TFDS set that they come from. `--train` cuts random
windows; else the middle is cut. Every batch is uint8, as it would be handed to a device. Only the standard library and NumPy
are imported here.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

EPOCHS = 10_000  # more than any measurement reads
MIDDLE = 224 / 256  # side of the middle over the shorter side of the image
WARM = 2  # batches that are not counted, of every process or thread


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be read.

    Attributes:
      files: the folder.
      cores: how many this process may use.
      size: of the images that come out, a side in pixels.
      batch: images of a batch.
      train: cuts random windows, in a random order.
    """

    files: pathlib.Path
    cores: int
    size: int
    batch: int
    train: bool


Batches = tuple[str, Iterator[Any]]  # versions; batches without end


def jaxcl(task: Task, threads: int, workers: int = 0, source: str = "tfds:imagenet_shaped") -> Batches:
    """jaxcl's loader."""
    import jaxcl as library
    from jaxcl.data import eval_batches, open_source, train_batches

    train, test = open_source(source, str(task.files), image_size=task.size)
    reading: Any = {"num_threads": threads, "num_workers": workers}
    sizes: Any = {"batch_size": task.batch, "epochs": EPOCHS, **reading}
    if task.train:
        loader = train_batches(train, np.arange(len(train)), seed=(0,), **sizes)
    else:
        loader = eval_batches(test, np.arange(len(test)), **sizes)
    return f"jaxcl {library.__version__}", iter(loader)


def jaxcl_pillow(task: Task, threads: int) -> Batches:
    """The same as where cykooz_resizer is not installed."""
    from jaxcl.data import resize

    resize.vectorised = lambda: None  # type: ignore[assignment]
    return jaxcl(task, threads)


def decoder(task: Task) -> Batches:
    """The bare decoder: Pillow, whole images, one after the other, which are dropped."""
    import PIL
    from PIL import Image

    def decode(encoded: bytes) -> None:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()

    def batches() -> Iterator[Any]:
        files = itertools.cycle([path.read_bytes() for path in listed(task)])
        while True:
            for encoded in itertools.islice(files, task.batch):
                decode(encoded)
            yield None

    return f"pillow {PIL.__version__}", batches()


def torchvision_pil(task: Task) -> Batches:
    """torch's DataLoader, with a process a core, and torchvision's transforms of Pillow's images: the usual ImageNet input."""
    from PIL import Image
    from torchvision.transforms import v2

    cut = [v2.RandomResizedCrop(task.size)] if task.train else middle(task)
    transform = v2.Compose([*cut, v2.PILToTensor()])

    def load(path: pathlib.Path) -> Any:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    return data_loader(task, load)


def torchvision_tensor(task: Task) -> Batches:
    """The same with torchvision's own decoder and its transforms of tensors, which use vector instructions."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(task.size)] if task.train else middle(task))

    def load(path: pathlib.Path) -> Any:
        return transform(decode_jpeg(read_file(str(path)), ImageReadMode.RGB))

    return data_loader(task, load)


def middle(task: Task) -> list[Any]:
    from torchvision.transforms import v2

    return [v2.Resize(round(task.size / MIDDLE)), v2.CenterCrop(task.size)]


def data_loader(task: Task, load: Callable[[pathlib.Path], Any]) -> Batches:
    import torch
    import torchvision

    class Files(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.paths = listed(task)

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> Any:
            return load(self.paths[index])

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    torch.set_num_threads(1)  # as in the loader's processes
    options: Any = {"num_workers": task.cores, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = torch.utils.data.DataLoader(Files(), task.batch, shuffle=task.train, **options)
    return f"torch {torch.__version__}, torchvision {torchvision.__version__}", batches()


def tf_data(task: Task) -> Batches:
    """tf.data: the window alone is decoded, and resized without antialiasing, as most programs for ImageNet do."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    def cut(path: Any) -> Any:
        encoded = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(encoded)
        if task.train:
            begin, size, _ = tf.image.sample_distorted_bounding_box(
                shape, tf.zeros((1, 0, 4)), min_object_covered=0.0, area_range=(0.08, 1.0)
            )
            window = tf.concat([begin[:2], size[:2]], 0)
        else:
            side = tf.cast(MIDDLE * tf.cast(tf.minimum(shape[0], shape[1]), tf.float32), tf.int32)
            window = tf.stack([(shape[0] - side) // 2, (shape[1] - side) // 2, side, side])
        image = tf.image.resize(tf.io.decode_and_crop_jpeg(encoded, window, channels=3), (task.size, task.size))
        return tf.cast(image, tf.uint8)

    tf.config.threading.set_intra_op_parallelism_threads(task.cores)
    tf.config.threading.set_inter_op_parallelism_threads(task.cores)
    paths = [str(path) for path in listed(task)]
    files = tf.data.Dataset.from_tensor_slices(paths).repeat()
    if task.train:
        files = files.shuffle(len(paths))
    found = files.map(cut, num_parallel_calls=task.cores).batch(task.batch).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = task.cores
    return f"tensorflow {tf.__version__}", found.with_options(options).as_numpy_iterator()


PEERS: dict[str, Callable[[Task], Batches]] = {
    "jaxcl_threads": lambda task: jaxcl(task, threads=task.cores),
    "jaxcl_workers": lambda task: jaxcl(task, threads=1, workers=task.cores),
    "jaxcl_pillow": lambda task: jaxcl_pillow(task, threads=task.cores),
    "decoder": decoder,
    "torchvision_pil": torchvision_pil,
    "torchvision_tensor": torchvision_tensor,
    "tf_data": tf_data,
}


@functools.cache
def listed(task: Task) -> list[pathlib.Path]:
    return sorted(task.files.glob("*.jpg"))


def rate(batches: Iterator[Any], task: Task, seconds: float) -> float:
    """Images a second, over at least so many seconds."""
    for _ in range(WARM * (task.cores + 1)):  # what was read ahead is not counted
        next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    return count * task.batch / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=list(PEERS), required=True)
    parser.add_argument("--files", type=pathlib.Path, required=True)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints while it is imported goes to stderr: stdout is JSON only
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # before threads and processes start
    task = Task(args.files, args.cores, args.size, args.batch, args.train)
    try:
        version, batches = PEERS[args.peer](task)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=out, flush=True)
        return
    print(json.dumps({"version": version, "images_per_s": rate(batches, task, args.seconds)}), file=out, flush=True)
    if close := getattr(batches, "close", None):
        close()
    for child in multiprocessing.active_children():
        child.kill()  # they would go on reading, beside whoever is next
        child.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not by the interpreter's end, which some peers' threads survive badly


if __name__ == "__main__":
    main()
