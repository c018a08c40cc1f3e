"""Scenarios: every row of a chosen class lands in exactly one task; impossible splits are refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data import SCENARIOS, Scenario, Task, array_source, class_incremental, hold_out, make_scenario
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
            assert scenario.class_table[task.index].nonzero()[0].tolist() == sorted(task.classes)


def test_the_order_of_classes_is_natural_or_drawn_from_the_seed():
    def order(seed):
        return [task.classes for task in class_incremental(LABELS, TEST, 10, 3, seed).tasks]

    assert order(None) == [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert order(1) == order(1) and len({str(order(seed)) for seed in (None, 1, 2, 3)}) == 4


def test_explicit_tasks_may_differ_in_size_and_leave_classes_out():
    scenario = class_incremental(LABELS, TEST, 10, [[7], (1, 0, 3)])
    assert [task.classes for task in scenario.tasks] == [(7,), (1, 0, 3)]
    assert scenario.num_classes == 10
    assert scenario.class_table.nonzero()[0].tolist() == [0, 1, 1, 1] and scenario.class_table[0, 7]
    expected = [{7: 0, 1: 1, 0: 1, 3: 1}.get(k, -1) for k in TEST]
    assert scenario.task_of_test_row.tolist() == expected[: len(scenario.task_of_test_row)]
    assert set(expected[len(scenario.task_of_test_row) :]) <= {-1}
    assert set(LABELS[scenario.tasks[1].train]) == {0, 1, 3}


def test_seen_accumulates_train_rows():
    scenario = class_incremental(LABELS, TEST, 10, 5)
    for t in range(5):
        assert sorted(scenario.seen(t)) == np.flatnonzero(2 * (t + 1) > LABELS).tolist()
    for t in (-1, 5):
        with pytest.raises(IndexError):
            scenario.seen(t)


LISTS = "is not allowed, give a number, or a list with a list of classes for each task"


@pytest.mark.parametrize(
    ("tasks", "seed", "message"),
    [
        (0, None, "data.tasks: 0 is not allowed, give 1..10, the number of classes"),
        (11, None, "data.tasks: 11 is not allowed, give 1..10, the number of classes"),
        (2, -1, "data.class_order_seed: -1 is not allowed, give at least 0"),
        ([[0], [1]], 3, "data.class_order_seed: 3 is not allowed, give None where data.tasks lists the classes"),
        ([], None, f"data.tasks: [] {LISTS}"),
        ([[0], []], None, f"data.tasks: [[0], []] {LISTS}"),
        ([0, 1], None, f"data.tasks: [0, 1] {LISTS}"),
        (2.5, None, f"data.tasks: 2.5 {LISTS}"),
        ("5", None, f"data.tasks: '5' {LISTS}"),
        (None, None, f"data.tasks: None {LISTS}"),
        ([[0], [1, 10]], None, "data.tasks: class 10 in task 1 is not allowed, give 0..9"),
        ([[0], [1.5]], None, "data.tasks: class 1.5 in task 1 is not allowed, give 0..9"),
        ([[0, 1], [2, 1]], None, "data.tasks: class 1 is in task 0 and again in task 1, give it once"),
        ([[3, 3]], None, "data.tasks: class 3 is in task 0 and again in task 0, give it once"),
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
    assert str(info.value) == f"data.tasks: task 1 (classes [4]) has no {split} rows, give classes that have"
    assert len(class_incremental(train, test, 10, 5).tasks) == 5  # one class of a task may lack rows


# --- the other kinds ---------------------------------------------------------------------------------------------------

SHAPE = (6, 6, 1)
IMAGES = np.random.default_rng(2).integers(0, 256, (500, *SHAPE)).astype(np.uint8)
NAMES = [str(k) for k in range(10)]
SOURCES = array_source(IMAGES[:400], LABELS, NAMES), array_source(IMAGES[400:], TEST, NAMES)
FIXED = ("class", "domain", "instance", "blurry", "si_blurry")  # whose tasks share out the rows of the set


@given(kind=st.sampled_from(sorted(SCENARIOS)), tasks=st.integers(1, 10), seed=st.integers(0, 1000))
def test_every_row_is_in_one_task(kind, tasks, seed):
    scenario, train, test = make_scenario(*SOURCES, kind, tasks, seed=seed, scattered=0.3)
    times = 1 if kind in FIXED else tasks
    for source, rows in ((train, [t.train for t in scenario.tasks]), (test, [t.test for t in scenario.tasks])):
        assert sorted(np.concatenate(rows)) == list(range(len(source)))
        assert len(source) == times * len(SOURCES[source is test])
    for task in scenario.tasks:
        assert set(task.classes) == set(train.labels[task.train])
        assert (np.diff(task.train) > 0).all()
    again, _, _ = make_scenario(*SOURCES, kind, tasks, seed=seed, scattered=0.3)
    assert all((a.train == b.train).all() for a, b in zip(scenario.tasks, again.tasks, strict=True))


def test_domain_labels_count_within_the_task():
    scenario, train, test = make_scenario(*SOURCES, "domain", [[3, 8], [1, 0, 9]])
    assert (scenario.num_classes, train.num_classes) == (3, 3)
    for task, classes in zip(scenario.tasks, [[3, 8], [1, 0, 9]], strict=True):
        for source, rows, labels in ((train, task.train, LABELS), (test, task.test, TEST)):
            assert (np.array(classes)[source.labels[rows]] == labels[rows]).all()


def test_instances_come_in_equal_parts_of_every_class():
    scenario, _, _ = make_scenario(*SOURCES, "instance", 3)
    counts = np.array([np.bincount(LABELS[task.train], minlength=10) for task in scenario.tasks])
    assert (counts.max(0) - counts.min(0) <= 1).all()


def test_permuted_pixels_are_those_of_the_image_in_an_order_of_the_task():
    scenario, train, _ = make_scenario(*SOURCES, "permuted", 3)
    flat = IMAGES[:400].reshape(400, -1)
    orders = set()
    for task in scenario.tasks:
        found = train.read(task.train).reshape(400, -1)
        # Each pixel's column of 400 values names the pixel it came from.
        order = [np.flatnonzero((flat == found[:, [p]]).all(0)).item() for p in range(flat.shape[1])]
        assert sorted(order) == list(range(flat.shape[1]))
        orders.add(tuple(order))
        assert (train.labels[task.train] == LABELS).all()
    assert len(orders) == 3
    mixed = np.array([900, 3, 450, 2])  # rows of several tasks in one batch, in the order asked for
    np.testing.assert_array_equal(train.read(mixed), np.concatenate([train.read(mixed[i : i + 1]) for i in range(4)]))


def test_rotated_images_keep_what_is_the_same_from_all_sides():
    disc = np.hypot(*np.mgrid[-7:8, -7:8]) <= 4
    image = np.zeros((2, 15, 15, 1), np.uint8)
    image[0, disc], image[1, 2:13, 7] = 200, 200  # a disc, and a bar through the centre
    source = array_source(image, np.array([0, 1]), ["disc", "bar"])
    _, train, _ = make_scenario(source, source, "rotated", 2, seed=1)
    turned = train.read(np.arange(4))
    inner = np.hypot(*np.mgrid[-7:8, -7:8]) <= 3
    assert (turned[[0, 2]][:, inner] == 200).all()
    assert (
        turned[1, 7, 7] == turned[3, 7, 7] == 200 and (turned[1] != turned[3]).any() and (turned[1] != image[1]).any()
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_blurry_tasks_keep_their_size_and_scatter_the_share(share):
    sharp = class_incremental(LABELS, TEST, 10, 5)
    scenario, _, _ = make_scenario(*SOURCES, "blurry", 5, scattered=share)
    home = 0
    for before, after in zip(sharp.tasks, scenario.tasks, strict=True):
        assert len(after.train) == len(before.train) and (after.test == before.test).all()
        stayed = len(np.intersect1d(before.train, after.train))
        assert stayed >= len(before.train) - round(share * len(before.train))
        home += stayed
    # Of the rows scattered, a fifth falls back to its own task: 0.2 * 400 * share on average, 4.5 deviations allowed.
    expected = 400 * (1 - share) + 0.2 * 400 * share
    assert home == pytest.approx(expected, abs=4.5 * np.sqrt(400 * share * 0.2 * 0.8) + 5 * (share > 0))


def test_si_blurry_keeps_disjoint_classes_in_one_task():
    scenario, _, _ = make_scenario(*SOURCES, "si_blurry", 4, seed=3, scattered=0.5, disjoint=0.6)
    tasks_of = scenario.class_table.sum(0)
    assert (tasks_of == 1).sum() >= 6 and (tasks_of > 1).any()
    whole, _, _ = make_scenario(*SOURCES, "si_blurry", 4, seed=3, scattered=0.5, disjoint=1.0)
    assert (whole.class_table.sum(0) == 1).all()


NAN, ORDERED = float("nan"), {"class_order_seed": 1}


@pytest.mark.parametrize(
    ("kind", "tasks", "options", "message"),
    [
        ("clas", 2, {}, "data.scenario: 'clas' is unknown, did you mean class?"),
        ("blurry", 2, {"scattered": 1.5}, "data.scattered: 1.5 is not allowed, give a number from 0 to 1"),
        ("si_blurry", 2, {"disjoint": NAN}, "data.disjoint: nan is not allowed, give a number from 0 to 1"),
        (
            "permuted",
            [[0], [1]],
            {},
            "data.tasks: [[0], [1]] is not allowed, give a number of tasks with data.scenario = permuted",
        ),
        (
            "rotated",
            2,
            {"class_order_seed": 1},
            "data.class_order_seed: 1 is not allowed, give None with data.scenario = rotated",
        ),
        ("blurry", 2, {"class_order_seed": -1}, "data.class_order_seed: -1 is not allowed, give at least 0"),
        ("class", 11, {}, "data.tasks: 11 is not allowed, give 1..10, the number of classes"),
        ("si_blurry", 11, {}, "data.tasks: 11 is not allowed, give 1..10, the number of classes"),
        ("instance", 101, {}, "data.tasks: 101 is not allowed, give 1..100, the number of rows"),
        ("permuted", 0, {}, "data.tasks: 0 is not allowed, give 1..5368709, so that an int32 numbers all rows"),
        ("permuted", 10**12, {}, "data.tasks: 1000000000000 is not allowed, give at most 10000 tasks"),
        ("class", [[0]] * 10_001, {}, "data.tasks: 10001 is not allowed, give at most 10000 tasks"),
    ],
)
def test_mistakes_in_other_scenarios(kind, tasks, options, message):
    with pytest.raises(UserError) as info:
        make_scenario(*SOURCES, kind, tasks, **options)
    assert str(info.value) == message


def test_a_table_of_tasks_and_classes_that_cannot_be_held_is_refused_before_anything_is_made():
    names = range(2**20)
    many = array_source(IMAGES, np.zeros(500, int), names)
    with pytest.raises(UserError, match=r"data\.tasks: 5000 is not allowed, give at most 1024 tasks$"):
        make_scenario(many, many, "instance", 5000)


def test_images_that_are_to_be_reconstructed_are_not_changed():
    source = dataclasses.replace(SOURCES[0], targets={"x": np.zeros((400, 1), np.float32)})
    for kind in ("permuted", "rotated"):
        with pytest.raises(UserError, match=f"data.scenario: '{kind}' is not allowed, .* to be reconstructed$"):
            make_scenario(source, source, kind, 2)


def halves(split):
    """A scenario from outside: the first half of the rows, then the others."""
    train, test = ([np.arange(n)[: n // 2], np.arange(n)[n // 2 :]] for n in (len(split.train), len(split.test)))
    tasks = tuple(Task(t, tuple(range(10)), train[t], test[t]) for t in range(2))
    return Scenario(tasks, split.train.num_classes), split.train, split.test


def test_a_scenario_from_outside():
    scenario, train, _ = make_scenario(*SOURCES, f"{__name__}:halves")
    assert [len(task.train) for task in scenario.tasks] == [200, 200] and train is SOURCES[0]


# --- validation rows -----------------------------------------------------------------------------------------------------


def test_validation_rows_keep_their_targets_and_are_cut_as_before():
    """A part of a source is that source, row by row: labels, images, random windows, targets."""
    whole = dataclasses.replace(
        SOURCES[0],
        read_random=lambda rows, seed: IMAGES[:400][rows] // 2 + seed[0],
        targets={"x": np.arange(400, dtype=np.float32)},
    )
    seen = []
    for part in hold_out(whole, 0.2, 0):
        rows = part.targets["x"].astype(int)
        seen += rows.tolist()
        asked = np.array([5, 0, 5])
        np.testing.assert_array_equal(part.labels, LABELS[rows])
        np.testing.assert_array_equal(part.read(asked), IMAGES[rows[asked]])
        np.testing.assert_array_equal(part.read_random(asked, (3,)), IMAGES[rows[asked]] // 2 + 3)
    assert sorted(seen) == list(range(400))


def test_classes_of_one_row_stay_for_training():
    labels = np.array([0, 1, 2, 2])
    rest, held = hold_out(array_source(IMAGES[:4], labels, NAMES), 0.5, 0)
    assert sorted(rest.labels) == [0, 1, 2] and held.labels.tolist() == [2]
    with pytest.raises(
        UserError, match=r"^data\.validation: 0\.5 is not allowed, give 0: no class has two train rows$"
    ):
        hold_out(array_source(IMAGES[:2], labels[:2], NAMES), 0.5, 0)
    with pytest.raises(UserError, match=r"data\.tasks: task 0 \(classes \[0, 1\]\) has no test rows"):
        make_scenario(rest, held, "class", [[0, 1], [2]])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, NAN])
def test_a_share_of_validation_rows_out_of_range(share):
    with pytest.raises(UserError, match=f"data.validation: {share} is not allowed, give a share above 0 and below 1"):
        hold_out(SOURCES[0], share, 0)
