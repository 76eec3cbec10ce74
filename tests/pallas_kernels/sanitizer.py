"""Every kernel once, on a small case, to be looked at on a GPU by NVIDIA's sanitizer; minutes a tool:

compute-sanitizer --tool memcheck python -m tests.pallas_kernels.sanitizer

Names of `PARTS` behind it leave the others out.
"""

import functools
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.sizes import trial
from tests.ops.cases import Sizes, linear_attention, make_case, outputs, outputs_and_gradients, slot_attention
from tests.pallas_kernels import test_slot_step
from tests.pallas_kernels.test_rms_norm import FORMS, norm
from tests.pallas_kernels.test_rms_norm import make_case as make_norm_case

SIZES = Sizes(B=1, T=136, H=2, G=1, K=128, V=64, M=64)
MILD_AND_NOT = "weak", "-20 everywhere"
"""gates: all pairs at once, and level by level"""


def both_passes(op):
    for gates in MILD_AND_NOT:
        arrays, cotangents = make_case(op, SIZES, gates=gates, dtype=jnp.bfloat16)
        jax.block_until_ready(outputs_and_gradients(op, arrays, cotangents, implementation="pallas"))


def key_read():
    for gates in MILD_AND_NOT:
        arrays, _ = make_case(slot_attention, SIZES._replace(K=512), gates=gates, dtype=jnp.bfloat16)
        with trial({"key_read 2x3x512": 1}):
            jax.block_until_ready(outputs(slot_attention, arrays, implementation="pallas"))


def slot_step():
    jax.block_until_ready(jax.jit(test_slot_step.by_step)(*test_slot_step.make_case(test_slot_step.SIZES[0])))


def rms_norm():
    for form in FORMS:
        arrays, cotangents = make_norm_case((2, 70, 512), jnp.bfloat16)
        results, pullback = jax.vjp(functools.partial(norm, form), *arrays)
        jax.block_until_ready(pullback(tuple(cotangents[-len(results) :])))


PARTS = {
    "slot_attention": functools.partial(both_passes, slot_attention),
    "key_read": key_read,
    "slot_step": slot_step,
    "linear_attention": functools.partial(both_passes, linear_attention),
    "rms_norm": rms_norm,
}


if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
        print(name, "ran", flush=True)
