"""A network cut in two at a layer: what lies below gives activations, what lies above goes on from them.

Both halves are the whole network, called with a hook on its modules: below the cut its output is taken as it passes; above, the
layer is not called and the activations stand for what it would give. What nothing depends on then is dead code, which the
compiler removes. So every Linen network can be cut at any part that all of its output passes through, and parameters keep their
names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.check import near, refused
from jaxcl.errors import UserError
from jaxcl.models._norms.base import Mask, valid_of
from jaxcl.models._parts import HEAD, NECK, PROMPTS
from jaxcl.types import PyTree

FEATURES = "features"  # as a layer: what the backbone gives, the input of the neck where there is one, else of the head


class Halves(NamedTuple):
    """The two halves.

    Attributes:
      lower: `(params, batch_stats, images) -> [B, *shape]`, as in evaluation, in the dtype of the layer.
      upper: the model from `[B, *shape]` of any float type, with the parameters of the whole and the statistics of all its
        norms, of which those below stay.
      below: the parts whose weights `upper` does not use.
      shape: of one row's activations.
    """

    lower: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    upper: Any
    below: tuple[str, ...]
    shape: tuple[int, ...]


def split(model: Any, layer: str, image_shape: tuple[int, int, int]) -> Halves:
    """The model cut behind the part `layer`, or behind its backbone ("features").

    Raises:
      UserError: there is no such part, it gives no array with a row for each image, or the network has a way around it; its
        parts are computed anew in the backward pass, behind which no hook reaches; or it has prompts.
    """
    if model.remat and layer != FEATURES:
        raise refused("model.options.remat", True, f"False with latent.layer = {layer}")

    def lower(params: PyTree, batch_stats: PyTree, images: jax.Array) -> jax.Array:
        return heard(model, layer, params, batch_stats, images, train=False)[0]

    variables = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    params, stats = variables["params"], variables["batch_stats"]
    if (layer != FEATURES and layer not in params) or layer == HEAD or HEAD not in params:
        raise UserError(f"latent.layer: no such part; {near(layer, [*(x for x in params if x != HEAD), FEATURES])}")
    if PROMPTS in params:
        raise refused("latent.layer", layer, "None with model.options.prompts, which learn beside images")
    entry = _entry(params)
    one = jax.eval_shape(lower, params, stats, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))

    def apply(
        params: PyTree,
        batch_stats: PyTree,
        images: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        blank: jax.Array | float = 0.0,
    ) -> tuple[dict[str, jax.Array], PyTree]:
        latent = images.astype(one.dtype)
        if mask is not None:
            latent = jnp.where(valid_of(mask).reshape(-1, *[1] * len(one.shape[1:])), latent, 0)

        def replace(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if layer == FEATURES and _is_at(context, entry):
                return call(latent, *args[1:], **kwargs)
            return latent if _is_at(context, layer) else call(*args, **kwargs)

        nothing = jnp.full((len(latent), *image_shape), blank, jnp.float32)
        with nn.intercept_methods(replace):
            outputs, updates = model.apply(params, batch_stats, nothing, train=train, mask=mask)
        kept = {name: x for name, x in batch_stats.items() if name in below}
        return outputs | ({FEATURES: latent} if layer == FEATURES and entry == HEAD else {}), {**updates, **kept}

    below: tuple[str, ...] = ()
    below = _unused(apply, params, stats, one)
    return Halves(lower, model._replace(apply=apply), below, one.shape[1:])


def heard(
    model: Any, layer: str, params: PyTree, batch_stats: PyTree, images: jax.Array, *, train: bool, mask: Mask = None
) -> tuple[jax.Array, dict[str, jax.Array], PyTree]:
    """What the layer gives, and what the whole network does.

    Raises:
      UserError: it gives no array with a row for each image.
    """
    passed: list[Any] = []
    entry = _entry(params)

    def listen(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        if layer == FEATURES and _is_at(context, entry):
            passed.append(args[0])
        elif _is_at(context, layer):
            passed.append(out)
        return out

    with nn.intercept_methods(listen):
        outputs, updates = model.apply(params, batch_stats, images, train=train, mask=mask)
    if layer == FEATURES and entry == HEAD and FEATURES in outputs:
        return outputs[FEATURES], outputs, updates
    if len(passed) != 1 or not isinstance(passed[0], jax.Array) or passed[0].shape[:1] != images.shape[:1]:
        raise UserError(f"latent.layer: {layer!r} does not give one array of all images; choose another part")
    return passed[0], outputs, updates


def _entry(params: PyTree) -> str:
    """The lowest part that is not of the backbone."""
    return f"{NECK}0" if f"{NECK}0" in params else HEAD


def _is_at(context: nn.module.InterceptorContext, layer: str) -> bool:
    return context.method_name == "__call__" and context.module.path == (layer,)


def _unused(apply: Callable[..., Any], params: PyTree, stats: PyTree, latent: jax.ShapeDtypeStruct) -> tuple[str, ...]:
    """The parts on which the outputs of the upper half do not depend.

    Raises:
      UserError: they depend on the images: there is a way around the layer.
    """

    def outputs(params: PyTree, blank: jax.Array, latent: jax.Array) -> dict[str, jax.Array]:
        return apply(params, some, latent, train=False, blank=blank)[0]

    some = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), stats)
    jaxpr = jax.make_jaxpr(outputs)(params, jax.ShapeDtypeStruct((), jnp.float32), latent).jaxpr
    needed = {id(x) for x in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(x) in needed for x in equation.outvars):
            needed |= {id(x) for x in equation.invars}
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    used = {path[0].key for (path, _), var in zip(leaves, jaxpr.invars, strict=False) if id(var) in needed}
    if id(jaxpr.invars[len(leaves)]) in needed:
        raise UserError("latent.layer: the network has a way around this part; choose another one")
    return tuple(name for name in params if name not in used)
