"""What every test shares: sixteen fake CPU devices, meshes over the first n of them, the data packs."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

# Before jax starts: with as many threads as cores, collectives of several queued steps on fake devices can deadlock.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compilation, and most of that is spent on code that runs for a moment: neither LLVM's optimisations
# nor the newer of XLA's two generators of code. In the environment, so that commands in processes of their own compute the
# same bits as the tests that compare them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jax").startswith("0.10."):  # later ones have one generator
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 16)

# Many tests save after every few steps, and each save waits for the disk: temporary folders lie in memory if there is enough.
MEMORY = pathlib.Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Compilation makes a first example slow, hence no deadline; the same examples every time, so that CI does not flicker.
hypothesis.settings.register_profile("jaxcl", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("jaxcl")

MAPPINGS = pathlib.Path("/proc/self/maps")
REPO = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """What one test has compiled no other compiles again, nor does the next run of the suite: a cache common to all.

    It lies in the user's cache folder, or in `JAXCL_TEST_CACHE`. Not for commands in processes of their own: one that is
    killed as it writes would leave half an entry.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxcl" / "tests"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAXCL_TEST_CACHE") or str(cache))
    jax.config.update("jax_compilation_cache_max_size", 2**32)  # a bound makes JAX lock the folder
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> Iterator[None]:
    """Linux gives a process 65,530 mappings of memory, and compiled programs take several each: XLA dies at the last."""
    yield
    if MAPPINGS.is_file() and MAPPINGS.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def mesh_of() -> Callable[[int], jax.sharding.Mesh]:
    """`mesh_of(n)`: a mesh over the first n devices with the one axis "data"."""

    @functools.cache
    def make(n: int) -> jax.sharding.Mesh:
        from jaxcl.mesh import make_mesh

        devices = jax.devices()
        if len(devices) < n:
            pytest.skip(f"needs {n} devices, {jax.default_backend()} has {len(devices)}")
        return make_mesh(devices[:n])

    return make


@pytest.fixture(scope="session")
def mesh_of_shape() -> Callable[[int, int, int], jax.sharding.Mesh]:
    """`mesh_of_shape(data, fsdp, model)`: a mesh over the first devices with these places along its axes."""

    @functools.cache
    def make(data: int, fsdp: int, model: int) -> jax.sharding.Mesh:
        from jaxcl.mesh import make_mesh

        if len(jax.devices()) < data * fsdp * model:
            pytest.skip(f"needs {data * fsdp * model} devices, {jax.default_backend()} has {len(jax.devices())}")
        return make_mesh(jax.devices()[: data * fsdp * model], data=data, fsdp=fsdp, model=model)

    return make


@pytest.fixture(scope="session")
def packs() -> pathlib.Path:
    """Folder of the data packs (mnist.npz, cifar10.npz, ...): `JAXCL_PACKS`, else shared/data beside the checkout."""
    folder = pathlib.Path(os.environ.get("JAXCL_PACKS") or REPO.parent / "shared" / "data")
    if not (folder / "mnist.npz").is_file():
        pytest.skip(f"no data packs in {folder}; set JAXCL_PACKS to their folder")
    return folder
