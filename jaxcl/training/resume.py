"""Where a run begins: a new state, or the one that was saved last, on the devices of now."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, Shard
from jaxcl.buffer.reshard import reshard
from jaxcl.runs import checkpoint
from jaxcl.runs.lanes import Lanes
from jaxcl.runs.session import Session
from jaxcl.training.build import Parts, capacity_of, policy_of
from jaxcl.training.learn import step_keys
from jaxcl.training.state import TrainState
from jaxcl.training.task import weights_of


def start(lanes: Lanes[TrainState], parts: Parts) -> TrainState:
    """The state of all lanes in which the run begins or goes on."""
    with lanes.phases("compile"):
        weights = [weights_of(config, parts, 0) for config in lanes.configs]
        states = [parts.new_state(one) for one in weights]
    if lanes.sessions[0].found is not None:
        with lanes.phases("restore"):
            each = zip(lanes.configs, lanes.sessions, states, strict=True)
            states = [restore(config, session, parts, state) for config, session, state in each]
    with lanes.phases("compile"):
        return lanes.join(states)


def restore(config: ConfigDict, session: Session, parts: Parts, state: TrainState) -> TrainState:
    """The state of the checkpoint; `state`, a new one, gives the shapes and is freed."""
    target, found = checkpoint.abstract(state), session.found
    assert found is not None
    jax.tree.map(lambda x: x.delete(), state)  # or the memory would have to hold the buffer twice
    if parts.buffer is None or session.progress.row_shards == parts.shards:
        if parts.host is not None:
            parts.host.restore(session.checkpoints.rows(found, parts.host.payload(), parts.host.row))
        return session.checkpoints.restore(found, target)
    target = dataclasses.replace(target, staged=())
    state = session.checkpoints.restore(found, target, reshaped=("buffer.",), ignored=("staged.",))
    assert state.buffer is not None
    shards = divide_anew(config, session, parts, parts.buffer, state.buffer)
    # The draws that wait to be replayed are made anew, by the keys of the step that made them.
    keys = step_keys(jax.random.key(config.seed), state.step - 1, parts.strategy.draws)[2:]
    return dataclasses.replace(state, buffer=shards, staged=jax.jit(parts.buffer.stage)(shards, keys))


def divide_anew(config: ConfigDict, session: Session, parts: Parts, buffer: Buffer, stored: Shard) -> Shard:
    """The shards of the session that saved them, NumPy arrays, as those of this one."""
    old, store = session.progress.row_shards, buffer.host
    if store is not None:  # the record of a slot is then its number, which tells where the row is to be found
        stored = dataclasses.replace(stored, record=np.arange(len(stored.id)))
    shards = reshard(
        stored,
        policy=policy_of(config, parts.strategy),
        capacity=capacity_of(config.buffer, parts.scenario),
        num_classes=parts.train.num_classes,
        old=old,
        new=parts.shards,
        memory=config.buffer.memory,
    )
    if store is not None:
        rows = session.checkpoints.rows(session.found or {}, range(old), store.row)
        store.restore(rows, np.where(shards.id >= 0, shards.record, -1))
        shards = dataclasses.replace(shards, record={})
    return mesh_lib.split_rows(parts.mesh, shards)
