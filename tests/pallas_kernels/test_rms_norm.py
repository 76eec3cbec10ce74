"""RMSNorm's kernels: in the interpreter and on a GPU against float64, lowered without one, and where they are taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax.layers import RMSNorm
from gsa_jax.ops import pallas
from gsa_jax.sharding import MESH_AXES
from pallas_kernels import rms_norm as kernels
from tests.helpers import rel_err
from tests.pallas_kernels.hopper import count_kernels, mesh

EPSILON = 0.5
BF16, F16 = jnp.bfloat16, jnp.float16
FORMS = ("plain", "swish", "stream", "sum")


def norm(form, x, update, scale):
    """What a form of the norm returns, as a tuple."""
    if form in ("stream", "sum"):
        return kernels.rms_norm_of_sum(x, update if form == "sum" else None, scale, epsilon=EPSILON)
    return (kernels.rms_norm(x, scale, epsilon=EPSILON, swish=form == "swish"),)


def make_case(shape, dtype, seed=0):
    """(x, update, scale), and cotangents of (x + update, norm), rounded as the kernels get them."""
    rng = np.random.default_rng(seed)
    x, update, *cotangents = (jnp.asarray(rng.standard_normal(shape) * 2, dtype) for _ in range(4))
    return (x, update, jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)), cotangents


def definition(form, x, update, scale, cotangents):
    """((x + update, norm), gradients of x, update and scale) in float64, by the derivative's formula."""
    x, update, scale, d_total, d_out = (np.asarray(a, np.float64) for a in (x, update, scale, *cotangents))
    total = x + update if form == "sum" else x
    sigmoid = 1 / (1 + np.exp(-total))
    h = total * sigmoid if form == "swish" else total
    size = np.sqrt((h**2).mean(-1, keepdims=True) + EPSILON)
    n, g = h / size, scale * d_out
    dx = (g - n * (n * g).mean(-1, keepdims=True)) / size
    dx = dx * (sigmoid + h * (1 - sigmoid)) if form == "swish" else dx
    dx = dx + d_total if form in ("stream", "sum") else dx
    return (total, scale * n), (dx, dx, (n * d_out).reshape(-1, x.shape[-1]).sum(0))


def check(form, shape, dtype):
    arrays, cotangents = make_case(shape, dtype)
    outputs, gradients = definition(form, *arrays, cotangents)
    results, pullback = jax.vjp(jax.jit(functools.partial(norm, form)), *arrays)
    found = pullback(tuple(cotangents[-len(results) :]))
    for result, reference in zip(results, outputs[-len(results) :], strict=True):
        assert result.dtype == dtype and rel_err(result, reference) < 5e-3
    for i, (result, reference) in enumerate(zip(found, gradients, strict=True)):
        unused = i == 1 and form != "sum"
        assert rel_err(result, 0 * reference if unused else reference) < 5e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_in_the_interpreter(interpreted, form, dtype):
    with interpreted():
        check(form, (3, 12, 512), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 2048, 2048), BF16),
        ((3, 1236, 512), F16),
        ((1, 700, 4, 1024), BF16),
        ((2, 500, 2560), BF16),
        ((1, 700, 4096), BF16),
    ],
)
def test_on_a_gpu(form, shape, dtype):
    check(form, shape, dtype)


@pytest.mark.gpu
def test_same_bits_each_time():
    arrays, cotangents = make_case((8, 2048, 2048), BF16)
    run = jax.jit(lambda arrays, cotangents: jax.vjp(functools.partial(norm, "sum"), *arrays)[1](tuple(cotangents)))
    first, second = run(arrays, cotangents), run(arrays, cotangents)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, second)))


def stream(width, dtype=BF16, tokens=(2, 1024)):
    return jax.ShapeDtypeStruct((*tokens, width), dtype)


def forward_backward(layer, x, on=None):
    """The number of kernels in `RMSNorm.of_sum` and its gradients."""
    definition, parameters = nnx.split(layer)

    def run(parameters, x):
        return jax.vjp(lambda parameters, x: nnx.merge(definition, parameters).of_sum(x, x), parameters, x)[1]((x, x))

    return count_kernels(run, parameters, x, on=on)


def layer(width, dtype=BF16):
    return RMSNorm(width, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("width", "dtype"), [(512, BF16), (1024, F16), (2560, BF16), (4096, BF16)])
def test_lowers(width, dtype):
    assert forward_backward(layer(width, dtype), stream(width, dtype)) == 2
    definition, parameters = nnx.split(layer(width, dtype))
    for x in (stream(width, dtype), stream(width, dtype, tokens=(2, 512, 4))):
        run = jax.value_and_grad(
            lambda p, x: nnx.merge(definition, p)(x, swish=True).astype(jnp.float32).sum(), argnums=(0, 1)
        )
        assert count_kernels(run, parameters, x) == 2
        assert count_kernels(jax.vmap(run, in_axes=(None, 0)), parameters, x.update(shape=(3, *x.shape))) == 2


@pytest.mark.parametrize(
    "x",
    [stream(320), stream(6144), stream(512, jnp.float32), stream(512, tokens=(4, 1)), stream(512, tokens=(3, 333))],
    ids=lambda x: f"{x.shape}-{x.dtype}",
)
def test_xla_where_the_kernels_do_not_fit(x):
    assert forward_backward(layer(x.shape[-1], x.dtype), x) == 0


def test_xla_on_other_devices():
    assert forward_backward(layer(512), stream(512), on=mesh("NVIDIA A100-SXM4-80GB")) == 0


@pytest.mark.parametrize(
    ("sizes", "tokens", "kernels"),
    [
        ({"data": 2}, (2, 1024), 2),
        ({"fsdp": 2, "context": 2}, (2, 2048), 2),
        ({"context": 4}, (4, 512), 0),  # 512 rows a device are too few
        ({"data": 4}, (6, 2048), 0),
        ({"tensor": 2}, (2, 1024), 0),
    ],
)
def test_over_a_mesh(sizes, tokens, kernels):
    axes = dict.fromkeys(MESH_AXES, 1) | sizes
    assert forward_backward(layer(512), stream(512, tokens=tokens), on=mesh(**axes)) == kernels


@pytest.mark.parametrize("implementation", ["scan", "chunked"])
def test_xla_where_it_is_asked_for(implementation):
    plain = RMSNorm(512, implementation=implementation, dtype=BF16, rngs=nnx.Rngs(0))
    assert forward_backward(plain, stream(512)) == 0


def test_64_bit_integers():
    with jax.enable_x64(True):
        assert forward_backward(layer(512), stream(512)) == 2


def test_layer(interpreted, monkeypatch):
    """What a layer makes of the kernels is what it makes without them, gradients too."""
    (x, update, scale), _ = make_case((2, 10, 1536), BF16)
    norm = RMSNorm(1536, epsilon=EPSILON, dtype=BF16, rngs=nnx.Rngs(0))
    norm.scale[...] = scale
    definition, parameters = nnx.split(norm)

    def outputs(parameters, x, update):
        norm = nnx.merge(definition, parameters)
        return *norm.of_sum(x, update), *norm.of_sum(x), norm(x), norm(x, swish=True)

    def outputs_and_gradients():
        outs, pullback = jax.vjp(outputs, parameters, x, update)
        return outs, pullback(tuple(jnp.cos(out) for out in outs))

    expected = outputs_and_gradients()
    monkeypatch.setattr(pallas, "_call_misfit", lambda chunk_size: None)
    monkeypatch.setattr(kernels, "FEWEST", 1)
    with interpreted():
        found = outputs_and_gradients()
    for result, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert result.dtype == reference.dtype and rel_err(result, reference) < 1e-2
