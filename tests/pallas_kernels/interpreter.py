"""Runs the kernels on the CPU, in Pallas' interpreter of Mosaic GPU kernels, which also looks for data races."""

import contextlib

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.decays
import pallas_kernels.tiles


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """Kernels traced inside `with interpreted():` run in the interpreter; a race is an error, at the latest on exit.

    Stand-ins for what the interpreter does not know: products with a factor in registers and accumulators that start
    with a value. It knows neither layouts nor registers, and does not see products that read shared memory before it is
    committed: lowering and running on a GPU test these.
    """
    for module in (pallas_kernels.tiles, pallas_kernels.decays):
        monkeypatch.setattr(module, "product", _product)
    monkeypatch.setattr(
        pallas_kernels.tiles, "multiprocessors", lambda: 1
    )  # one block does all chunks, one after another
    monkeypatch.setattr(plgpu.ACC, "init", lambda start: start)
    monkeypatch.setattr(pl, "run_state", _run_state)
    if np.lib.NumpyVersion(np.__version__) < "2.1.3":  # there np.full(shape, 0, bfloat16) crashes when called often
        monkeypatch.setattr(np, "full", _full)

    @contextlib.contextmanager
    def interpreter():
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        assert "RACE DETECTED" not in capfd.readouterr().out  # jax 0.11.2 only prints it

    return interpreter


def _product(*pairs):
    for x, y in pairs:
        assert x.dtype == y.dtype and jnp.dtype(x.dtype).itemsize == 2, "as wgmma wants them"
    result = sum(jnp.matmul(_value(x), _value(y), precision="highest") for x, y in pairs)
    plgpu.commit_smem()  # wgmma reads as the memory engine writes, what stands for it here does not
    return result


def _value(x):
    return (x if isinstance(x, jax.Array) else x[...]).astype(jnp.float32)


def _run_state(body):
    def run(start):
        def scoped(accumulator):
            body(accumulator)
            return accumulator[...]

        return start + pl.run_scoped(scoped, plgpu.ACC(start.shape, start.dtype))

    return run


def _full(shape, fill_value, dtype=None):
    result = np.empty(shape, dtype or np.asarray(fill_value).dtype)
    result[...] = fill_value
    return result
