"""Summaries of the accuracy matrix, each published variant under its own name.

A run leaves a T x T matrix A of accuracies in [0, 1]: row i after training task i, column j on the test set of task j.
All columns are filled; those above the diagonal (tasks not trained yet) enter no summary but `forward_transfer`.
With one task nothing can be forgotten or transferred: those summaries are 0.0.

The identities that tie the variants together, tested in tests/unit/test_summaries.py:
  backward_transfer_gem == -forgetting_avalanche
  forgetting_avalanche <= forgetting_chaudhry <= forgetting_mammoth, and forgetting_mammoth >= 0
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxcl.errors import UserError


def _square(matrix: ArrayLike) -> NDArray[np.float64]:
    try:
        a = np.asarray(matrix, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"accuracy matrix: rows of unequal length or not numbers ({error}); allowed: T x T") from None
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.size:
        raise UserError(f"accuracy matrix: shape {a.shape}; allowed: T x T with T >= 1")
    return a


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else 0.0


def _history(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows in which a task has been trained (i >= j); the others hold -inf, so that a maximum passes them by."""
    return np.where(np.tri(len(a), dtype=bool), a, -np.inf)


def average_accuracy(matrix: ArrayLike) -> float:
    """Mean over tasks after the last: 1/T sum_j A[T-1, j]. Lopez-Paz & Ranzato 2017 (GEM), ACC."""
    return _mean(_square(matrix)[-1])


def accuracy_so_far(matrix: ArrayLike) -> NDArray[np.float64]:
    """Mean over the tasks seen so far, after each task: `[T]`, element i is 1/(i+1) sum_{j<=i} A[i, j]."""
    a = _square(matrix)
    return np.tril(a).sum(1) / np.arange(1, len(a) + 1)


def average_incremental_accuracy(matrix: ArrayLike) -> float:
    """1/T sum_i 1/(i+1) sum_{j<=i} A[i, j]. Rebuffi et al. 2017 (iCaRL), tasks of equal weight."""
    return _mean(accuracy_so_far(matrix))


def forgetting_chaudhry(matrix: ArrayLike) -> float:
    """1/(T-1) sum_{j<T-1} (max_{j<=i<=T-2} A[i, j] - A[T-1, j]). Chaudhry et al. 2018 (RWalk), equation 3.

    The paper defines a_{l,j} only for j <= l, hence rows from j. The last row is not in the maximum, so a task that is
    best at the end counts negatively. Continuum cites this definition, but its code leaves out row T-2 and task T-2.
    """
    a = _square(matrix)
    return _mean(_history(a)[:-1, :-1].max(0, initial=-np.inf) - a[-1, :-1])


def forgetting_mammoth(matrix: ArrayLike) -> float:
    """1/(T-1) sum_{j<T-1} (max_{j<=i<=T-1} A[i, j] - A[T-1, j]), never negative. Mammoth, utils/metrics.py."""
    a = _square(matrix)
    return _mean((_history(a).max(0) - a[-1])[:-1])


def forgetting_avalanche(matrix: ArrayLike) -> float:
    """1/(T-1) sum_{j<T-1} (A[j, j] - A[T-1, j]): first minus last. Avalanche, StreamForgetting."""
    a = _square(matrix)
    return _mean((np.diag(a) - a[-1])[:-1])


def backward_transfer_gem(matrix: ArrayLike) -> float:
    """1/(T-1) sum_{j<T-1} (A[T-1, j] - A[j, j]). Lopez-Paz & Ranzato 2017 (GEM), BWT."""
    a = _square(matrix)
    return _mean((a[-1] - np.diag(a))[:-1])


def backward_transfer_diaz_rodriguez(matrix: ArrayLike) -> float:
    """2/(T(T-1)) sum_{i>j} (A[i, j] - A[j, j]): every later row counts. Diaz-Rodriguez et al. 2018, BWT.

    Continuum cites this sum, but its code leaves out the terms i = j + 1.
    """
    a = _square(matrix)
    return _mean((a - np.diag(a))[np.tri(len(a), k=-1, dtype=bool)])


def forward_transfer(matrix: ArrayLike, random_init: ArrayLike) -> float:
    """1/(T-1) sum_{j>=1} (A[j-1, j] - random_init[j]). Lopez-Paz & Ranzato 2017 (GEM), FWT.

    random_init: `[T]` accuracies of the untrained model. Raises UserError for another shape.
    """
    a, b = _square(matrix), np.asarray(random_init, np.float64)
    if b.shape != (len(a),):
        raise UserError(f"random_init: shape {b.shape}; allowed: ({len(a)},), one accuracy a task")
    return _mean(np.diag(a, k=1) - b[1:])


def per_class_accuracy(confusion: ArrayLike) -> list[float | None]:
    """Of each class the share of its rows that were recognised: `[K]`, None for a class without rows.

    confusion: int `[K, K]`, rows by label and by the class predicted.
    """
    counts = np.asarray(confusion, np.float64)
    rows = counts.sum(1)
    return [float(right / n) if n else None for right, n in zip(np.diag(counts), rows, strict=True)]


def mean_and_deviation(values: ArrayLike) -> tuple[float, float]:
    """Over seeds: the mean and the sample deviation (n - 1); that of a single value is 0."""
    v = np.asarray(values, np.float64)
    return float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0


def summarize_errors(matrix: ArrayLike) -> dict[str, Any]:
    """As `summarize`, of a matrix of errors: averages of it, and as forgetting the rise of an error above its best.

    With A = -errors the definitions stay what they are: forgetting is positive and backward transfer negative where the
    error on an earlier task has risen.
    """
    found = summarize(-_square(matrix))
    return {
        "average_error": -found.pop("average_accuracy"),
        "average_incremental_error": -found.pop("average_incremental_accuracy"),
        **found,
    }


def summarize(matrix: ArrayLike) -> dict[str, Any]:
    """Every summary of the matrix by named definition, in the shape that result.json holds."""
    return {
        "average_accuracy": average_accuracy(matrix),
        "average_incremental_accuracy": average_incremental_accuracy(matrix),
        "forgetting": {
            "chaudhry": forgetting_chaudhry(matrix),
            "mammoth": forgetting_mammoth(matrix),
            "avalanche": forgetting_avalanche(matrix),
        },
        "backward_transfer": {
            "gem": backward_transfer_gem(matrix),
            "diaz_rodriguez": backward_transfer_diaz_rodriguez(matrix),
        },
    }
