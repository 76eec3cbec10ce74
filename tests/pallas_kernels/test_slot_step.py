"""The kernels of a single token, against the same token by the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.ops import SlotState, gated_slot_attention, gated_slot_attention_step
from pallas_kernels import slot_step
from tests.helpers import rel_err
from tests.ops.cases import GATES
from tests.pallas_kernels.hopper import count_kernels

SIZES = (2, 4, 2, 128, 192, 64), (1, 2, 2, 64, 64, 128)
"""[B, H, G, K, V, M]"""
SCALE = 0.1


def make_case(sizes, gates="all kinds", *, write=False, dtype=jnp.bfloat16, gates_dtype=jnp.float32, seed=0):
    """(q, k, v, log_decay, write or None, keys, values)"""
    rng = np.random.default_rng(seed)
    B, H, G, K, V, M = sizes
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, H, K), (B, G, K), (B, G, V)))
    log_decay = jnp.asarray(GATES[gates](rng, (B, 1, G, M))[:, 0], gates_dtype)
    strength = jnp.asarray(rng.uniform(size=(B, G, M)), dtype) if write else None
    return q, k, v, log_decay, strength, *(jnp.asarray(rng.normal(size=(B, G, M, D)), jnp.float32) for D in (K, V))


def definition(q, k, v, log_decay, write, keys, values):
    """By `scan` in float64."""
    with jax.enable_x64(True):
        arrays = [
            x if x is None else jnp.asarray(np.asarray(x, np.float64))[:, None] for x in (q, k, v, log_decay, write)
        ]
        state = SlotState(*(jnp.asarray(np.asarray(x, np.float64)) for x in (keys, values)))
        out, state = gated_slot_attention(*arrays, scale=SCALE, initial_state=state, implementation="scan")
        return np.asarray(out[:, 0]), *map(np.asarray, state)


def check(results, arrays):
    out, *states = results
    expected, *expected_states = definition(*arrays)
    assert rel_err(out, expected) < 3e-3  # rounded to two bytes
    for state, reference in zip(states, expected_states, strict=True):
        assert rel_err(state, reference) < 1e-6


def by_step(q, k, v, log_decay, write, keys, values):
    out, state = gated_slot_attention_step(q, k, v, log_decay, SlotState(keys, values), write, scale=SCALE)
    return out, *state


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_values(interpreted, sizes, write):
    arrays = make_case(sizes, write=write)
    with interpreted():
        results = slot_step.gated_slot_attention_step(*arrays, scale=SCALE)
    check(results, arrays)


def test_through_the_public_function(interpreted, monkeypatch):
    """Batched by vmap, with a scale that is an array, and the gradients of what XLA makes of a step."""
    cases = [make_case(SIZES[1], "weak", gates_dtype=jnp.bfloat16, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)

    def loss(arrays):
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in by_step(*arrays))

    expected = jax.vmap(jax.grad(loss))(stacked)
    monkeypatch.setattr("gsa_jax.ops.pallas.slot_step_misfit", lambda *_: None)
    with interpreted():
        results = jax.vmap(by_step)(*stacked)
        gradients = jax.vmap(jax.grad(loss))(stacked)
        scaled = gated_slot_attention_step(*cases[0][:4], SlotState(*cases[0][5:]), scale=jnp.float32(2 * SCALE))
    for i, case in enumerate(cases):
        check([x[i] for x in results], case)
    for gradient, reference in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert rel_err(gradient, np.asarray(reference, np.float64)) < 1e-2
    twice = definition(2 * cases[0][0], *cases[0][1:])
    assert rel_err(scaled[0], twice[0]) < 5e-3  # the queries were scaled and rounded


@pytest.mark.parametrize("sizes", [(1, 4, 4, 512, 512, 64), (8, 8, 1, 128, 64, 128)])
def test_lowers_for_both_passes_and_takes_the_place_of_the_old_states(sizes):
    B, H, G, K, V, M = sizes
    shapes = (B, H, K), (B, G, K), (B, G, V), (B, G, M), (B, G, M, K), (B, G, M, V)
    q, k, v, log_decay, keys, values = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16 if i < 3 else jnp.float32) for i, shape in enumerate(shapes)
    )
    arrays = q, k, v, log_decay, None, keys, values
    assert count_kernels(by_step, *arrays) == 2
    assert count_kernels(by_step, *arrays, what="output_operand_alias<") == 2
    assert count_kernels(jax.vmap(by_step), *jax.tree.map(lambda x: x.update(shape=(3, *x.shape)), arrays)) == 2
    assert count_kernels(lambda *x: jax.vjp(by_step, *x)[1](by_step(*x)), *arrays) == 2


def test_a_step_that_does_not_fit_is_left_to_xla():
    for sizes, reason in (((1, 2, 2, 64, 64, 32), "M must be"), ((16, 2, 2, 64, 64, 64), "B must be at most 8")):
        arrays = make_case(sizes)
        assert count_kernels(by_step, *arrays) == 0
        assert reason in slot_step.misfit(*arrays[:4])


def test_expm1():
    x = -np.logspace(-8, 4, 1000, dtype=np.float32)
    np.testing.assert_allclose(slot_step.expm1(jnp.asarray(x)), np.expm1(x.astype(np.float64)), rtol=4e-7)
    assert slot_step.expm1(jnp.float32(0)) == 0 and slot_step.expm1(jnp.float32(-jnp.inf)) == -1


@pytest.mark.gpu
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("sizes", SIZES)
def test_on_a_gpu(sizes, gates):
    options = {} if sizes == SIZES[0] else {"write": True, "dtype": jnp.float16, "gates_dtype": jnp.float16}
    arrays = make_case(sizes, gates, **options)
    check(jax.jit(by_step)(*arrays), arrays)


@pytest.mark.gpu
def test_many_steps_on_a_gpu():
    """States in a loop's carry, in place."""
    *token, _, keys, values = make_case((3, 4, 2, 512, 512, 64), "weak")
    tokens = [jnp.stack([x * s for s in (1, 0.5, -1, 2)]) for x in token[:3]] + [jnp.stack([token[3]] * 4)]

    def run(step, states):
        def one(states, token):
            out, *states = step(*token, None, *states)
            return tuple(states), out

        return jax.lax.scan(one, states, tuple(tokens))

    states, outs = jax.jit(functools.partial(run, by_step))((keys, values))
    for i, out in enumerate(outs):
        arrays = *(x[i] for x in tokens), None, keys, values
        check((out, *(definition(*arrays)[1:])), arrays)
        _, keys, values = (jnp.asarray(x, jnp.float32) for x in definition(*arrays))
    for state, expected in zip(states, (keys, values), strict=True):
        assert rel_err(state, np.asarray(expected, np.float64)) < 1e-5
