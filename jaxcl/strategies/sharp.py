"""SHARP: a sparse network whose units mature, and replay of hidden activations of the recent classes alone.

Gurbuz, Moorman & Dovrolis 2023, SHARP: Sparsity and hidden activation replay for neuro-inspired continual learning, and the
authors' code. With `latent.layer` the layers below stay and activations are remembered; the dense layers above are trained, and
the memory holds the classes of the last `recent` tasks. Of every hidden layer a share `density` of the links exists. A unit is

    plastic     at first
    chosen      from the end of a task in which it is among the most active units that together make `activity` of the sum over
                the layer's units of their activity on the task's rows
    mature      `recent` tasks later, when those rows have left the memory: the links into it and its bias stay

Then links from plastic units into others are dropped, and as many grow, from anywhere into plastic units, drawn at random. A
link that is not there has the weight 0, and so has one that grows. A layer without room for all of them becomes sparser. So a
chosen unit reads chosen units or the input alone, and a mature one gives what it gave, whatever the network learns.

Where it departs from the authors' code: there a task has phases, each with a choice, drops and growth, the first of which
chooses nearly all units; here each task's end has one of them, and plastic units keep their weights. There the loss is
contrastive and nearest neighbours classify; here a linear head learns by cross-entropy over new and replayed rows, with all its
links, until at the end of a task those from plastic units into its classes are dropped. Its column of a class that left the
memory is mature. There convolutions are sparse too; here what is trained is dense layers alone.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.check import COUNT, SEED, SHARE, check
from jaxcl.errors import UserError
from jaxcl.strategies.base import Context, End, Part, Strategy, recent_classes
from jaxcl.types import PyTree


def sharp(density: float = 0.4, activity: float = 0.6, recent: int = 1, seed: int = 0) -> Strategy:
    """Options: `density` of the links of hidden layers; the share `activity` of a layer's that chosen units have; `recent`
    tasks whose classes are remembered; `seed` of the links."""
    for name, value, rule in (
        ("density", density, SHARE),
        ("activity", activity, SHARE),
        ("recent", recent, COUNT),
        ("seed", seed, SEED),
    ):
        check(f"strategies.sharp.{name}", value, rule)

    def fit(layers: Sequence[str]) -> Strategy:
        if len(layers) < 2:
            raise UserError(
                "strategy: sharp trains hidden dense layers and a head, which must be all that is trained; give "
                "model.name = mlp, or another latent.layer"
            )
        return of(layers)

    def of(layers: Sequence[str]) -> Strategy:
        """For these dense layers, one behind the other, the head last."""
        hidden = layers[:-1]

        def first_links(params: PyTree) -> dict[str, jax.Array]:
            keys = jax.random.split(jax.random.key(seed), len(hidden))
            kernels = [params[name]["kernel"] for name in hidden]
            return {
                name: some_of(key, jnp.ones(w.shape, bool), round(density * w.size))
                for name, key, w in zip(hidden, keys, kernels, strict=True)
            }

        def begin(params: PyTree) -> PyTree:
            return with_links(params, first_links(params))

        def init(params: PyTree, batch_stats: PyTree) -> PyTree:
            head = jnp.ones(params[layers[-1]]["kernel"].shape, bool)
            age = {name: jnp.zeros(params[name]["kernel"].shape[1], jnp.int32) for name in hidden}
            return {"links": first_links(params) | {layers[-1]: head}, "age": age}

        def visit(params: PyTree, batch_stats: PyTree, part: Part, context: Context) -> PyTree:
            assert context.inputs is not None
            inputs = context.inputs(params, batch_stats, part.image)
            counted = part.valid[:, None]
            return {
                name: jnp.sum(jnp.where(counted, inputs[above], 0.0), axis=0, dtype=jnp.float32)
                for name, above in zip(hidden, layers[1:], strict=True)
            }

        def end_task(end: End) -> tuple[PyTree, PyTree]:
            context, links, age = end.context, end.context.state["links"], end.context.state["age"]
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), context.task), len(hidden))
            age = {name: older(x, most_active(end.visited[name], activity)) for name, x in age.items()}
            plastic = {name: x == 0 for name, x in age.items()}
            below = [
                jnp.zeros(len(links[layers[0]]), bool),
                *(plastic[name] for name in hidden),
            ]  # the input is not plastic
            changed = {
                name: rewired(key, links[name], source, plastic[name])
                for name, key, source in zip(hidden, keys, below[:-1], strict=True)
            }
            head = links[layers[-1]] & ~(below[-1][:, None] & context.seen)
            links = changed | {layers[-1]: head}
            return with_links(end.params, links), {"links": links, "age": age}

        def frozen(params: PyTree, context: Context) -> PyTree:
            mature = {name: x > recent for name, x in context.state["age"].items()}
            mature |= {layers[-1]: left_classes(context, recent)}
            still = jax.tree.map(lambda w: jnp.bool_(False), params)
            for name, links in context.state["links"].items():
                still[name] = {leaf: mature[name] | (~links if leaf == "kernel" else False) for leaf in still[name]}
            return still

        return Strategy(
            draws=1,
            selection="random",
            recent=recent,
            last_weights="drops links of the last weights at a task's end",
            head=True,
            begin=begin,
            init=init,
            visit=visit,
            end_task=end_task,
            alike=True,
            frozen=frozen,
        )

    return of(())._replace(fit=fit)


def some_of(key: jax.Array, among: jax.Array, count: jax.Array | int) -> jax.Array:
    """`count` of the places that are true, drawn at random without replacement, or all where there are no more: bools alike."""
    place = jnp.where(among, jax.random.uniform(key, among.shape), 2.0).ravel()
    rank = jnp.zeros(place.shape, jnp.int32).at[jnp.argsort(place)].set(jnp.arange(place.size, dtype=jnp.int32))
    return among & (rank < count).reshape(among.shape)


def with_links(params: PyTree, links: dict[str, jax.Array]) -> PyTree:
    """The parameters with the weight 0 where there is no link."""
    kernels = {name: jnp.where(there, params[name]["kernel"], 0.0) for name, there in links.items()}
    return {**params, **{name: {**params[name], "kernel": w} for name, w in kernels.items()}}


def most_active(active: jax.Array, share: float) -> jax.Array:
    """Which units, the most active first and no more than are needed, have this share of the sum of `active` `[units]`."""
    order = jnp.argsort(-active)
    before = jnp.cumsum(active[order]) - active[order]
    return jnp.zeros(active.shape, bool).at[order].set(before < share * jnp.sum(active))


def older(age: jax.Array, active: jax.Array) -> jax.Array:
    """The age of units `[units]` a task later: 0 of those that are plastic still."""
    return jnp.where((age > 0) | active, age + 1, 0)


def rewired(key: jax.Array, links: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """The links `[below, units]` without those from plastic units into others, and with as many more into plastic ones.

    Args:
      source, target: bools, which units below and of this layer are plastic.
    """
    dropped = links & source[:, None] & ~target
    return (links & ~dropped) | some_of(key, ~links & target, jnp.sum(dropped))


def left_classes(context: Context, recent: int) -> jax.Array:
    """bool `[K]`: the classes seen that neither this task nor the memory has rows of."""
    kept = np.concatenate([np.zeros_like(context.classes[:1]), recent_classes(context.classes, recent)[:-1]])
    return context.old & ~context.present & ~jnp.asarray(kept)[context.task]
