"""Where the tests run: on the CPU, whatever the machine has, unless `-m` asks for the gpu tests."""

import gc
import os
import tempfile

import hypothesis
import pytest

hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Sets the platform and the threads in the environment, before any test imports jax; xdist's workers inherit it."""
    asked = config.option.markexpr
    if "gpu" in asked and "not gpu" not in asked:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share one GPU
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # the tests compile much and compute little
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # for the workers and the processes that tests start
            folder = tempfile.TemporaryDirectory(prefix="jax-cache-")
            config.add_cleanup(folder.cleanup)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
        if getattr(config.option, "dist", "no") == "load":  # one worker a file: what its tests share is made once
            config.option.dist, config.option.loadscopereorder = "loadfile", False
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers fill the cores already


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first: one of these last would leave the other workers idle for a minute."""
    for folder in ("generation", "layers", "models", "ops", "pallas_kernels", "training", "test_readme"):
        items.sort(key=lambda item: not item.nodeid.startswith(f"tests/{folder}"))


def pytest_collection_finish() -> None:
    """Python's collector leaves alone what the imports made, and comes less often: it took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a gpu test where there is no GPU."""
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip(f"needs a GPU, and jax runs on {jax.default_backend()}")
