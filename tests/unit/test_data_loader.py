"""The loader's laws: every row once an epoch, the same global batch on any number of processes, exact resumption."""

import dataclasses
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data import array_source, blank_batches, eval_batches, train_batches
from jaxcl.errors import UserError

N = 50
# Every pixel and the label tell the row, so that a batch that mixes rows up is caught.
SOURCE = array_source(np.tile(np.arange(N, dtype=np.uint8)[:, None, None, None], (1, 3, 2, 1)), np.arange(N), range(N))
KEYS = ("image", "label", "id", "valid")


def _ids(batches):
    return np.concatenate([batch["id"][batch["valid"]] for batch in batches]).tolist()


def _join(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in KEYS}


def _assert_same(a, b):
    assert a.keys() == b.keys() == set(KEYS)
    for key in KEYS:
        np.testing.assert_array_equal(a[key], b[key])


@given(
    n=st.integers(1, N),
    local=st.integers(1, 6),
    processes=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_row_once_an_epoch_whole_and_split_among_processes(n, local, processes, epochs, seed):
    rows = np.random.default_rng(seed).permutation(N)[:n]
    size = local * processes

    def loader(p, count):
        return train_batches(
            SOURCE, rows, batch_size=size, epochs=epochs, seed=(seed, 1), process_index=p, process_count=count
        )

    whole, parts = loader(0, 1), [loader(p, processes) for p in range(processes)]
    assert len(whole) == epochs * -(-n // size) == epochs * whole.steps_per_epoch
    for t in range(len(whole)):
        batch = whole[t]
        assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
            "image": (np.uint8, (size, 3, 2, 1)),
            "label": (np.int32, (size,)),
            "id": (np.int32, (size,)),
            "valid": (np.bool_, (size,)),
        }
        valid = batch["valid"]
        np.testing.assert_array_equal(batch["label"][valid], batch["id"][valid])
        np.testing.assert_array_equal(
            batch["image"], np.where(valid, batch["id"], 0)[:, None, None, None] + 0 * batch["image"]
        )
        assert (batch["id"][~valid] == -1).all() and (batch["label"][~valid] == 0).all()
        local_batches = [part[t] for part in parts]
        assert all(len(b["id"]) == local for b in local_batches)
        _assert_same(_join(local_batches), batch)
    for e in range(epochs):
        epoch = [whole[t] for t in range(e * whole.steps_per_epoch, (e + 1) * whole.steps_per_epoch)]
        assert sorted(_ids(epoch)) == sorted(rows)
        assert all(batch["valid"].all() for batch in epoch[:-1])


def test_the_order_depends_on_seed_and_epoch_only():
    def order(seed, batch_size=10, epochs=2):
        return _ids(train_batches(SOURCE, np.arange(N), batch_size=batch_size, epochs=epochs, seed=seed))

    assert order((1, 0)) == order((1, 0)) == order((1, 0), batch_size=25)
    assert order((1, 0), epochs=3)[: 2 * N] == order((1, 0))
    epochs = [order(seed)[e * N : (e + 1) * N] for seed in ((1,), (1, 0), (1, 1), (0, 1), (2, 0)) for e in (0, 1)]
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_process_reads_its_own_rows_only():
    read = []
    spy = dataclasses.replace(SOURCE, read=lambda rows: read.extend(rows.tolist()) or SOURCE.read(rows))
    loader = train_batches(spy, np.arange(N), batch_size=8, epochs=1, seed=(0,), process_index=1, process_count=4)
    assert read == [] and _ids(loader[t] for t in range(len(loader))) == read
    assert len(read) == 12  # 2 of each of 6 full batches of 8; the last 2 rows are process 0's


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_iteration_equals_indexing_and_resumes_exactly(num_threads):
    loader = train_batches(SOURCE, np.arange(N), batch_size=8, epochs=3, seed=(5, 2), num_threads=num_threads)
    expected = [loader[t] for t in range(len(loader))]
    iterator = iter(loader)
    states = []
    for batch in expected:
        states.append(iterator.get_state())
        _assert_same(next(iterator), batch)
    with pytest.raises(StopIteration):
        next(iterator)
    assert states[9] == {"next_index": 9}
    for t in (0, 6, 7, 20):  # the same iterator rewound, and a new one in a new process, so to speak
        for resumed in (iterator, iter(loader)):
            resumed.set_state(states[t])
            rest = list(resumed)
            assert len(rest) == len(expected) - t
            for got, batch in zip(rest, expected[t:], strict=True):
                _assert_same(got, batch)


def test_threads_read_ahead():
    second, reads = threading.Event(), []

    def read(rows):
        reads.append(1)
        if len(reads) > 1:
            second.set()
        return SOURCE.read(rows)

    loader = eval_batches(dataclasses.replace(SOURCE, read=read), np.arange(N), batch_size=10, num_threads=1)
    iterator = iter(loader)
    next(iterator)
    assert second.wait(5)  # though only one batch was asked for


def test_an_error_in_a_thread_reaches_the_loop():
    def read(rows):
        raise OSError("disk gone")

    loader = eval_batches(dataclasses.replace(SOURCE, read=read), np.arange(N), batch_size=10)
    with pytest.raises(OSError, match="disk gone"):
        next(iter(loader))


def test_evaluation_keeps_the_order_and_pads():
    rows = np.array([7, 3, 43, 12, 0])
    batches = list(eval_batches(SOURCE, rows, batch_size=4))
    assert _ids(batches) == rows.tolist()
    assert batches[1]["valid"].tolist() == [True, False, False, False]
    assert batches[1]["id"].tolist() == [0, -1, -1, -1]


def test_an_index_beyond_the_end():
    loader = eval_batches(SOURCE, np.arange(N), batch_size=10)
    for t in (-1, 5):
        with pytest.raises(IndexError, match=f"batch {t} of 5"):
            loader[t]


def test_later_changes_to_the_callers_indices_do_not_matter():
    rows = np.arange(N)
    loaders = eval_batches(SOURCE, rows, batch_size=N), train_batches(SOURCE, rows, batch_size=N, epochs=1, seed=(0,))
    rows[:] = 0
    for loader in loaders:
        assert sorted(_ids(loader)) == list(range(N))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 is not allowed, give at least 1"),
        ({"epochs": 0}, "epochs: 0 is not allowed, give at least 1"),
        ({"num_threads": -1}, "data.threads: -1 is not allowed, give at least 0"),
        ({"process_count": 0}, "process_count: 0 is not allowed, give at least 1"),
        ({"process_count": 3}, "batch_size: 8 is not allowed, give a multiple of the 3 processes"),
        ({"process_count": 2, "process_index": 2}, "process_index: 2 is not allowed, give a number from 0 to 1"),
        ({"seed": ()}, "seed: () is not allowed, give one or more integers from 0"),
        ({"seed": (3, -1)}, "seed: (3, -1) is not allowed, give one or more integers from 0"),
        ({"indices": np.zeros(0, np.int64)}, "indices: there is no row to make batches of, give at least 1"),
    ],
)
def test_mistakes(changes, message):
    arguments = {"indices": np.arange(N), "batch_size": 8, "epochs": 1, "seed": (0,)} | changes
    with pytest.raises(UserError) as info:
        train_batches(SOURCE, **arguments)
    assert str(info.value) == message


def test_by_class_hands_out_the_same_batches_sorted():
    """The global batch is the same set of rows; its slices are what each process gets of it in order of class."""
    rng = np.random.default_rng(0)
    source = array_source(rng.integers(0, 255, (50, 2, 2, 1), np.uint8), rng.integers(0, 5, 50), list("abcde"))
    arguments = {"batch_size": 16, "epochs": 2, "seed": (3,), "num_threads": 0}
    plain = train_batches(source, np.arange(50), **arguments)
    for p in range(2):
        part = train_batches(source, np.arange(50), by_class=True, process_index=p, process_count=2, **arguments)
        for t in range(len(plain)):
            whole, rows = plain[t], plain[t]["id"][plain[t]["valid"]]
            expected = rows[np.argsort(source.labels[rows], kind="stable")][8 * p : 8 * p + 8]
            assert part[t]["id"][part[t]["valid"]].tolist() == expected.tolist()
            assert whole["id"].shape == (16,)


def test_blank_batches_hold_padding_alone():
    loader = blank_batches(SOURCE, batch_size=4, steps_per_epoch=3, epochs=2, process_index=1, process_count=2)
    assert len(loader) == len(list(loader)) == 6 and loader.steps_per_epoch == 3
    for batch in loader:
        assert batch["image"].shape == (2, 3, 2, 1) and not batch["valid"].any() and batch["id"].tolist() == [-1, -1]
