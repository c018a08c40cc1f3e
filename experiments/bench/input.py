"""Images a second that are read, decoded and cut to one size: jaxcl's loader beside other programs, and the bare decoder.

    python -m experiments.studies.imagenet_shaped --from=tfds:cifar10 --train_rows=2000 --test_rows=500 --out=SHAPED
    python -m experiments.bench.input --data=SHAPED [--peer_python=PEERS_ENV/bin/python] [--json=FILE]

Peers (torch's DataLoader with torchvision, tf.data) are optional, see `experiments/bench/peers/input_peers.py`; those not there
are reported missing. Each reads the same files, from memory where the system keeps them, in a process of its own that is bound
to as many cores. They take turns, a process a turn; the figure is the median over the turns. A GPU that trains on --gpu images
a second needs `cores_for_gpu` of such cores. About twenty minutes on two cores with every peer.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections import defaultdict
from typing import Annotated, Any

from experiments.bench import harness
from experiments.bench.peers import input_peers
from experiments.pages.page import ROOT, Json
from experiments.studies.imagenet_shaped import NAME
from jaxcl.check import check, one_of
from jaxcl.data.sources.tfds import open_examples
from jaxcl.errors import RunError

OWN = ("jaxcl_threads", "jaxcl_workers", "jaxcl_pillow", "decoder")  # what runs on this interpreter
ONE_CORE = ("decoder",)
SPLITS = {True: "train", False: "test"}


def measure(
    *,
    data: Annotated[str, "TFDS folder with the set of experiments.studies.imagenet_shaped"] = "shaped",
    peers: Annotated[tuple[str, ...], "which to measure"] = tuple(input_peers.PEERS),
    peer_python: Annotated[str, "interpreter that has the peers' packages"] = sys.executable,
    cores: Annotated[tuple[int, ...], "bound to so many"] = tuple(sorted({1, len(os.sched_getaffinity(0))})),
    size: Annotated[int, "side of the images that come out, in pixels"] = 224,
    batch: Annotated[int, "images of a batch"] = 64,
    rounds: Annotated[int, "turns of each"] = 5,
    seconds: Annotated[float, "length of a turn"] = 5.0,
    gpu: Annotated[float, "images a second that a GPU trains on"] = 3000.0,
) -> Json:
    for peer in peers:
        check("--peers", peer, one_of(list(input_peers.PEERS)))
    with tempfile.TemporaryDirectory() as folder:
        files = {train: write_files(data, train, pathlib.Path(folder, split)) for train, split in SPLITS.items()}
        entries: list[Json] = [
            {"name": name, "cores": n, "train": train}
            for n in cores
            for train in SPLITS
            for name in peers
            if n == 1 or name not in ONE_CORE
        ]
        rates: dict[int, list[float]] = defaultdict(list)
        for i in range(rounds):
            order = range(len(entries))
            for j in order if i % 2 == 0 else reversed(order):
                entry = entries[j]
                if "missing" in entry:
                    continue
                place = pathlib.Path(data).resolve() if entry["name"].startswith("jaxcl") else files[entry["train"]]
                python = sys.executable if entry["name"] in OWN else peer_python
                found = turn(python, entry, place, size, batch, seconds)
                if "missing" not in found:
                    rates[j].append(found.pop("images_per_s"))
                entry |= found
    for j, values in rates.items():
        entries[j] |= described(values, entries[j]["cores"], gpu)
        harness.show(entries[j])
    return {
        "size": size,
        "batch": batch,
        "gpu_images_per_s": gpu,
        "file_bytes": file_bytes(data),
        "entries": entries,
        "over_best_peer": over_best_peer(entries),
    }


def write_files(data: str, train: bool, folder: pathlib.Path) -> pathlib.Path:
    """The files of a split of the set, as NUMBER.jpg."""
    folder.mkdir()
    for i, example in enumerate(examples(data, train)):
        (folder / f"{i:06d}.jpg").write_bytes(example["image"])
    return folder


def examples(data: str, train: bool) -> Any:
    (rows,) = open_examples(f"tfds:{NAME}", data, [SPLITS[train]])
    return (rows[i] for i in range(len(rows)))


def file_bytes(data: str) -> Json:
    """The spread of the sizes of training files."""
    return harness.summary([len(example["image"]) for example in examples(data, train=True)])


def turn(python: str, entry: Json, files: pathlib.Path, size: int, batch: int, seconds: float) -> Json:
    """One measurement in a process of its own: its version and images a second, or why it is missing.

    Raises:
      RunError: it failed.
    """
    command = [python, "-m", input_peers.__name__, f"--peer={entry['name']}", f"--files={files}"]
    command += [f"--cores={entry['cores']}", f"--size={size}", f"--batch={batch}", f"--seconds={seconds}"]
    command += ["--train"] if entry["train"] else []
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{entry['name']}: ended with exit code {ended.returncode}: {last}")
    return json.loads(ended.stdout)


def described(values: list[float], cores: int, gpu: float) -> Json:
    """What the turns of a contender come to."""
    rate = harness.summary(values)
    a_core = rate["median"] / cores
    return {"images_per_s": rate, "images_per_s_a_core": a_core, "cores_for_gpu": gpu / a_core}


def over_best_peer(entries: list[Json]) -> list[Json]:
    """Of jaxcl, the faster of threads and workers, over the fastest other program; None where there is none."""
    found = []
    for key in sorted({(entry["cores"], entry["train"]) for entry in entries}):
        mine: list[float] = []
        theirs: list[float] = []
        for entry in entries:
            if (entry["cores"], entry["train"]) == key and "images_per_s" in entry and entry["name"] != "decoder":
                (mine if entry["name"].startswith("jaxcl") else theirs).append(entry["images_per_s"]["median"])
        ratio = max(mine) / max(theirs) if mine and theirs else None
        found.append({"cores": key[0], "train": key[1], "ratio": ratio})
    return found


if __name__ == "__main__":
    harness.run(measure)
