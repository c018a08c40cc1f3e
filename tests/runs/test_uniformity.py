"""The tally of figure 6: it passes a uniform draw, and shows the reference's rule for what it is."""

import numpy as np

from experiments.paper.uniformity import Tally

ROWS = np.array([[80, 0, 0], [10, 5, 5], [20, 0, 20]])  # of each shard and class


def test_a_uniform_draw_passes_and_the_references_rule_does_not():
    """2,000 draws of 12 rows: |z| of six sums below 4.5, false alarm 4e-5; the other rule's is above 20."""
    rng = np.random.default_rng(0)
    cells, uniform, reference = np.repeat(np.arange(9), ROWS.ravel()), Tally(3, 3), Tally(3, 3)
    of_rule = np.array([1, 0, 0, 1 / 3, 1 / 3, 1 / 3, 1 / 2, 0, 1 / 2]) / 3
    for _ in range(2000):
        drawn = np.bincount(rng.choice(cells, 12, replace=False), minlength=9)
        uniform.add(ROWS, drawn.reshape(3, 3))
        reference.add(ROWS, rng.multinomial(12, of_rule).reshape(3, 3))
    for axis in ("shard", "class"):
        assert np.abs(uniform.by(axis)["z"]).max() < 4.5
        assert np.abs(reference.by(axis)["z"]).max() > 20
        found = reference.by(axis)
        np.testing.assert_allclose(found["drawn_over_expected"], found["reference_over_expected"], rtol=0.05)


def test_nothing_drawn_counts_for_nothing():
    tally = Tally(2, 2)
    tally.add(np.zeros((2, 2), int), np.zeros((2, 2), int))
    assert tally.by("shard")["drawn"] == tally.by("shard")["expected"] == [0, 0]
