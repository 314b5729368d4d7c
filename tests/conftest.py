"""Settings of the whole suite: float64 on, strict promotion, fixed seeds, no compilation left over."""

import gc
import os
import signal
import zlib

import hypothesis
import jax
import matplotlib
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
matplotlib.use("Agg")
# Where the suite runs in the background Ctrl-C is ignored, and would be by the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Added to the seed of every test, to try the suite on other draws: CURVAX_TEST_SEED=1 make test.
BASE_SEED = int(os.environ.get("CURVAX_TEST_SEED", "0"))

hypothesis.settings.register_profile(
    "suite", derandomize=BASE_SEED == 0, deadline=None, max_examples=25, print_blob=True
)
hypothesis.settings.load_profile("suite")


def pytest_report_header(config: pytest.Config) -> str:
    """What a failure depends on, printed once."""
    backend = f"{jax.default_backend()} x {jax.device_count()}"
    return f"curvax: jax {jax.__version__} on {backend}, float64, CURVAX_TEST_SEED={BASE_SEED}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--thorough` runs every case of every sweep."""
    parser.addoption("--thorough", action="store_true", help="also run what is marked `thorough`")


# Two batched LAPACK calls at once wait for each other on two cores (docs/sharp-bits.md), unless XLA orders its program.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# Most programs of the suite run once or twice: a quarter of the time to compile, with XLA's older emitters of
# CPU code and nothing optimised, counts more.
QUICK_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Compile quickly; with `--thorough` as users do."""
    quick = not config.getoption("--thorough")
    # XLA reads the variable once, and ends where it does not know a flag.
    if jax.__version_info__ < (0, 12):
        flags = os.environ.get("XLA_FLAGS", "").split()
        wanted = [IN_ORDER, QUICK_EMITTERS] if quick else [IN_ORDER]
        os.environ["XLA_FLAGS"] = " ".join(flags + [flag for flag in wanted if flag not in flags])
    if quick and jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # processes that tests start round alike


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `thorough` unless asked; skip what is marked `gpu` where there is none."""
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, JAX sees none"))


@pytest.fixture(autouse=True, scope="module")
def _free_compilations():
    """Drop the executables of a module after it: in one process they would pile up to gigabytes."""
    yield
    jax.clear_caches()
    # Executables hang in cycles of references.
    gc.collect()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own, the same in every run, printed when the test fails."""
    value = (zlib.crc32(request.node.name.encode()) + BASE_SEED) % 2**31
    print(f"seed {value}")
    return value


@pytest.fixture
def key(seed: int) -> jax.Array:
    """A JAX key from `seed`."""
    return jax.random.key(seed)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A NumPy generator from `seed`."""
    return np.random.default_rng(seed)
