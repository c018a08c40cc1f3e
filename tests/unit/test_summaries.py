"""Summaries of the accuracy matrix against values computed by hand and against the identities between variants."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl import summaries
from jaxcl.errors import UserError

# Task 0 peaks in the middle and recovers a little; task 1 is best at the end. 99 and 77 would show in any summary that
# looks at tasks not trained yet.
A = np.array([[0.8, 99, 99], [0.9, 0.5, 77], [0.6, 0.7, 0.4]])
SQUARES = st.integers(1, 6).flatmap(
    lambda t: st.lists(st.lists(st.floats(0, 1), min_size=t, max_size=t), min_size=t, max_size=t)
)


def test_hand_computed():
    expected = {
        "average_accuracy": (0.6 + 0.7 + 0.4) / 3,
        "average_incremental_accuracy": (0.8 + (0.9 + 0.5) / 2 + (0.6 + 0.7 + 0.4) / 3) / 3,
        "forgetting": {
            "chaudhry": ((0.9 - 0.6) + (0.5 - 0.7)) / 2,  # rows 0..1, without the last
            "mammoth": ((0.9 - 0.6) + (0.7 - 0.7)) / 2,  # the last row too
            "avalanche": ((0.8 - 0.6) + (0.5 - 0.7)) / 2,  # the diagonal
        },
        "backward_transfer": {
            "gem": ((0.6 - 0.8) + (0.7 - 0.5)) / 2,
            "diaz_rodriguez": ((0.9 - 0.8) + (0.6 - 0.8) + (0.7 - 0.5)) / 3,
        },
    }
    found = summaries.summarize(A)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key
    np.testing.assert_allclose(summaries.accuracy_so_far(A), [0.8, 0.7, 1.7 / 3])


def test_forward_transfer():
    a = [[0.9, 0.3, 0.2], [0.5, 0.9, 0.4], [0.5, 0.5, 0.9]]
    assert summaries.forward_transfer(a, [0.7, 0.1, 0.1]) == pytest.approx(((0.3 - 0.1) + (0.4 - 0.1)) / 2)
    with pytest.raises(UserError, match=r"random_init.*\(3,\)"):
        summaries.forward_transfer(a, [0.1])


def test_per_class_accuracy():
    assert summaries.per_class_accuracy([[3, 1, 0], [0, 0, 0], [2, 2, 0]]) == [0.75, None, 0.0]


def test_mean_and_deviation():
    assert summaries.mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert summaries.mean_and_deviation([2.5]) == (2.5, 0.0)


def test_one_task():
    found = summaries.summarize([[0.75]])
    assert found["average_accuracy"] == found["average_incremental_accuracy"] == 0.75
    assert {*found["forgetting"].values(), *found["backward_transfer"].values()} == {0.0}
    assert summaries.forward_transfer([[0.75]], [0.5]) == 0.0


@given(SQUARES)
def test_identities(matrix):
    f, b = summaries.summarize(matrix)["forgetting"], summaries.summarize(matrix)["backward_transfer"]
    assert b["gem"] == pytest.approx(-f["avalanche"])
    assert f["avalanche"] <= f["chaudhry"] + 1e-12
    assert f["chaudhry"] <= f["mammoth"] + 1e-12
    assert f["mammoth"] >= 0
    if len(matrix) == 2:  # one earlier row: first is best, and one later row: all variants but the clipped one agree
        assert f["chaudhry"] == pytest.approx(f["avalanche"])
        assert b["diaz_rodriguez"] == pytest.approx(b["gem"])


@given(SQUARES)
def test_future_tasks_do_not_count(matrix):
    a = np.array(matrix)
    assert summaries.summarize(a) == summaries.summarize(np.tril(a))


@pytest.mark.parametrize("matrix", [[[0.1, 0.2]], [0.1], [], [[0.1], [0.2, 0.3]], [["x"]]])
def test_not_square(matrix):
    with pytest.raises(UserError, match="accuracy matrix"):
        summaries.summarize(matrix)
