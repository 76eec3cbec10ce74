"""The kernels of gated linear attention lower for an H100."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import linear_attention, memory_read
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
    reads = math.ceil(sizes.K / memory_read.MOST_SLOTS)
    assert count_kernels(RUN, shapes(cases.linear_attention, sizes, **options)) == FORWARD + BACKWARD + reads - 1


def test_vmap():
    entry = shapes(cases.linear_attention, SMALL)
    stacked = jax.tree.map(lambda x: x.update(shape=(3, *x.shape)), entry)
    assert count_kernels(jax.vmap(RUN), stacked) == FORWARD + BACKWARD
    axes = {name: 0 if name == "log_decay" else None for name in entry}
    some = {name: (stacked if axes[name] == 0 else entry)[name] for name in entry}
    assert count_kernels(jax.vmap(cases.linear_attention, in_axes=(axes,)), some) == FORWARD
