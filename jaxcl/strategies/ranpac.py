"""RanPAC: ridge regression on random features of a network that stays as it is. No memory of rows, no training.

McDonnell et al. 2023, RanPAC: random projections and pre-trained models for continual learning, equations 4 to 7. With the
features f of a row, its one-hot label y and a random matrix W, drawn once,

    h = relu(f W)        G = sum h h^T        C = sum h y^T        scores = h (G + ridge I)^-1 C

The sums run over all rows of all tasks and devices, so the classifier is the same on any number of devices and, as the network
stays, in any order of rows and tasks. With `adapt` the network is trained in the first task alone (the paper's first session).

The ridge, where it is not given, is the one of the least squared error on rows held out, as in the authors' code. There they
are the last fifth of each task, and the choice is that of the last task; here a row is held out by its id, and their sums are
kept apart, G = G_fit + G_held, which gives that error over all tasks without a row:

    sum |h V - y|^2 = tr(V^T G_held V) - 2 tr(V^T C_held) + rows held,   V = (G_fit + ridge I)^-1 C_fit

It is chosen among powers of ten of the mean of G's diagonal, not below 1e-4: the least that float32 can solve.
"""

import jax
import jax.numpy as jnp
import jax.scipy.linalg as linalg
from jax import lax

from jaxcl.check import COUNT, NOT_NEGATIVE, SEED, check
from jaxcl.strategies.base import Context, End, Outputs, Part, Strategy
from jaxcl.strategies.bic import is_held_out
from jaxcl.types import PyTree

HELD = 0.2  # the share of rows by which the ridge is chosen
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1)  # relative to the mean of G's diagonal
_exact = lax.Precision.HIGHEST


def ranpac(dim: int = 2000, ridge: float = 0.0, adapt: bool = False, seed: int = 0) -> Strategy:
    """Options: `dim` random features (the paper has 10,000); `ridge` as above, 0 to have it chosen; `seed` of W."""
    check("strategies.ranpac.dim", dim, COUNT)
    check("strategies.ranpac.ridge", ridge, NOT_NEGATIVE)
    check("strategies.ranpac.seed", seed, SEED)

    def init(params: PyTree, batch_stats: PyTree) -> PyTree:
        features, classes = params["head"]["kernel"].shape
        return {
            "projection": jax.random.normal(jax.random.key(seed), (features, dim)),
            "gram": jnp.zeros((2, dim, dim)),  # of the rows that fit, of those held out
            "targets": jnp.zeros((2, dim, classes)),
            "count": jnp.zeros((2, classes)),
            "weights": jnp.zeros((dim, classes)),
        }

    def end_task(end: End) -> tuple[PyTree, PyTree]:
        state = end.context.state
        sums = {name: state[name] + x for name, x in end.visited.items()}
        chosen = ridge or best_ridge(sums)
        return end.params, {**state, **sums, "weights": solved(sums["gram"].sum(0), sums["targets"].sum(0), chosen)}

    return Strategy(
        learns="first" if adapt else "none",
        last_weights="takes its sums from the last weights at a task's end",
        head=True,
        init=init,
        visit=visit,
        end_task=end_task,
        scores=scores,
    )


def expand(features: jax.Array, projection: jax.Array) -> jax.Array:
    """Random features `[b, M]` of features `[b, D]`."""
    return jax.nn.relu(jnp.matmul(features, projection, precision=_exact))


def visit(params: PyTree, batch_stats: PyTree, part: Part, context: Context) -> PyTree:
    """The sums over rows that fit, and over those held out."""
    h = expand(context.predict(params, batch_stats, part.image)["features"], context.state["projection"])
    held = is_held_out(part.id, HELD)
    weight = jnp.stack([part.valid & ~held, part.valid & held]).astype(jnp.float32)  # [2, b]
    label = jax.nn.one_hot(part.label, context.classes.shape[1])
    return {
        "gram": jnp.einsum("sb,bi,bj->sij", weight, h, h, precision=_exact),
        "targets": jnp.einsum("sb,bi,bk->sik", weight, h, label, precision=_exact),
        "count": weight @ label,
    }


def solved(gram: jax.Array, targets: jax.Array, ridge: jax.Array | float) -> jax.Array:
    """(G + ridge * mean of G's diagonal * I)^-1 C, `[M, K]`; not finite where float32 cannot."""
    scale = ridge * jnp.trace(gram) / len(gram)
    regular = gram + jnp.maximum(scale, 1e-12) * jnp.eye(len(gram))
    return linalg.cho_solve(linalg.cho_factor(regular), targets)


def best_ridge(sums: PyTree) -> jax.Array:
    """Of `RIDGES`, by the rows held out."""
    (fit, held), (fit_targets, held_targets) = sums["gram"], sums["targets"]

    def error(ridge: jax.Array) -> jax.Array:
        weights = solved(fit, fit_targets, ridge)
        squares = jnp.sum(weights * jnp.matmul(held, weights, precision=_exact)) - 2 * jnp.sum(weights * held_targets)
        return jnp.where(jnp.isfinite(squares), squares, jnp.inf)

    ridges = jnp.array(RIDGES)
    return ridges[jnp.argmin(lax.map(error, ridges))]


def scores(outputs: Outputs, state: PyTree) -> jax.Array:
    """The regression's answers `[b, K]`; far below them for a class that has had no rows."""
    answers = jnp.matmul(expand(outputs["features"], state["projection"]), state["weights"], precision=_exact)
    return jnp.where(state["count"].sum(0) > 0, answers, -1e9)
