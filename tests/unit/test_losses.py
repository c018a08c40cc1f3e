"""Per-row losses against NumPy, and their corners: ties, NaN, forbidden classes, the labels of padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.losses import cross_entropy, distillation, reconstruction_error, topk_correct

LOGITS = np.random.default_rng(0).normal(size=(16, 7)).astype(np.float32)
LABELS = np.arange(16) % 7
MASK = np.array([1, 1, 0, 1, 0, 1, 1], bool)


def test_cross_entropy_against_numpy():
    p = np.exp(LOGITS.astype(np.float64))
    rows = np.arange(16)
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS), -np.log(p[rows, LABELS] / p.sum(1)), rtol=1e-5)
    ok = MASK[LABELS]
    masked = -np.log(p[rows, LABELS] / (p * MASK).sum(1))
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS, MASK)[ok], masked[ok], rtol=1e-5)
    per_row = np.broadcast_to(MASK, LOGITS.shape)
    np.testing.assert_array_equal(cross_entropy(LOGITS, LABELS, per_row), cross_entropy(LOGITS, LABELS, MASK))


def test_cross_entropy_is_float32_and_stable():
    found = cross_entropy(jnp.array([[1e4, 0.0]], jnp.bfloat16), jnp.array([1]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1e4, rtol=5e-3)


def test_forbidden_classes_get_no_gradient():
    grad = jax.grad(lambda x: (cross_entropy(x, LABELS, MASK) * MASK[LABELS]).sum())(jnp.array(LOGITS))
    assert np.isfinite(grad).all() and np.abs(grad[:, MASK]).max() > 0
    np.testing.assert_array_equal(grad[:, ~MASK], 0)


@pytest.mark.parametrize("label", [-1, 7, 2**31 - 1])  # padding; with the mask, a row that forbids its own label
def test_padding_of_weight_zero_weighs_nothing(label):
    def loss(x):
        return (cross_entropy(x, np.array([0, label, 2]), MASK) * np.array([1, 0, 0])).sum()

    value, grad = jax.value_and_grad(loss)(jnp.array(LOGITS[:3]))
    np.testing.assert_allclose(value, cross_entropy(LOGITS[:1], np.array([0]), MASK)[0])
    np.testing.assert_array_equal(grad[1:], 0)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_topk_against_numpy(k):
    order = np.argsort(-LOGITS, axis=1)
    np.testing.assert_array_equal(
        topk_correct(LOGITS, LABELS, k), [y in o[:k] for y, o in zip(LABELS, order, strict=True)]
    )
    order = np.argsort(-np.where(MASK, LOGITS, -np.inf), axis=1)
    expected = [MASK[y] and y in o[:k] for y, o in zip(LABELS, order, strict=True)]
    np.testing.assert_array_equal(topk_correct(LOGITS, LABELS, k, MASK), expected)


def test_ties_and_nan_count_against_the_row():
    logits = jnp.array([[1.0, 1.0, 0.0], [np.nan] * 3, [np.nan, 1.0, 0.0], [1.0, np.nan, 0.0]])
    labels = jnp.zeros(4, int)
    np.testing.assert_array_equal(topk_correct(logits, labels), [False] * 4)
    np.testing.assert_array_equal(topk_correct(logits, labels, 2), [True, False, False, True])


def test_distillation():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 4)).astype(np.float32)
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(1, keepdims=True) for x in (teacher, student))
    np.testing.assert_allclose(distillation(student, teacher, 2.0), 4 * (p * np.log(p / q)).sum(1), rtol=1e-4)
    np.testing.assert_allclose(distillation(teacher, teacher, 2.0), 0, atol=1e-6)
    two = np.array([True, True, False, False])
    masked, alone = (
        distillation(student, teacher, 2.0, two),
        distillation(student[:, :2], teacher[:, :2], 2.0),
    )
    np.testing.assert_allclose(masked, alone, rtol=1e-5)
    gradient = jax.grad(lambda x: distillation(x, teacher, 2.0, np.zeros(4, bool)).sum())(student)
    np.testing.assert_array_equal(gradient, 0)  # no class, no pull


def test_error_of_a_row_is_the_sum_over_tensors_of_its_mean_distance():
    rng = np.random.default_rng(0)
    found, wanted = ({"a": rng.normal(size=(3, 4, 2)), "b": rng.normal(size=(3, 5))} for _ in range(2))
    expected = sum(np.abs(found[k] - wanted[k]).reshape(3, -1).mean(1) for k in "ab")
    np.testing.assert_allclose(reconstruction_error(found | {"c": 0}, wanted), expected, rtol=1e-5)
