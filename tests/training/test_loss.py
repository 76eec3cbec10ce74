import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gsa_jax.training import next_token_loss
from tests.helpers import rel_err

B, T, D, V = 3, 13, 8, 37


def _inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    head = jax.random.normal(keys[0], (D, V))
    hidden = jax.random.normal(keys[1], (B, T, D), dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    return head, hidden, targets, jax.random.bernoulli(keys[3], 0.7, (B, T))


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 13, 100])
def test_value_and_gradients_are_those_of_plain_cross_entropy(chunk_size):
    head, hidden, targets, mask = _inputs()

    def ours(head, hidden):
        return next_token_loss(head, hidden, targets, mask, chunk_size=chunk_size)

    def plain(head, hidden):
        nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
        return jnp.sum(nll * mask), jnp.sum(mask)

    (nll, count), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(head, hidden)
    (expected, expected_count), expected_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(head, hidden)
    assert nll.dtype == jnp.float32 and count.dtype == jnp.int32 and count == expected_count
    assert rel_err(nll, expected) < 1e-6
    for grad, other in zip(grads, expected_grads, strict=True):
        assert rel_err(grad, other) < 1e-6


def test_bfloat16_hidden_states_keep_a_float32_loss_and_head_gradient():
    head, hidden, targets, mask = _inputs(jnp.bfloat16)

    def loss(head, hidden, chunk_size):
        return next_token_loss(head, hidden, targets, mask, chunk_size=chunk_size)[0]

    nll, (grad, hidden_grad) = jax.value_and_grad(loss, (0, 1))(head, hidden, 1)
    exact, exact_grad = jax.value_and_grad(loss)(
        head.astype(jnp.bfloat16).astype(jnp.float32), hidden.astype(jnp.float32), T
    )
    assert nll.dtype == grad.dtype == jnp.float32 and hidden_grad.dtype == jnp.bfloat16
    assert rel_err(nll, exact) < 1e-5
    assert rel_err(grad, exact_grad) < 5e-3


def test_no_token_counts_under_an_empty_mask():
    head, hidden, targets, mask = _inputs()
    nll, count = next_token_loss(head, hidden, targets, jnp.zeros_like(mask))
    assert nll == 0 and count == 0


def test_huge_logits_are_exact():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    for target, expected in enumerate((0.0, 1e4, 2e4)):
        nll, _ = next_token_loss(jnp.eye(3), logits, jnp.array([[target]]), jnp.array([[True]]))
        np.testing.assert_allclose(nll, expected)


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad])
def test_the_logits_of_all_tokens_are_never_held(transform):
    head, hidden, targets, mask = _inputs()
    hidden, targets, mask = (jnp.tile(x, (1, 64) + (1,) * (x.ndim - 2)) for x in (hidden, targets, mask))

    def temporary_bytes(chunk_size):
        f = transform(lambda head: next_token_loss(head, hidden, targets, mask, chunk_size=chunk_size)[0])
        return jax.jit(f).lower(head).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * B * 64 * T * V
    assert temporary_bytes(64 * T) >= logits
    assert temporary_bytes(T) < logits / 2


def test_by_default_memory_holds_half_a_gib_of_logits_at_most():
    """Of 8 x 4096 tokens and a vocabulary of 32000, 4 GiB in all."""
    arrays = [((16, 32000), jnp.float32), ((8, 4096, 16), jnp.bfloat16), ((8, 4096), jnp.int32), ((8, 4096), bool)]
    head, hidden, targets, mask = (jax.ShapeDtypeStruct(*array) for array in arrays)
    loss = jax.value_and_grad(lambda *arrays: next_token_loss(*arrays)[0], (0, 1))
    shapes = re.findall(r"\w\d+\[([\d,]*32000[\d,]*)\]", str(jax.make_jaxpr(loss)(head, hidden, targets, mask)))
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert 2**26 < largest <= 2**27
