"""The class means of the memory, by which metrics such as `nmc` classify test rows beside the strategy's own way.

They are made anew for every evaluation, by a pass over the stored rows on the devices; no step knows of them.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcl.buffer import Shard
from jaxcl.mesh import ROWS, WHOLE, on_mesh
from jaxcl.nearest_mean import Means, means_of
from jaxcl.strategies.icarl import visit
from jaxcl.training.end_task import stored_rows, visit_rows, visit_shard
from jaxcl.training.learn import Bound
from jaxcl.training.state import ROWS_OF_SEEDS, Weights, weights_specs


def make_class_means(bound: Bound, *, seeds: bool = False) -> Callable[[Weights, Shard], Means]:
    """`class_means(weights, memory) -> means`, the same on every device: of the features that these weights give to the rows of
    all shards. A row that is stored several times, in independent memories, counts as often.

    Args:
      seeds: weights and memory have a leading axis of seeds, and so have the means.
    """
    function: Callable[[Weights, Shard], Means] = functools.partial(of_shards, bound)
    if not seeds:
        return on_mesh(bound.mesh, function, (weights_specs(bound.layout), ROWS), WHOLE)
    return on_mesh(bound.mesh, jax.vmap(function), (WHOLE, ROWS_OF_SEEDS), WHOLE)


def of_shards(bound: Bound, weights: Weights, shard: Shard) -> Means:
    """The means over all devices, on this device's shard."""
    visiting = dataclasses.replace(bound, strategy=bound.strategy._replace(visit=visit, visits="buffer"))
    one = {name: x[:1] for name, x in stored_rows(shard).items()} | {"valid": jnp.zeros(1, bool)}
    sums = jax.eval_shape(functools.partial(visit_rows, visiting), weights, one)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    return means_of(*visit_shard(visiting, weights, nothing, shard))
