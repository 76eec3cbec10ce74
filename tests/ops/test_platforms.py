"""The ops lower for TPUs, forward and backward, on a machine that has none."""

import jax
import jax.numpy as jnp
import pytest

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
