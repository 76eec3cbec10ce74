"""The ops under jax's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.ops import chunked
from tests.ops.cases import (
    GATES,
    IMPLEMENTATIONS,
    OPS,
    TOLERANCE,
    Sizes,
    assert_all_close,
    assert_close,
    expected,
    make_case,
    outputs_and_gradients,
    slot_attention,
)

SIZES = Sizes(B=2, T=20, H=4, G=2, K=6, V=6, M=5)


def inner(x, y):
    """The inner product of two trees of arrays."""
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, x, y)))


def value(op, implementation, cotangents, chunk_size=8):
    """A scalar function of an op's inputs."""
    return lambda arrays: inner(op(arrays, implementation=implementation, chunk_size=chunk_size), cotangents)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", OPS)
def test_vmap(op, implementation):
    entries = [make_case(op, SIZES, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *entries)
    run = functools.partial(outputs_and_gradients, op, implementation=implementation, chunk_size=8)
    results = jax.vmap(run)(*stacked)
    for i, (arrays, cotangents) in enumerate(entries):
        entry = jax.tree.map(lambda x, i=i: x[i], results)
        assert_all_close(entry, expected(op, arrays, cotangents), TOLERANCE[jnp.float32])


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_token_alone_is_a_step(op, state):
    """With and without a state before it, and where segment ids say that it belongs to another document: to none."""
    arrays, cotangents = make_case(op, SIZES._replace(T=1), state=state, write=op is slot_attention)
    assert "scan" in str(jax.make_jaxpr(functools.partial(op, implementation="chunked"))(arrays))
    assert "scan" not in str(jax.make_jaxpr(op)(arrays))
    for segment_ids in (None, jnp.asarray([[3], [4]])):
        result = outputs_and_gradients(op, arrays, cotangents, segment_ids=segment_ids)
        assert_all_close(result, expected(op, arrays, cotangents), TOLERANCE[jnp.float32])


@pytest.mark.parametrize("op", OPS)
def test_scan_over_rematerialized_layers(op):
    arrays, cotangents = make_case(op, SIZES, gates="runs of -20 and -1000", state=False)
    layers = 1 - jnp.arange(3) / 4

    def loss(x, log_decay, implementation):
        @jax.checkpoint
        def layer(x, factor):
            per_group = x[:, :, ::2]
            inputs = {"q": x, "k": factor * per_group, "v": per_group, "log_decay": factor * log_decay}
            return x + op(inputs, implementation=implementation, chunk_size=8)["out"], None

        x, _ = jax.lax.scan(layer, x, layers)
        return jnp.vdot(x, cotangents["out"])

    gradients = [
        jax.jit(jax.value_and_grad(functools.partial(loss, implementation=name), (0, 1)))(
            arrays["q"], arrays["log_decay"]
        )
        for name in IMPLEMENTATIONS
    ]
    scan, chunks = ({"loss": loss, "x": x, "log_decay": g} for loss, (x, g) in gradients)
    assert_close(chunks, scan, TOLERANCE[jnp.float32])


@pytest.mark.parametrize("op", OPS)
def test_derivatives_of_derivatives(op):
    """Forward over reverse and reverse over reverse, with the scan's as the reference."""
    sizes = SIZES._replace(B=1, T=10)
    arrays, cotangents = make_case(op, sizes)
    tangents, _ = make_case(op, sizes, seed=1)

    def forward_over_reverse(arrays, implementation):
        gradient = jax.grad(value(op, implementation, cotangents, chunk_size=4))
        return jax.jvp(gradient, (arrays,), (tangents,))[1]

    def reverse_over_reverse(arrays, implementation):
        gradient = jax.grad(value(op, implementation, cotangents, chunk_size=4))
        return jax.grad(lambda arrays: inner(gradient(arrays), tangents))(arrays)

    reference = jax.jit(forward_over_reverse, static_argnums=1)(arrays, "scan")
    for product in (forward_over_reverse, reverse_over_reverse):
        results = jax.jit(product, static_argnums=1)(arrays, "chunked")
        assert_close(results, reference, TOLERANCE[jnp.float32], product.__name__)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_agrees_with_reverse_mode(op):
    arrays, cotangents = make_case(op, SIZES, gates="all kinds")
    tangents, _ = make_case(op, SIZES, seed=1)
    function = value(op, "chunked", cotangents)
    primal, tangent = jax.jit(lambda *x: jax.jvp(function, *x))((arrays,), (tangents,))
    outputs, gradients = expected(op, arrays, cotangents)
    assert primal == pytest.approx(sum(np.vdot(outputs[name], cotangents[name]) for name in outputs), rel=1e-4)
    assert tangent == pytest.approx(sum(np.vdot(gradients[name], tangents[name]) for name in arrays), rel=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", OPS)
def test_a_second_call_compiles_nothing(op, implementation):
    """Outside `jax.jit` too, the gradient included."""
    arrays, cotangents = make_case(op, SIZES, state=True)
    gradient = jax.grad(value(op, implementation, cotangents))
    gradient(arrays)
    compiled = []

    def listen(event, duration, **_):
        compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        gradient(arrays)
        assert compiled == []
        jax.jit(lambda x: x + 1)(jnp.ones(SIZES.T))
        assert compiled  # the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("op", OPS)
def test_no_nan(op):
    """Under `jax_debug_nans`; in jit as jax compiles it by default."""
    function = value(op, "chunked", make_case(op, SIZES)[1])
    optimized = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    gradient = jax.jit(jax.grad(function), compiler_options=optimized)
    with jax.debug_nans(True):
        for gates in GATES:
            arrays, _ = make_case(op, SIZES, gates=gates)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(arrays))), gates


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("op", OPS)
def test_as_on_an_accelerator(op, dtype, monkeypatch):
    """The whole sequence as one span, and sums of log decays as products, as where the backend is not a CPU."""

    @jax.jit
    def run(arrays, cotangents):
        outputs, pullback = jax.vjp(lambda arrays: op(arrays, implementation="chunked"), arrays)
        return outputs, pullback(cotangents)[0]

    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        assert chunked._tiling(300, None) == (128, 384)
        arrays, cotangents = make_case(op, Sizes(1, 300, 2, 1, 6, 5, 4), dtype=dtype, write=op is slot_attention)
        compiled = run.lower(arrays, cotangents).compile()
    for gates in GATES:
        arrays, cotangents = make_case(
            op, Sizes(1, 300, 2, 1, 6, 5, 4), gates=gates, dtype=dtype, write=op is slot_attention
        )
        assert_all_close(compiled(arrays, cotangents), expected(op, arrays, cotangents), TOLERANCE[dtype], gates)
