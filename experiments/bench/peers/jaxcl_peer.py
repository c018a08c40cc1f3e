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
    one_device = False

    def __init__(self, sizes: protocol.Sizes) -> None:
        super().__init__(sizes)
        self.started(jaxcl.__version__)
        devices = sizes.devices
        mesh = None if devices == 1 else mesh_lib.make_mesh(jax.devices()[:devices])
        self.sharding = None if mesh is None else mesh_lib.by_rows(mesh)
        buffer = make_buffer(
            {"image": jax_peer.one_record()["image"]},
            capacity=sizes.capacity * devices,
            representatives=sizes.batch * devices,
            policy="reservoir",
            mesh=mesh,
        )

        def insert(state: Any, rows: dict[str, jax.Array], key: jax.Array | None = None) -> Any:
            label = rows["label"]
            given = Rows({"image": rows["image"]}, label, id=label, valid=jnp.ones_like(label, bool))
            return buffer.insert(state, given, jax.random.key(1) if key is None else key)

        def insert_and_draw(state: Any, rows: dict[str, jax.Array], key: jax.Array) -> tuple[Any, Any]:
            insert_key, draw_key = jax.random.split(key)
            state = insert(state, rows, insert_key)
            return state, buffer.draw(state, draw_key)

        self.bind(buffer.init(), insert_and_draw, insert)


if __name__ == "__main__":
    protocol.main(Jaxcl)
