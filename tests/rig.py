"""A small problem for tests of steps and strategies: model, buffer and step on n devices, the same rows for every n."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Drawn, make_buffer
from jaxcl.data import make_augment, make_normalize
from jaxcl.models import dense_layers, joining, make_model
from jaxcl.partition import Layout, Split, make_layout
from jaxcl.strategies import Strategy
from jaxcl.training.latents import Codec, remembering
from jaxcl.training.layout import squares_of
from jaxcl.training.learn import Bound
from jaxcl.training.state import TrainState, initial_state, make_weights
from jaxcl.training.step import make_train_step

K, SHAPE, BATCH, DRAWN = 6, (8, 8, 1), 16, 8
CLASSES = np.repeat(np.eye(3, dtype=bool), 2, axis=1)  # three tasks of two classes
MODELS = {
    "mlp": {"hidden": (12,)},
    "convnet": {"width": 2, "norm": "sync"},
    "mlp_norm": {"hidden": (8,), "norm": "sync"},
    "dytox": {"width": 8, "depth": 1, "heads": 4, "patch": 4},
    "vit": {"width": 16, "depth": 1, "heads": 4, "patch": 4},
}
RATE = 0.5


class Rig:
    """`rig.step(state, batch)` and what it is made of; in the host tier `rig.train_step` has to be prepared.

    `optimizer` is one, or makes one of the squares of gradients, see `make_optimizer`. With `codec` and `layer` the memory
    holds the activations of this layer, and what lies below learns.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        strategy: Strategy,
        model: str = "mlp",
        capacity: int = 48,
        memory: Mapping[str, Any] = MappingProxyType({}),
        optimizer: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation] | None = None,
        network: Mapping[str, Any] = MappingProxyType({}),
        augment: Sequence[str] = (),
        rules: Sequence[Split] = (),
        split_state: bool = False,
        codec: Codec | None = None,
        layer: str | None = None,
        **options: Any,
    ):
        network = {**MODELS[model], **network}
        self.model = make_model(model, K, options=network, axis_name=mesh_lib.AXIS, classes=CLASSES)
        if codec is not None and layer is not None:  # what lies below it learns too
            self.model, strategy = joining(self.model, layer, SHAPE)[0], remembering(strategy, codec)
        strategy = strategy if strategy.fit is None else strategy.fit(dense_layers(self.model, SHAPE, ()))
        self.mesh, self.strategy = mesh, strategy
        self.buffer = None
        if strategy.draws:
            variables = self.model.init(jax.random.key(0), SHAPE)
            image = np.zeros((1, *SHAPE), np.uint8)
            outputs, _ = self.model.apply(**variables, images=image.astype(np.float32), train=False)
            record = jax.tree.map(lambda x: x[0], strategy.record(jnp.asarray(image), outputs))
            counted = {"num_classes": K, "count_classes": True} if options.get("prior", "none") != "none" else {}
            self.buffer = make_buffer(
                record, capacity=capacity, representatives=DRAWN, mesh=mesh, axis=mesh_lib.AXIS, **counted, **memory
            )
        optimizer = optimizer or optax.identity()
        make: Any = (lambda squares: optimizer) if isinstance(optimizer, optax.GradientTransformation) else optimizer
        self.layout = self._layout(make(None), rules, split_state)
        optimizer = make(squares_of(self.layout))
        self.new_weights = make_weights(mesh, self.model, optimizer, SHAPE, layout=self.layout, begin=strategy.begin)
        images = make_augment(augment, SHAPE), make_normalize(SHAPE)
        rows = {"batch_size": BATCH, "task_of_row": np.arange(BATCH, dtype=np.int32) % len(CLASSES)}
        self.bound = Bound(
            mesh,
            self.model,
            strategy,
            self.buffer,
            optimizer,
            lambda epoch: RATE,
            *images,
            CLASSES,
            layout=self.layout,
            codec=codec,
            **rows | options,
        )
        self.train_step = make_train_step(self.bound, 0)
        self.step = self.train_step.program

    def _layout(
        self, optimizer: optax.GradientTransformation, rules: Sequence[Split], split_state: bool
    ) -> Layout | None:
        def new() -> Any:
            variables = self.model.init(jax.random.key(0), SHAPE)
            params = variables["params"]
            return params, optimizer.init(params), self.strategy.init(params, variables["batch_stats"])

        options: Any = {"given": rules, "split_state": split_state, "remat": self.model.remat}
        return make_layout(self.mesh, self.model.rules, *jax.eval_shape(new), **options)

    def state(self, stored: bool = True, **changes: Any) -> TrainState:
        """The first state with some fields changed; without the buffer unless `stored`, which compiles much faster."""
        buffer = self.buffer if stored else None
        counted = None if self.bound.prior == "none" else K
        weights = self.new_weights(jax.random.key(0))
        state = initial_state(self.mesh, weights, buffer, self.strategy, counted, layout=self.layout)
        changes = {name: mesh_lib.replicate(self.mesh, value) for name, value in changes.items()}
        return dataclasses.replace(state, **changes)

    def stage(self, state: TrainState, draws: list[Drawn]) -> TrainState:
        """The state with these rows of all devices waiting to be replayed."""
        return dataclasses.replace(state, staged=tuple(mesh_lib.shard_rows(self.mesh, d) for d in draws))

    def rows(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return mesh_lib.shard_rows(self.mesh, batch)


def make_batch(seed: int, classes: tuple[int, ...] = tuple(range(K)), n: int = BATCH) -> dict[str, np.ndarray]:
    """n random rows, the first quarter and some others not valid: with four devices or more, one has none to train on."""
    rng = np.random.default_rng(seed)
    valid = rng.random(n) < 0.7
    valid[: n // 4], valid[-1] = False, True
    return {
        "image": rng.integers(0, 256, (n, *SHAPE)).astype(np.uint8),
        "label": rng.choice(classes, n).astype(np.int32),
        "id": np.arange(n, dtype=np.int32),
        "valid": valid,
    }


def make_draw(seed: int, logits: bool = False, classes: tuple[int, ...] = tuple(range(K))) -> Drawn:
    """A draw as the buffer might have made it, some rows not valid."""
    batch = make_batch(seed, classes, DRAWN)
    record = {"image": batch["image"]}
    if logits:
        record["logits"] = np.random.default_rng(seed).normal(size=(DRAWN, K)).astype(np.float32)
    shard = np.zeros(DRAWN, np.int32)
    return Drawn(record, batch["label"], batch["id"], batch["valid"], shard)  # type: ignore[arg-type]


def close(a: Any, b: Any, **tolerance: float) -> None:
    """Asserts that two pytrees of arrays hold the same numbers but for rounding."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            x, y, **{"rtol": 2e-5, "atol": 2e-6, **tolerance}, err_msg=jax.tree_util.keystr(path)
        )
