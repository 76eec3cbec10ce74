"""Every kernel once, on a small case, to be looked at on a GPU by NVIDIA's sanitizer; minutes a tool:

compute-sanitizer --tool memcheck python -m tests.pallas_kernels.sanitizer
"""

import functools

import jax
import jax.numpy as jnp

from tests.ops.cases import Sizes, linear_attention, make_case, outputs_and_gradients, slot_attention
from tests.pallas_kernels.test_rms_norm import FORMS, norm
from tests.pallas_kernels.test_rms_norm import make_case as make_norm_case

SIZES = Sizes(B=1, T=136, H=2, G=1, K=128, V=64, M=64)


def main():
    for op in (slot_attention, linear_attention):
        for gates in ("weak", "-20 everywhere"):  # all pairs at once, and level by level
            arrays, cotangents = make_case(op, SIZES, gates=gates, dtype=jnp.bfloat16)
            jax.block_until_ready(outputs_and_gradients(op, arrays, cotangents, implementation="pallas"))
            print(op.__name__, gates, "ran", flush=True)
    for form in FORMS:
        arrays, cotangents = make_norm_case((2, 70, 512), jnp.bfloat16)
        results, pullback = jax.vjp(functools.partial(norm, form), *arrays)
        jax.block_until_ready(pullback(tuple(cotangents[-len(results) :])))
        print("rms_norm", form, "ran", flush=True)


if __name__ == "__main__":
    main()
