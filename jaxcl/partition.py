"""How weights are divided over a mesh: rules on the names of parameters, and what a step does with the parts.

A rule names the axis of the mesh along which each axis of an array is divided, as Flax's logical axes do in T5X and MaxText:

    Split(r"fc1\\.kernel", ("fsdp", "model"))

Along `fsdp` a device keeps its part of weights and of all that is like them (moments of the optimiser, an old model of a
strategy, an average), and brings the weights of a layer together where the layer is computed (`all_gather`), in the forward and
again in the backward pass; their gradients come back as parts (its transpose, `psum_scatter`). Rajbhandari et al. 2020, ZeRO:
memory optimizations toward training trillion parameter models, stage 3; PyTorch's FSDP. Along `model` weights never come
together: the compiler divides the computation as they are divided.

With `split_state` the optimiser works on parts along `data` too: every device updates its part of the weights it holds, and
brings the new weights together. ZeRO, stage 1.

Everything that a strategy sees in a step is whole, but for the `params` of its `gradients`, see `Strategy.by_parts`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.check import refused
from jaxcl.mesh import AXIS, DATA, FSDP, MODEL, WHOLE
from jaxcl.types import PyTree

BLOCK = "block"  # the name of what a model with `remat` keeps for the backward pass, see `jax.ad_checkpoint.checkpoint_name`
AXES = (FSDP, MODEL)  # along which rules divide weights
Shapes = PyTree  # of `jax.ShapeDtypeStruct`


class Split(NamedTuple):
    """A rule.

    Attributes:
      pattern: a regular expression for the end of a parameter's path, from a dot on, such as "block_0.fc1.kernel".
      axes: of the mesh, one for each axis of the array; None: not divided.
    """

    pattern: str
    axes: tuple[str | None, ...]

    def names(self, path: str) -> bool:
        return re.search(rf"(^|\.)(?:{self.pattern})$", path) is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the weights of a run lie on its mesh. Functions on arrays are for use within a program of `mesh.on_mesh`.

    Attributes:
      mesh: the devices.
      shapes: of the parameters, whole.
      params, opt_state, strategy_state: a spec for each of their arrays.
      updated: specs of the parts of the parameters that a device updates.
      remat: whether the model computes its blocks anew in the backward pass, see `ViT.remat`.
    """

    mesh: Mesh
    shapes: Shapes
    params: PyTree
    opt_state: PyTree
    strategy_state: PyTree
    updated: PyTree
    remat: bool = False

    def whole(self, params: PyTree) -> PyTree:
        """The parameters whole along `fsdp`, from this device's parts; what is whole stays as it is."""

        def one(x: jax.Array, spec: PartitionSpec, shape: jax.ShapeDtypeStruct) -> jax.Array:
            return x if x.shape == shape.shape else _gathered(x, spec, FSDP)

        return jax.tree.map(one, params, self.params, self.shapes)

    def whole_state(self, strategy_state: PyTree) -> PyTree:
        """The same of the strategy's own state, from parts alone."""
        return jax.tree.map(functools.partial(_gathered, axis=FSDP), strategy_state, self.strategy_state)

    def parts(self, whole: PyTree) -> PyTree:
        """This device's parts of arrays that are like the parameters, or broadcast to them."""

        def one(x: jax.Array, spec: PartitionSpec, shape: jax.ShapeDtypeStruct) -> jax.Array:
            return _part(jnp.broadcast_to(x, shape.shape), spec, FSDP)

        return jax.tree.map(one, whole, self.params, self.shapes)

    def checkpointed(self, objective: Callable) -> Callable:
        """`objective(params, ...)`, whose backward pass brings the weights together anew instead of keeping them."""
        if not any(_place(spec, FSDP) is not None for spec in jax.tree.leaves(self.params, is_leaf=_is_spec)):
            return objective
        if self.remat:
            return jax.checkpoint(objective, policy=jax.checkpoint_policies.save_only_these_names(BLOCK))
        shapes = {x.shape for x in jax.tree.leaves(self.shapes)}

        def keep(primitive: Any, *inputs: Any, **params: Any) -> bool:
            # What is computed of weights alone is as large as they are: a copy in bfloat16, the terms of a penalty.
            of_weights = bool(inputs) and all(x.shape in shapes or not x.shape for x in inputs)
            return primitive.name not in ("all_gather", "shard_map") and not of_weights

        return jax.checkpoint(objective, policy=keep)

    @property
    def by_path(self) -> dict[str, PartitionSpec]:
        """The specs of the parameters by their paths."""
        found = jax.tree_util.tree_leaves_with_path(self.params, is_leaf=_is_spec)
        return {path_of(path): spec for path, spec in found}

    def summed(self, grads: dict[str, PyTree], *rest: PyTree) -> tuple[PyTree, ...]:
        """Parts of gradients, of all parts of the model or some, and what else there is of each device, summed over all."""
        leaves, form = jax.tree.flatten(grads)
        specs = jax.tree.leaves({name: self.params[name] for name in grads}, is_leaf=_is_spec)
        apart = [_place(spec, FSDP) is not None for spec in specs]
        along = lax.psum([x for x, split in zip(leaves, apart, strict=True) if split], DATA)
        everywhere, *found = lax.psum(([x for x, split in zip(leaves, apart, strict=True) if not split], *rest), AXIS)
        come = iter(along), iter(everywhere)
        return jax.tree.unflatten(form, [next(come[not split]) for split in apart]), *found

    def own(self, params: PyTree) -> PyTree:
        """What of its parts a device updates."""
        return jax.tree.map(functools.partial(_part, axis=DATA), params, self.updated)

    def joined(self, own: PyTree) -> PyTree:
        """This device's parts of the parameters, from what each device has updated."""
        return jax.tree.map(functools.partial(_gathered, axis=DATA), own, self.updated)

    def vdot(self, a: PyTree, b: PyTree) -> jax.Array:
        """The inner product of two trees of parts like the parameters'."""
        return sum(jax.tree.leaves(_totals(jax.tree.map(jnp.vdot, a, b), self.params)), jnp.float32(0))

    def squares(self, own: PyTree) -> PyTree:
        """The sum of squares of each array that is updated, from what each device updates."""
        return _totals(jax.tree.map(lambda x: jnp.sum(jnp.square(x)), own), self.updated)


def make_layout(
    mesh: Mesh,
    rules: Sequence[Split],
    params: Shapes,
    opt_state: Shapes,
    strategy_state: Shapes,
    *,
    given: Sequence[Split] = (),
    split_state: bool = False,
    remat: bool = False,
    model: str = "",
) -> Layout | None:
    """How weights lie on a mesh; None where every device holds everything whole.

    Args:
      rules: of the model; () divides the longest axis that can be of every array of several, along `fsdp`.
      params, opt_state, strategy_state: shapes of what is to be divided; the last two follow the parameters that their arrays
        are like, by path and shape.
      given: rules that go before those of the model (`mesh.rules`).
      split_state: whether the optimiser's state is divided along `data` too.
      remat: see `Layout`.
      model: its name, for errors.

    Raises:
      UserError: a rule names no parameter or not its axes, an axis does not divide, or nothing divides along `model`.
    """
    if mesh.shape[FSDP] == mesh.shape[MODEL] == 1 and not (split_state and mesh.shape[DATA] > 1):
        return None
    paths = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for rule in given:
        if not any(rule.names(path) for path in paths):
            raise refused("mesh.rules", rule.pattern, f"the end of a parameter's name, such as {next(iter(paths))}")
    found = {path: _spec(mesh, path, x.shape, (*given, *rules), longest=not rules) for path, x in paths.items()}
    if mesh.shape[MODEL] > 1 and not any(_place(spec, MODEL) is not None for spec in found.values()):
        raise refused("mesh.model", mesh.shape[MODEL], f"1: {model} has no rule that divides weights along it")
    updated = {path: _updated(mesh, paths[path].shape, spec) if split_state else spec for path, spec in found.items()}

    def like(tree: Shapes, specs: dict[str, PartitionSpec]) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, x: _like(path_of(path), x.shape, specs, paths), tree)

    return Layout(
        mesh=mesh,
        shapes=params,
        params=like(params, found),
        opt_state=like(opt_state, updated),
        strategy_state=like(strategy_state, found),
        updated=like(params, updated),
        remat=remat,
    )


def path_of(path: Any) -> str:
    """Of a leaf, as checkpoints name it."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def bytes_on_device(mesh: Mesh, specs: PyTree, shapes: Shapes) -> int:
    """Of arrays that lie on a mesh as their specs say, what one device holds."""

    def one(spec: PartitionSpec, x: Any) -> int:
        parts = math.prod(mesh.shape[name] for entry in spec for name in mesh_lib.names_of(entry or ()))
        return math.prod(x.shape) * x.dtype.itemsize // parts

    return sum(jax.tree.leaves(mesh_lib.of_specs(one, specs, shapes)))


def _spec(mesh: Mesh, path: str, shape: tuple[int, ...], rules: Sequence[Split], longest: bool) -> PartitionSpec:
    """Of a parameter: by the first rule that names it, else whole, or along its `longest` axis.

    Raises:
      UserError: see `make_layout`.
    """
    rule = next((rule for rule in rules if rule.names(path)), None)
    if rule is None:
        return _longest(shape, mesh.shape[FSDP], (None,) * len(shape), FSDP) if longest and len(shape) > 1 else WHOLE
    if len(rule.axes) != len(shape):
        raise refused("mesh.rules", rule, f"an axis of the mesh, or None, for each of {len(shape)} axes of {path}")
    for i, (size, name) in enumerate(zip(shape, rule.axes, strict=True)):
        if name is not None and size % mesh.shape[name]:
            raise refused(f"mesh.{name}", mesh.shape[name], f"a divisor of {size}, the axis {i} of {path} {shape}")
    return PartitionSpec(*(name if name is not None and mesh.shape[name] > 1 else None for name in rule.axes))


def _longest(shape: tuple[int, ...], places: int, entries: tuple[Any, ...], axis: str) -> PartitionSpec:
    """The spec of these entries with the longest axis that is whole, and can be divided, divided along `axis`."""
    whole = [i for i, entry in enumerate(entries) if entry is None and shape[i] % places == 0]
    if places == 1 or not whole:
        return PartitionSpec(*entries)
    longest = max(whole, key=lambda i: shape[i])
    return PartitionSpec(*(axis if i == longest else entry for i, entry in enumerate(entries)))


def _updated(mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    entries = (*spec, *(None,) * (len(shape) - len(spec)))
    return _longest(shape, mesh.shape[DATA], entries, DATA)


def _like(
    path: str, shape: tuple[int, ...], specs: dict[str, PartitionSpec], paths: dict[str, jax.ShapeDtypeStruct]
) -> PartitionSpec:
    """The spec of the parameter that the end of the path names, of the same shape; whole where there is none."""
    parts = path.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    name = next((end for end in ends if end in paths and paths[end].shape == shape), None)
    return WHOLE if name is None else specs[name]


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _place(spec: PartitionSpec, axis: str) -> int | None:
    """The axis of the array that is divided along `axis`; None for none."""
    return next((i for i, entry in enumerate(spec) if entry == axis), None)


def _gathered(x: jax.Array, spec: PartitionSpec, axis: str) -> jax.Array:
    place = _place(spec, axis)
    if place is None:
        return x
    gather = functools.partial(lax.all_gather, axis_name=axis, axis=place, tiled=True)
    return mesh_lib.over_model(gather, x, spec)


def _part(x: jax.Array, spec: PartitionSpec, axis: str) -> jax.Array:
    place = _place(spec, axis)
    if place is None:
        return x
    size = x.shape[place] // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, place)


def _totals(sums: PyTree, specs: PyTree) -> PyTree:
    """The sum of each array, from what each device found of its part; of what several devices hold alike, once."""
    leaves, form = jax.tree.flatten(sums)
    by_axes: dict[tuple[str, ...], list[int]] = {}
    for i, spec in enumerate(jax.tree.leaves(specs, is_leaf=_is_spec)):
        axes = tuple(axis for axis in AXIS if _place(spec, axis) is not None)
        by_axes.setdefault(axes, []).append(i)
    for axes, places in by_axes.items():
        if axes:
            for i, x in zip(places, lax.psum([leaves[i] for i in places], axes), strict=True):
                leaves[i] = x
    return jax.tree.unflatten(form, leaves)
