"""Generation: the prompt in one pass, then one token at a time with a state of constant size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from gsa_jax.generation.sampling import SamplingConfig, sample
from gsa_jax.models import abstract_model

CACHE_UNIT = 256
"""Softmax attention's caches hold a multiple of so many tokens."""


def generate(model, prompt, num_tokens, *, sampling=None, key=None, unroll=None):
    """Continues `prompt` [B, T] int by `num_tokens` tokens: returns [B, num_tokens] int32.

    The decode loop runs inside one jit; a second call with the same shapes compiles nothing. `unroll` as for `stream`.
    """
    return jnp.concatenate(list(stream(model, prompt, num_tokens, sampling=sampling, key=key, unroll=unroll)), axis=1)


def stream(model, prompt, num_tokens, *, sampling=None, key=None, block_size=None, unroll=None):
    """Yields the tokens of `generate` in blocks [B, up to block_size], as they are drawn; by default all in one block.

    Every block is one call of a jitted loop, so memory is constant and the device works ahead of the host. The tokens
    do not depend on `block_size`. With a `block_size`, other `num_tokens` compile nothing new, unless a model with
    softmax attention needs a longer cache (see `CACHE_UNIT`): the last block is drawn in full and cut.

    `unroll` takes the steps with `model.unrolled()`: a third of the memory traffic, for a second copy of the parameters
    and a compilation that grows with the depth. XLA compiles it in seconds for GPUs and in minutes for CPUs, so it is
    the default but for these. In either case the steps have the matrices in the model's dtype, not rounded anew by
    each.

    Raises, when the first block is asked for:
      TypeError: the prompt does not hold integers.
      ValueError: the prompt is empty, not [B, T] or holds ids that are no tokens of the model, or `num_tokens` or
        `block_size` is less than 1.
    """
    _check_prompt(prompt, model.config.vocab_size)
    prompt = jnp.asarray(prompt, jnp.int32)
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    sampling = SamplingConfig() if sampling is None else sampling
    key = jax.random.key(0) if key is None else key
    block_size = num_tokens if block_size is None else block_size
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    unroll = jax.default_backend() != "cpu" if unroll is None else unroll
    definition, parameters = nnx.split(model)

    units = -(-(prompt.shape[1] + num_tokens) // CACHE_UNIT)
    max_length = units * CACHE_UNIT if _state_grows(model.config) else None
    options = {"sampling": sampling, "max_length": max_length, "unroll": unroll}
    carry = _prefill(definition, parameters, prompt, key, **options)
    definition, parameters = _for_decoding(definition, parameters, unroll=unroll)
    for start in range(0, num_tokens, block_size):
        carry, tokens = _decode(definition, parameters, carry, key, sampling=sampling, num_tokens=block_size)
        yield tokens[:, : num_tokens - start]


@functools.cache
def _state_grows(config):
    """Whether a model's state takes more memory for more tokens, as softmax attention's does."""
    model = abstract_model(config)
    small, large = (jax.eval_shape(functools.partial(model.init_state, 1, length)) for length in (1, 2))
    return [x.shape for x in jax.tree.leaves(small)] != [x.shape for x in jax.tree.leaves(large)]


def _check_prompt(prompt, vocab_size):
    """Raises unless `prompt` is [B, T] and, where its values are known, holds token ids."""
    if np.ndim(prompt) != 2 or 0 in np.shape(prompt):
        raise ValueError(f"prompt must have shape [B, T] with at least one token, got {list(np.shape(prompt))}")
    dtype = prompt.dtype if hasattr(prompt, "dtype") else np.asarray(prompt).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"prompt must hold integers, got {dtype}")
    if isinstance(prompt, jax.core.Tracer):
        return
    for token in (np.min(prompt), np.max(prompt)):
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompt must hold token ids from 0 to {vocab_size - 1}, got {token}")


@functools.partial(jax.jit, static_argnames=("sampling", "max_length", "unroll"))
def _prefill(definition, parameters, prompt, key, *, sampling, max_length, unroll):
    """Reads the prompt; returns the decode loop's carry: (first new token [B], state, how many tokens were drawn)."""
    model = nnx.merge(definition, parameters)
    hidden, state = model.hidden(prompt, model.init_state(prompt.shape[0], max_length))
    state = model.unroll_state(state) if unroll else state
    return sample(model.logits(hidden[:, -1]), jax.random.fold_in(key, 0), sampling), state, jnp.int32(1)


@functools.partial(jax.jit, static_argnames="unroll")
def _for_decoding(definition, parameters, *, unroll):
    """The model of the decode loop, with its matrices in the dtype that they are multiplied in."""
    model = nnx.merge(definition, parameters)
    model = model.unrolled() if unroll else model
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear | nnx.Embed):
            matrix = module.kernel if isinstance(module, nnx.Linear) else module.embedding
            matrix.set_value(matrix.get_value().astype(module.dtype))
    return nnx.split(model)


@functools.partial(jax.jit, static_argnames=("sampling", "num_tokens"), donate_argnames="carry")
def _decode(definition, parameters, carry, key, *, sampling, num_tokens):
    """Emits the carry's token and draws the next one, `num_tokens` times: returns (carry, tokens [B, num_tokens])."""
    model = nnx.merge(definition, parameters)
    token, state, drawn = carry
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, drawn + jnp.arange(num_tokens))  # at once, not in the loop

    def next_token(carry, key):
        token, state = carry
        logits, state = model.step(token, state)
        return (sample(logits, key, sampling), state), token

    (token, state), tokens = lax.scan(next_token, (token, state), keys)
    return (token, state, drawn + num_tokens), tokens.T
