"""Scenarios: every row of a chosen class lands in exactly one task; impossible splits are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data import class_incremental
from jaxcl.errors import UserError

LABELS = np.random.default_rng(0).integers(0, 10, 400).astype(np.int32)
TEST = np.random.default_rng(1).integers(0, 10, 100).astype(np.int32)


@given(num_tasks=st.integers(1, 10), seed=st.none() | st.integers(0, 2**32))
def test_a_number_of_tasks_partitions_classes_and_rows(num_tasks, seed):
    scenario = class_incremental(LABELS, TEST, 10, num_tasks, seed)
    sizes = [len(task.classes) for task in scenario.tasks]
    assert sorted(k for task in scenario.tasks for k in task.classes) == list(range(10))
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1
    for labels, split in ((LABELS, "train"), (TEST, "test")):
        rows = [getattr(task, split) for task in scenario.tasks]
        assert sorted(np.concatenate(rows)) == list(range(len(labels)))
        for task, r in zip(scenario.tasks, rows, strict=True):
            assert r.dtype == np.int64 and set(labels[r]) == set(task.classes)
            assert (scenario.task_of_class[labels[r]] == task.index).all()


def test_the_order_of_classes_is_natural_or_drawn_from_the_seed():
    def order(seed):
        return [task.classes for task in class_incremental(LABELS, TEST, 10, 3, seed).tasks]

    assert order(None) == [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert order(1) == order(1) and len({str(order(seed)) for seed in (None, 1, 2, 3)}) == 4


def test_explicit_tasks_may_differ_in_size_and_leave_classes_out():
    scenario = class_incremental(LABELS, TEST, 10, [[7], (1, 0, 3)])
    assert [task.classes for task in scenario.tasks] == [(7,), (1, 0, 3)]
    assert scenario.num_classes == 10
    assert scenario.task_of_class.tolist() == [1, 1, -1, 1, -1, -1, -1, 0, -1, -1]
    assert set(LABELS[scenario.tasks[1].train]) == {0, 1, 3}


def test_seen_accumulates_train_rows():
    scenario = class_incremental(LABELS, TEST, 10, 5)
    for t in range(5):
        assert sorted(scenario.seen(t)) == np.flatnonzero(2 * (t + 1) > LABELS).tolist()
    for t in (-1, 5):
        with pytest.raises(IndexError):
            scenario.seen(t)


@pytest.mark.parametrize(
    ("tasks", "seed", "message"),
    [
        (0, None, "tasks 0: allowed are 1..10, the number of classes"),
        (11, None, "tasks 11: allowed are 1..10, the number of classes"),
        (2, -1, "class_order_seed -1: allowed are None and integers from 0"),
        ([[0], [1]], 3, "class_order_seed 3: allowed is None where tasks lists the classes"),
        ([], None, "tasks []: allowed are an integer and a non-empty list of non-empty lists of classes"),
        ([[0], []], None, "tasks [[0], []]: allowed are an integer and a non-empty list of non-empty lists of classes"),
        ([0, 1], None, "tasks [0, 1]: allowed are an integer and a non-empty list of non-empty lists of classes"),
        (2.5, None, "tasks 2.5: allowed are an integer and a non-empty list of non-empty lists of classes"),
        ("5", None, "tasks '5': allowed are an integer and a non-empty list of non-empty lists of classes"),
        ([[0], [1, 10]], None, "tasks: task 1 names class 10; allowed are 0..9"),
        ([[0], [1.5]], None, "tasks: task 1 names class 1.5; allowed are 0..9"),
        ([[0, 1], [2, 1]], None, "tasks: class 1 is in task 0 and again in task 1; each class may appear once"),
        ([[3, 3]], None, "tasks: class 3 is in task 0 and again in task 0; each class may appear once"),
    ],
)
def test_mistakes(tasks, seed, message):
    with pytest.raises(UserError) as info:
        class_incremental(LABELS, TEST, 10, tasks, seed)
    assert str(info.value) == message


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_task_without_rows_is_refused(split):
    train, test = (LABELS[LABELS != 4], TEST) if split == "train" else (LABELS, TEST[TEST != 4])
    with pytest.raises(UserError) as info:
        class_incremental(train, test, 10, [[0], [4]])
    assert str(info.value) == f"tasks: task 1 (classes [4]) has no {split} rows; at least 1 is needed"
    assert len(class_incremental(train, test, 10, 5).tasks) == 5  # one class of a task may lack rows
