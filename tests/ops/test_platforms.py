"""What the ops lower to for TPUs and GPUs, on a machine that has none."""

import jax
import jax.numpy as jnp
import pytest

from gsa_jax.ops import softmax_attention
from tests.helpers import rel_err
from tests.ops.cases import IMPLEMENTATIONS, OPS, TOLERANCE, Sizes, make_case


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("op", OPS)
def test_exports_for_tpu(op, dtype, implementation, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # so that "chunked" cuts chunks as for a TPU
    arrays, _ = make_case(op, Sizes(2, 300, 4, 2, 16, 16, 8), dtype=dtype)

    def loss(arrays):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in op(arrays, implementation=implementation).values())

    exported = jax.export.export(jax.jit(jax.value_and_grad(loss)), platforms=["tpu"])(arrays)
    assert exported.platforms == ("tpu",)
    assert [x.shape for x in exported.out_avals[1:]] == [x.shape for x in jax.tree.leaves(arrays)]
    if dtype == jnp.bfloat16 and implementation == "chunked":
        products = [line for line in exported.mlir_module().splitlines() if "stablehlo.dot_general" in line]
        assert products and any("bf16" in line for line in products)


@pytest.mark.parametrize("op", OPS)
def test_padding_is_apart_from_what_reads_it(op, monkeypatch):
    """XLA's search for a GPU's tiles of the two in one can take hours."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def barriers(length):
        arrays, _ = make_case(op, Sizes(2, length, 4, 2, 16, 16, 8), dtype=jnp.bfloat16)
        run = jax.jit(lambda arrays: op(arrays, implementation="chunked"))
        return run.trace(arrays).lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.optimization_barrier")

    assert barriers(300) == barriers(384) + 1


@pytest.mark.parametrize("segment_ids", [None, jnp.zeros((2, 8), int)], ids=["one document", "packed"])
def test_softmax_attention_in_float16_where_a_platform_has_no_such_products(segment_ids):
    q = jax.random.normal(jax.random.key(0), (2, 8, 2, 4))
    half = jax.jit(softmax_attention)(*[q.astype(jnp.float16)] * 3, segment_ids=segment_ids)
    assert half.dtype == jnp.float16
    assert rel_err(half, softmax_attention(q, q, q)) < 2e-3
