"""The kernels of gated linear attention: they lower for an H100, and their values in the Mosaic interpreter."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax import lax

from gsa_jax import ops
from pallas_kernels import decays, linear_attention, tiles
from tests.helpers import rel_err
from tests.ops import cases
from tests.ops.cases import Sizes
from tests.pallas_kernels.hopper import count_kernels, forward_and_backward, shapes

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
SMALL = Sizes(B=2, T=100, H=2, G=1, K=128, V=64, M=0)
RUN = functools.partial(forward_and_backward, cases.linear_attention)
FORWARD, BACKWARD = 3, 3


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (Sizes(16, 2048, 4, 4, 256, 512, 0), {}),
        (Sizes(1, 3, 4, 2, 128, 64, 0), {"dtype": F16, "gates_dtype": BF16}),
        (Sizes(2, 100, 2, 1, 512, 128, 0), {"gates_dtype": BF16}),
        (Sizes(1, 64, 1, 1, linear_attention.LARGEST_KEY, 64, 0), {}),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, Sizes) else "-".join(x) or "plain",
)
def test_lowers(sizes, options):
    assert count_kernels(RUN, shapes(cases.linear_attention, sizes, **options)) == FORWARD + BACKWARD


def test_vmap():
    entry = shapes(cases.linear_attention, SMALL)
    stacked = jax.tree.map(lambda x: x.update(shape=(3, *x.shape)), entry)
    assert count_kernels(jax.vmap(RUN), stacked) == FORWARD + BACKWARD
    axes = {name: 0 if name == "log_decay" else None for name in entry}
    some = {name: (stacked if axes[name] == 0 else entry)[name] for name in entry}
    assert count_kernels(jax.vmap(cases.linear_attention, in_axes=(axes,)), some) == FORWARD


@pytest.fixture
def interpreted(monkeypatch):
    """The op with its kernels in the interpreter, which takes neither wgmma's operands nor its results in registers."""

    def product(*pairs):
        return sum(jnp.dot(x[...].astype(F32), y[...].astype(F32), precision="highest") for x, y in pairs)

    monkeypatch.setattr(tiles, "product", product)
    monkeypatch.setattr(decays, "product", product)
    monkeypatch.setattr(tiles, "unknown_zero", lambda: jnp.zeros(tiles.SQUARE, jnp.int32), raising=False)
    monkeypatch.setattr(linear_attention, "chunk_states", chunk_states)
    for name in ("chunk_gates", "linear_read", "linear_read_backward", "linear_write_backward"):
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        kernel = functools.partial(getattr(linear_attention, name), interpret=interpret)
        monkeypatch.setattr(linear_attention, name, kernel)
    return linear_attention.gated_linear_attention


def chunk_states(x, key, kept, initial, *, other=None, reverse=False):
    """`pallas_kernels.states.chunk_states` in jax.numpy."""
    num_heads, (num_groups, num_chunks) = x.shape[2], kept.shape[1:3]

    def chunks(x):
        x = jnp.repeat(x.astype(F32), num_heads // x.shape[2], axis=2)
        x = jnp.pad(x, ((0, 0), (0, num_chunks * tiles.SIZE - x.shape[1]), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], num_chunks, tiles.SIZE, *x.shape[2:])

    added = jnp.einsum("bnchm,bnchd->nbhmd", chunks(key), chunks(x))
    kept = jnp.moveaxis(jnp.repeat(kept, num_heads // num_groups, axis=1), 2, 0)[..., None]
    last, states = lax.scan(lambda state, c: (c[0] * state + c[1], state), initial, (kept, added), reverse=reverse)
    states = jnp.moveaxis(states, 0, 2)
    if other is None:
        return states.astype(x.dtype), last
    dots = (states * jnp.repeat(other, num_heads // num_groups, axis=1)).sum(-1)
    return states.astype(x.dtype), last, dots[:, :, :, None]


@pytest.mark.parametrize(
    ("sizes", "dtype", "gates_dtype", "gates_width"),
    [(Sizes(1, 101, 4, 2, 128, 64, 0), BF16, F32, 128), (Sizes(2, 70, 1, 1, 64, 128, 0), F16, BF16, 1)],
    ids=["grouped", "one-gate-a-head"],
)
def test_values(interpreted, sizes, dtype, gates_dtype, gates_width):
    B, T, H, G, K, V, _ = sizes
    draw = [functools.partial(jax.random.normal, key) for key in jax.random.split(jax.random.key(0), 7)]
    q, k, v = draw[0]((B, T, H, K), dtype), draw[1]((B, T, G, K), dtype), draw[2]((B, T, G, V), dtype)
    x = draw[3]((B, T, G, gates_width))
    gates = jnp.where(x > 1.5, -1000.0, jnp.where(x > 1.3, -jnp.inf, -0.05 * jnp.exp(x))).astype(gates_dtype)
    inputs = (q, k, v, gates, draw[4]((B, G, K, V)))
    cotangents = (draw[5]((B, T, H, V), dtype), draw[6]((B, G, K, V)))

    def definition(*inputs):
        return ops.gated_linear_attention(*inputs[:4], initial_state=inputs[4], scale=0.3, implementation="scan")

    outputs, pullback = jax.vjp(functools.partial(interpreted, scale=0.3), *inputs)
    exact, exact_pullback = jax.vjp(definition, *(x.astype(F32) for x in inputs))
    gradients, exact_gradients = pullback(cotangents), exact_pullback(tuple(x.astype(F32) for x in cotangents))
    for ours, true in zip((*outputs, *gradients), (*exact, *exact_gradients), strict=True):
        assert rel_err(ours, true) < 5e-3
