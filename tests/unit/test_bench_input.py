"""The set shaped like ImageNet and what the input benchmark makes of its turns; the turns themselves are the benchmark's."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from experiments.bench import input as bench
from experiments.bench.peers import input_peers
from experiments.studies import imagenet_shaped
from jaxcl.data import array_source, open_source


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """A set of 5 + 2 rows, made of 3 images."""
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    source = array_source(images, np.array([2, 0, 1]), ["a", "b", "c"])
    folder = tmp_path_factory.mktemp("tfds")
    imagenet_shaped.prepare(folder, source, source, 5, 2)
    return folder


def test_the_set_is_read_as_imagenet_is(shaped, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train, test = open_source("tfds:imagenet_shaped", str(shaped), image_size=32)
    assert (len(train), len(test)) == (5, 2) and train.class_names == ("a", "b", "c")
    assert sorted(train.labels.tolist()) == [0, 0, 1, 2, 2]
    assert train.read(np.arange(5)).shape == train.read_random(np.arange(5), (0,)).shape == (5, 32, 32, 3)


def test_its_files_are_jpeg_of_many_shapes_and_the_same_every_time():
    rng = np.random.default_rng(0)
    sizes = [imagenet_shaped.draw_size(rng) for _ in range(2000)]
    assert 0.45 < np.mean([size == (500, 375) for size in sizes]) < 0.55
    assert 0.07 < np.mean([size == (375, 500) for size in sizes]) < 0.13 and len(set(sizes)) > 300
    image = np.zeros((4, 4, 1), np.uint8)
    one, again = (imagenet_shaped.jpeg(image, np.random.default_rng(7)) for _ in range(2))
    assert one == again and Image.open(io.BytesIO(one)).format == "JPEG"


def test_every_peer_is_given_the_files_of_the_split(shaped, tmp_path):
    folder = bench.write_files(str(shaped), False, tmp_path / "test")
    assert [path.name for path in sorted(folder.iterdir())] == ["000000.jpg", "000001.jpg"]
    task = input_peers.Task(folder, cores=1, size=32, batch=2, train=False)
    version, batches = input_peers.PEERS["decoder"](task)
    assert version.startswith("pillow ") and input_peers.rate(batches, task, seconds=0.01) > 0


def test_a_rate_counts_whole_batches_after_those_that_were_read_ahead(monkeypatch, tmp_path):
    clock = iter(itertools.chain([0.0], range(1, 100)))
    monkeypatch.setattr(input_peers.time, "perf_counter", lambda: next(clock))
    taken = []
    batches = (taken.append(i) for i in itertools.count())
    task = input_peers.Task(tmp_path, cores=2, size=1, batch=10, train=True)
    assert (
        input_peers.rate(batches, task, seconds=4) == 3 * 10 / 5
    )  # looks at the clock before each batch, and at the end
    assert len(taken) == input_peers.WARM * 3 + 3


def test_figures_are_by_core_and_beside_the_best_peer():
    def entry(name, cores, *rates):
        return {"name": name, "cores": cores, "train": True, **bench.described(list(rates), cores, gpu=3000.0)}

    entries = [
        entry("jaxcl_threads", 2, 900, 1000, 1100),
        entry("jaxcl_workers", 2, 800),
        entry("decoder", 2, 5000),
        entry("torchvision_pil", 2, 400),
        entry("torchvision_tensor", 2, 500),
        {"name": "tf_data", "cores": 2, "train": True, "missing": "No module named 'tensorflow'"},
    ]
    assert entries[0]["images_per_s_a_core"] == 500 and entries[0]["cores_for_gpu"] == 6
    assert bench.over_best_peer(entries) == [{"cores": 2, "train": True, "ratio": 2.0}]
    assert bench.over_best_peer(entries[:3])[0]["ratio"] is None
