"""The kernels on a Hopper GPU, against float64 NumPy: outputs, final states and every gradient.

An error, by norm, may be 5e-3, or a tenth above that of the chunked form on the same inputs where that one is larger.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.sizes import trial
from tests.helpers import rel_err
from tests.ops import cases
from tests.ops.cases import Sizes, expected, linear_attention, outputs_and_gradients, slot_attention

pytestmark = pytest.mark.gpu

GROUPED = Sizes(B=2, T=321, H=4, G=2, K=128, V=64, M=32)
DOCUMENTS = np.stack([np.arange(321) // 50, np.arange(321) == 320]).astype(np.int32)
GATES = (
    "ordinary",
    "weak",
    "open",
    "-20 everywhere",
    "-1000 everywhere",
    "one -inf",
    "runs of -20 and -1000",
    "all kinds",
)
LAYER = Sizes(B=2, T=100, H=2, G=1, K=64, V=64, M=64)

SCALE = 0.1
"""softmax logits of about one, as are those of models"""
run = jax.jit(outputs_and_gradients.__wrapped__, static_argnames=("op", "implementation", "scale"))
make_case = functools.partial(cases.make_case, dtype=jnp.bfloat16)


def check(function, references, tolerance=5e-3):
    """`function("pallas")` is as near to the references as it must be; those below 1e-7 count as zero."""

    @functools.cache
    def errors(implementation):
        def error(result, reference):
            reference = np.asarray(reference, np.float64)
            return rel_err(result, reference if np.abs(reference).max() > 1e-7 else 0 * reference)

        return jax.tree.map(error, function(implementation), references)

    for path, error in jax.tree.leaves_with_path(errors("pallas")):
        if not error <= tolerance:
            chunked = dict(jax.tree.leaves_with_path(errors("chunked")))[path]
            assert error <= 1.1 * chunked, f"{jax.tree_util.keystr(path)}: {error}, and {chunked} of chunked"


def check_case(op, case, segment_ids=None, scale=SCALE, **tolerance):
    """The kernels' outputs and gradients of a case."""
    reference = expected(op, *case, segment_ids, scale=scale)
    check(lambda name: run(op, *case, segment_ids, implementation=name, scale=scale), reference, **tolerance)


def float32(arrays):
    """What the kernels get, for a reference in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)


@pytest.mark.parametrize("gates", GATES)
def test_write_derived(gates):
    check_case(slot_attention, make_case(slot_attention, GROUPED, gates=gates))


@pytest.mark.parametrize("gates", GATES)
def test_write_given(gates):
    """In the interpreter the gradient of q comes to 5.2e-3 for ordinary gates, 4.6e-3 in the chunked form."""
    check_case(slot_attention, make_case(slot_attention, GROUPED, gates=gates, write=True), tolerance=5.5e-3)


def test_a_sharp_softmax():
    """Logits of ten: rounding q·k and p to bfloat16 shows. In the interpreter 1.3e-2, 0.5e-2 in the chunked form."""
    check_case(slot_attention, make_case(slot_attention, GROUPED), scale=1.0, tolerance=1.5e-2)


@pytest.mark.parametrize("chosen", [0, 1])
@pytest.mark.parametrize("gates", GATES)
def test_without_gradients(gates, chosen):
    """Where `key_read` may read the keys."""
    arrays, _ = case = make_case(slot_attention, GROUPED._replace(K=512), gates=gates)
    reference, _ = expected(slot_attention, *case, scale=SCALE)
    with trial({f"key_read {GROUPED.B * GROUPED.H}x6x512": chosen}):
        op = jax.jit(functools.partial(slot_attention, scale=SCALE), static_argnames="implementation")
        check(lambda name: op(arrays, implementation=name), reference)


def test_documents():
    check_case(slot_attention, make_case(slot_attention, GROUPED, gates="runs of -20 and -1000"), DOCUMENTS)


@pytest.mark.parametrize("gates", ["ordinary", "all kinds"])
def test_float16_with_gates_in_float16(gates):
    arrays, cotangents = make_case(slot_attention, Sizes(1, 130, 2, 2, 64, 256, 64), gates=gates, dtype=jnp.float16)
    arrays["log_decay"] = arrays["log_decay"].astype(jnp.float16)
    check_case(slot_attention, (arrays, cotangents))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("write", [False, True])
def test_many_slots(gates, write):
    check_case(slot_attention, make_case(slot_attention, GROUPED._replace(M=100), gates=gates, write=write))


def test_one_token_with_gates_in_bfloat16():
    arrays, cotangents = make_case(slot_attention, Sizes(3, 1, 2, 1, 64, 64, 16))
    arrays["log_decay"] = arrays["log_decay"].astype(jnp.bfloat16)
    check_case(slot_attention, (arrays, cotangents))


def test_a_long_sequence():
    """Too long for NumPy: the reference is the chunked form in float32."""
    case = make_case(slot_attention, Sizes(1, 131_001, 1, 1, 64, 64, 64), gates="weak")
    reference = run(slot_attention, *float32(case), implementation="chunked")
    check(lambda name: run(slot_attention, *case, implementation=name), reference)


@pytest.mark.parametrize("gates", ["ordinary", "-20 everywhere", "all kinds"])
def test_linear_attention(gates):
    check_case(linear_attention, make_case(linear_attention, GROUPED, gates=gates))


def test_the_same_bits_twice():
    case = make_case(slot_attention, GROUPED)
    first, second = (run(slot_attention, *case, implementation="pallas") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_vmap():
    entries = [make_case(slot_attention, LAYER, seed=seed) for seed in range(3)]
    case, references = (
        jax.tree.map(lambda *x: np.stack(x), *trees)
        for trees in (entries, [expected(slot_attention, *entry) for entry in entries])
    )
    check(lambda name: jax.vmap(functools.partial(run, slot_attention, implementation=name))(*case), references)


def test_scan_over_rematerialized_layers():
    arrays, _ = make_case(slot_attention, LAYER, gates="runs of -20 and -1000")

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(x, log_decay, implementation):
        @jax.checkpoint
        def layer(x, factor):
            per_group = x[:, :, :1]
            inputs = {"q": x, "k": factor * per_group, "v": per_group, "log_decay": log_decay}
            return x + slot_attention(inputs, implementation=implementation)["out"], None

        x, _ = jax.lax.scan(layer, x, jnp.ones(3, x.dtype))
        return jnp.mean(x.astype(jnp.float32) ** 2)

    inputs = arrays["q"], arrays["log_decay"]
    check(functools.partial(loss, *inputs), loss(*float32(inputs), "scan"))


def test_shard_map_with_gates_for_the_whole_batch():
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    arrays, cotangents = make_case(slot_attention, LAYER._replace(B=2 * devices), state=False)
    arrays["log_decay"] = arrays["log_decay"][:2]
    specs = {name: P() if name == "log_decay" else P("data") for name in arrays}

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(arrays, implementation):
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=P("data"))
        def output(arrays):
            return slot_attention(arrays, implementation=implementation)["out"]

        return jax.grad(lambda arrays: jnp.vdot(output(arrays).astype(jnp.float32), cotangents["out"]))(arrays)

    check(functools.partial(gradients, arrays), gradients(float32(arrays), "scan"))
