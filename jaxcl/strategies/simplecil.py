"""SimpleCIL: the mean features of each class are its weights in a cosine classifier. No memory of rows, no training.

Zhou et al. 2023, Revisiting class-incremental learning with pre-trained models: generalizability and adaptivity are all you
need, section 4. With the mean m_k of the features of all rows of class k,

    score_k = cos(f, m_k)

The means are made of sums over all rows and devices, so they are the same on any number of devices and, with weights that stay,
in any order of rows and tasks. With `adapt` the network is trained in the first task alone (the paper's first-session
adaptation); the paper then joins the features of the two networks, here those of the adapted one are used.
"""

import jax
import jax.numpy as jnp

from jaxcl.nearest_mean import class_sums, unit
from jaxcl.strategies.base import Context, End, Outputs, Part, Strategy
from jaxcl.types import PyTree


def simplecil(adapt: bool = False) -> Strategy:
    return Strategy(
        learns="first" if adapt else "none",
        last_weights="takes its class means from the last weights at a task's end",
        head=True,
        init=init,
        visit=visit,
        end_task=end_task,
        scores=scores,
    )


def init(params: PyTree, batch_stats: PyTree) -> PyTree:
    features, classes = params["head"]["kernel"].shape
    return {"sum": jnp.zeros((classes, features)), "count": jnp.zeros(classes)}


def visit(params: PyTree, batch_stats: PyTree, part: Part, context: Context) -> PyTree:
    """Sums of the rows' features by class, and their number."""
    features = context.predict(params, batch_stats, part.image)["features"]
    total, count = class_sums(features, part.label, part.valid, context.classes.shape[1])
    return {"sum": total, "count": count}


def end_task(end: End) -> tuple[PyTree, PyTree]:
    return end.params, jax.tree.map(jnp.add, end.context.state, end.visited)


def scores(outputs: Outputs, state: PyTree) -> jax.Array:
    """Cosines `[b, K]`; -2 for a class that has had no rows. The direction of a sum is that of the mean."""
    return jnp.where(state["count"] > 0, unit(outputs["features"]) @ unit(state["sum"]).T, -2.0)
