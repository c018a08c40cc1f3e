"""The model of figure 3: its limits, and that its bytes are those of the buffer."""

import jax
import numpy as np
import pytest

from experiments.paper.step_model import DEVICES, Load, Machine, all_reduce, exchange, fit, run_time
from jaxcl.buffer import make_buffer
from jaxcl.errors import UserError

SIZES = {"parameters": 1_000_000, "row_bytes": 3080}


def test_one_device_waits_for_nothing_and_costs_its_rows():
    found = run_time(Machine(100.0), 1, **SIZES, new=56, representatives=7, rows=560, tasks=4, epochs=1)
    assert found["incremental"] == pytest.approx(560 / 100)
    assert found["rehearsal"] == found["rehearsal_exposed"] == pytest.approx(63 / 56 * 560 / 100)
    assert found["from_scratch"] == pytest.approx(2.5 * found["incremental"])
    assert found["step_all_reduce"] == found["step_exchange"] == 0


def test_an_infinitely_fast_network_leaves_the_ratio_of_rows():
    for n in DEVICES:
        found = run_time(Machine(100.0, bandwidth=1e30, latency=1e-30), n, **SIZES)
        assert found["rehearsal"] / found["incremental"] == pytest.approx(63 / 56)


def test_a_ring_sends_twice_the_gradients_at_most():
    machine = Machine(100.0, bandwidth=1e9, latency=1e-30)
    assert all_reduce(2, 10**9).seconds(machine) == pytest.approx(4.0)
    assert 7.9 < all_reduce(1024, 10**9).seconds(machine) < 8.0


@pytest.mark.parametrize("devices", [2, 8])
def test_the_exchange_moves_what_the_buffer_says(devices, mesh_of):
    record = {"image": jax.ShapeDtypeStruct((32, 32, 3), np.uint8)}
    buffer = make_buffer(record, capacity=64, representatives=7 * devices, mesh=mesh_of(devices), policy="reservoir")
    assert exchange(devices, 7, buffer.traffic["row_bytes"]).bytes == buffer.traffic["bytes_moved"]


def test_a_fit_finds_the_machine_that_made_the_times_and_no_negative_costs():
    loads = [Load(56 * n, 1e6 * n * (n - 1), n * k) for k, n in enumerate((1, 2, 4, 8, 16))]
    costs = np.array([1e-3, 2e-10, 1e-4])
    np.testing.assert_allclose(fit(loads, np.array(loads) @ costs), costs)
    assert fit(loads, [0.1, 0.1, 0.1, 0.1, 0.01]).min() == 0


def test_a_machine_without_speed_is_refused():
    with pytest.raises(UserError, match=r"rows_per_second: 0.0 is not allowed"):
        Machine(0.0)
