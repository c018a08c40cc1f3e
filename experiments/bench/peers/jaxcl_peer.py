"""jaxcl's own buffer, measured by the same loop as its peers: reservoir, on one device or over several."""

from typing import Any

import jax
import jax.numpy as jnp

import jaxcl
from experiments.bench.peers import jax_peer, protocol
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, make_buffer


class Jaxcl(jax_peer.DonatedPeer):
    name = "jaxcl"
    note = "reservoir; draws from the union of all shards without replacement"
    peak = 1.3

    def __init__(self, capacity: int, row_shape: tuple[int, ...], batch: int, devices: int, path: str | None) -> None:
        jax_peer.start(devices)
        self.version = jax_peer.version(jaxcl.__version__)
        mesh = None if devices == 1 else mesh_lib.make_mesh(jax.devices()[:devices])
        buffer = make_buffer(
            {"image": jax_peer.one_record(row_shape)["image"]},
            capacity=capacity * devices,
            representatives=batch * devices,
            policy="reservoir",
            mesh=mesh,
        )

        def as_rows(rows: dict[str, jax.Array]) -> Rows:
            label = rows["label"]
            return Rows({"image": rows["image"]}, label, id=label, valid=jnp.ones_like(label, bool))

        def insert_and_draw(state: Any, rows: Any, key: jax.Array) -> tuple[Any, Any]:
            insert_key, draw_key = jax.random.split(key)
            state = buffer.insert(state, as_rows(rows), insert_key)
            return state, buffer.draw(state, draw_key)

        def insert(state: Any, rows: Any) -> Any:
            return buffer.insert(state, as_rows(rows), jax.random.key(1))

        sharding = None if mesh is None else mesh_lib.by_rows(mesh)
        self.bind(
            buffer.init(), insert_and_draw, insert, capacity * devices, row_shape, batch * devices, sharding=sharding
        )


if __name__ == "__main__":
    protocol.main(Jaxcl)
