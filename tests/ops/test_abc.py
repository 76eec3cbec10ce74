"""ABC's gate against its definition in float64 NumPy, alone and inside Gated Slot Attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.ops import abc_log_decay, abc_log_decay_step, write_strength
from tests.helpers import rel_err
from tests.ops import oracle
from tests.ops.cases import Sizes, assert_all_close, make_case, slot_attention

gate = jax.jit(abc_log_decay)
SIZES = Sizes(B=2, T=50, H=4, G=2, K=6, V=5, M=4)


def make_logits(length=SIZES.T, spread=3.0):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=spread, size=(SIZES.B, length, SIZES.G, SIZES.M))
    return jnp.asarray(logits, jnp.float32), jnp.asarray(rng.normal(size=logits[:, 0].shape), jnp.float32)


def definition(logits, normalizer=None):
    """log decay, write strength and last normalizer in float64."""
    arrays = {"write_logits": logits} | ({} if normalizer is None else {"normalizer": normalizer})
    nothing = {"log_decay": np.zeros(logits.shape), "write": np.zeros(logits.shape), "normalizer": np.zeros(1)}
    return oracle.abc_gate(arrays, nothing)[0]


@pytest.mark.parametrize("resumed", [False, True])
def test_the_gate_and_the_write_strength_are_those_of_the_paper(resumed):
    logits, normalizer = make_logits()
    normalizer = normalizer if resumed else None
    log_decay, last = gate(logits, initial_normalizer=normalizer)
    reference = definition(logits, normalizer)
    assert log_decay.dtype == last.dtype == jnp.float32
    np.testing.assert_allclose(log_decay, reference["log_decay"], rtol=1e-5)
    np.testing.assert_allclose(last, reference["normalizer"], rtol=1e-6, atol=1e-6)
    # the share not kept is the share written: no write strength of its own is needed
    np.testing.assert_allclose(write_strength(log_decay), reference["write"], rtol=1e-5)


def test_inside_slot_attention():
    """Outputs and gradients against the oracle that is given the paper's gate and write strength separately."""
    logits, normalizer = make_logits()
    arrays, cotangents = make_case(slot_attention, SIZES)
    del arrays["log_decay"]
    cotangents["normalizer"] = normalizer

    def mixer(arrays):
        log_decay, last = abc_log_decay(arrays["write_logits"], initial_normalizer=arrays.get("normalizer"))
        return slot_attention(arrays | {"log_decay": log_decay}, chunk_size=8) | {"normalizer": last}

    @jax.jit
    def run(arrays):
        outputs, pullback = jax.vjp(mixer, arrays)
        return outputs, pullback(cotangents)[0]

    for gate_arrays in ({"write_logits": logits}, {"write_logits": logits, "normalizer": normalizer + 1}):
        reference = definition(*gate_arrays.values())
        outputs, gradients = oracle.slot_attention(
            arrays | {"log_decay": reference["log_decay"], "write": reference["write"]}, cotangents
        )
        back = {name: gradients.pop(name) for name in ("log_decay", "write")} | {"normalizer": normalizer}
        gradients |= oracle.abc_gate(gate_arrays, back)[1]
        assert_all_close(
            run(arrays | gate_arrays),
            (outputs | {"normalizer": reference["normalizer"]}, gradients),
            2e-5,
            [*gate_arrays],
        )


def test_long_sequences():
    """After 5000 tokens z[t-1] - z[t] is a difference of nearly equal numbers; the gate must not be taken from it."""
    logits, _ = make_logits(length=5000)
    log_decay, last = gate(logits)
    reference = definition(logits)
    assert rel_err(log_decay[:, 1:], reference["log_decay"][:, 1:]) < 2e-6
    np.testing.assert_allclose(log_decay, reference["log_decay"], rtol=2e-4)
    np.testing.assert_allclose(last, reference["normalizer"], rtol=1e-6)


@pytest.mark.parametrize("length", [1, 20, 49])
def test_resumes(length):
    logits, normalizer = make_logits()
    whole, last = gate(logits, initial_normalizer=normalizer)
    first, between = gate(logits[:, :length], initial_normalizer=normalizer)
    second, end = gate(logits[:, length:], initial_normalizer=between)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-5)
    np.testing.assert_allclose(end, last, rtol=1e-6)


@pytest.mark.parametrize("empty", [True, False])
def test_step_by_step(empty):
    logits, normalizer = make_logits()
    normalizer = jnp.full_like(normalizer, -jnp.inf) if empty else normalizer
    whole, last = gate(logits, initial_normalizer=normalizer)

    def token(normalizer, logits):
        log_decay, normalizer = abc_log_decay_step(logits, normalizer)
        return normalizer, log_decay

    end, steps = jax.lax.scan(token, normalizer, logits.swapaxes(0, 1))
    np.testing.assert_allclose(steps.swapaxes(0, 1), whole, rtol=1e-5)
    np.testing.assert_allclose(end, last, rtol=1e-6)


def test_documents_begin_empty():
    logits, normalizer = make_logits()
    borders = [0, 7, 8, 31, 50]
    ids = jnp.asarray(np.searchsorted(borders, np.arange(50), side="right"))[None].repeat(SIZES.B, 0)
    packed, last = gate(logits, initial_normalizer=normalizer, segment_ids=ids)
    for start, stop in zip(borders[:-1], borders[1:], strict=True):
        alone = definition(logits[:, start:stop], normalizer if start == 0 else None)
        np.testing.assert_allclose(packed[:, start:stop], alone["log_decay"], rtol=1e-5)
    np.testing.assert_allclose(last, alone["normalizer"], rtol=1e-6)


def test_gradients_stop_at_document_borders_and_are_finite():
    logits, normalizer = make_logits()
    ids = (jnp.arange(50) >= 20).astype(jnp.int32)[None].repeat(SIZES.B, 0)

    def second_document(logits, normalizer):
        log_decay, last = abc_log_decay(logits, initial_normalizer=normalizer, segment_ids=ids)
        return jnp.sum(jnp.exp(log_decay[:, 20:])) + jnp.sum(last)

    with jax.debug_nans(True):
        d_logits, d_normalizer = jax.jit(jax.grad(second_document, (0, 1)))(logits, normalizer)
    assert not np.any(d_logits[:, :20]) and not np.any(d_normalizer)
    assert np.all(np.isfinite(d_logits)) and np.any(d_logits[:, 20:])


@pytest.mark.parametrize("closed", [slice(0, 2), slice(5, 8)])
def test_tokens_that_write_nothing_leave_gradients_finite(closed):
    logits, _ = make_logits()
    logits = logits.at[:, closed].set(-jnp.inf)

    def loss(logits):
        log_decay, normalizer = abc_log_decay(logits)
        return jnp.sum(jnp.exp(log_decay)) + jnp.sum(normalizer)

    assert np.all(np.isfinite(jax.jit(jax.grad(loss))(logits)))


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_shift_of_all_logits_changes_nothing(shift):
    logits, _ = make_logits()
    logits = jnp.round(logits * 64) / 64  # exact also beside the shift
    assert rel_err(jnp.exp(gate(logits + shift)[0]), jnp.exp(gate(logits)[0])) < 5e-3  # float32 resolves 1e4 to 1e-3
