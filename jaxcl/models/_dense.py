"""The dense layers of a network: which of them follow one another, and what enters each."""

import itertools
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models._parts import HEAD
from jaxcl.types import PyTree


def dense_layers(
    model: Any, image_shape: tuple[int, int, int], frozen: Collection[str], read: tuple[int, ...] | None = None
) -> tuple[str, ...]:
    """The dense layers that are trained, from the lowest to the head, where they are all that is trained and each reads as many
    numbers as the one below gives; else ().

    Args:
      image_shape: that `model.init` wants.
      read: the shape of a row as `model.apply` reads it; None: that of an image.
    """

    def called(key: jax.Array) -> tuple[PyTree, dict[str, jax.Array]]:
        variables = model.init(key, image_shape)
        images = jnp.zeros((1, *(image_shape if read is None else read)))
        return variables["params"], dense_inputs(model, variables["params"], variables["batch_stats"], images)

    order: list[str] = []
    params, inputs = jax.eval_shape(lambda key: _noted(called(key), order), jax.random.key(0))
    layers = [name for name in order if name not in frozen]
    shapes = [params[name]["kernel"].shape for name in layers]
    apart = any(below[1] != above[0] for below, above in itertools.pairwise(shapes))
    if {*params} - {*frozen} != {*layers} or layers[-1:] != [HEAD] or apart:
        return ()
    flat = all(inputs[name].shape == (1, shape[0]) for name, shape in zip(layers, shapes, strict=True))
    return tuple(layers) if flat else ()


def dense_inputs(model: Any, params: PyTree, batch_stats: PyTree, images: jax.Array) -> dict[str, jax.Array]:
    """What enters each dense layer at the top of the network, by its name in the order of calls, as in evaluation."""
    heard: dict[str, jax.Array] = {}

    def listen(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Dense) and len(module.path) == 1:
            heard[module.path[0]] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(listen):
        model.apply(params, batch_stats, images, train=False)
    return heard


def _noted(found: tuple[PyTree, dict[str, jax.Array]], order: list[str]) -> tuple[PyTree, dict[str, jax.Array]]:
    """What was found, with the order of the names, which a pytree that leaves a program has lost."""
    order += found[1]
    return found
