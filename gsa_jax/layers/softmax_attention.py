"""Causal softmax attention, for Transformer++ and for hybrids."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from gsa_jax.layers.checks import check_numbers
from gsa_jax.layers.linear import linear
from gsa_jax.layers.mixer import HeadProjections, Mixer, check_inputs, head_size, merge_heads
from gsa_jax.layers.rotary import rotate
from gsa_jax.ops import sharded
from gsa_jax.ops.arguments import check_array, check_segment_ids, document_starts
from gsa_jax.ops.softmax import attention


@dataclass(frozen=True)
class SoftmaxAttentionConfig:
    """Settings of a softmax attention layer."""

    num_heads: int = 16
    """query heads H"""
    num_kv_heads: int | None = None
    """key and value heads G, each shared by H / G query heads; H by default"""
    window: int | None = None
    """how many tokens a token sees, itself included; all before it by default"""
    rope_theta: float = 10000.0
    """base of the rotary embedding"""
    conv_size: int = 0
    """taps of the short convolutions of q, k and v; 0 leaves them out"""

    def __post_init__(self):
        check_numbers(self, "conv_size")


@struct.dataclass
class KeyValueCache:
    """The last keys and values, newest last.

    A cache with a `max_length` keeps its shape, as a decode loop needs, and drops the oldest tokens when it is full:
    attention beyond `max_length` tokens is attention over a window of that length. Without one it grows at every call.
    """

    keys: jax.Array
    """rotated, [B, S, G, K]"""
    values: jax.Array
    """[B, S, G, K]"""
    length: jax.Array
    """how many of them belong to the row's current document, int32 [B]"""
    position: jax.Array
    """tokens seen so far, int32"""
    convolutions: tuple
    max_length: int | None = struct.field(pytree_node=False, default=None)


class SoftmaxAttention(Mixer):
    """y = W_o softmax(rotate(q) rotate(k)ᵀ / sqrt(K)) v, causal, with grouped heads and an optional window."""

    Config = SoftmaxAttentionConfig

    def __init__(self, hidden_size, config=None, *, implementation=None, dtype=jnp.float32, rngs):
        """`implementation` is for the other mixers: this one runs `jax.nn.dot_product_attention`."""
        config = self.Config() if config is None else config
        num_kv_heads = config.num_kv_heads or config.num_heads
        size = head_size(hidden_size, config.num_heads)
        self.config = config
        self.dtype = dtype
        self.cache_shape = (num_kv_heads, size)
        self.projections = HeadProjections(
            hidden_size, config.num_heads, num_kv_heads, size, size, config.conv_size, dtype=dtype, rngs=rngs
        )
        self.out = linear(hidden_size, hidden_size, ("heads", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x, state=None, segment_ids=None):
        check_inputs(x, self.out.out_features, state, KeyValueCache)
        batch_size, length, _ = x.shape
        check_segment_ids(segment_ids, {"B": batch_size, "T": length})
        cache = self.init_state(batch_size) if state is None else state
        check_array("state.length", cache.length, {"B": batch_size}, jnp.integer)
        q, k, v, conv_state = self.projections(x, cache.convolutions, segment_ids)
        positions = cache.position + jnp.arange(length)[None]
        q, k = rotate(q, positions, self.config.rope_theta), rotate(k, positions, self.config.rope_theta)
        keys = jnp.concatenate([cache.keys, k], axis=1)
        values = jnp.concatenate([cache.values, v], axis=1)

        document = jnp.zeros((batch_size, length), jnp.int32)
        if segment_ids is not None:
            document = jnp.cumsum(document_starts(segment_ids), axis=1)
        if state is None:
            out = sharded.softmax_attention(q, k, v, window=self.config.window, segment_ids=segment_ids)
        else:
            out = attention(q, keys, values, mask=self._mask(cache, document)[:, None])
        return self.out(merge_heads(out)), self._keep(cache, keys, values, document, conv_state)

    def _mask(self, cache, document):
        """[B, T, S + T] bool: which of the cached and the new tokens each new token sees."""
        cached, length = cache.keys.shape[1], document.shape[1]
        key_index = jnp.arange(cached + length)
        distance = cached + jnp.arange(length)[:, None] - key_index
        limits = [limit for limit in (self.config.window, cache.max_length) if limit is not None]
        visible = (distance >= 0) & (distance < min([cached + length, *limits]))
        in_use = key_index >= cached - cache.length[:, None]
        key_document = jnp.pad(document, ((0, 0), (cached, 0)))
        return visible & in_use[:, None] & (key_document[:, None] == document[:, :, None])

    def _keep(self, cache, keys, values, document, conv_state):
        """The cache after the call, cut to what a later token can see."""
        length = document.shape[1]
        limits = [limit for limit in (self.config.window, cache.max_length) if limit is not None]
        kept = min([keys.shape[1], *limits])
        if cache.max_length is not None:
            kept = cache.keys.shape[1]
        new = jnp.sum(document == document[:, -1:], axis=1, dtype=jnp.int32)
        in_document = jnp.where(document[:, -1] == 0, cache.length + length, new)
        return KeyValueCache(
            keys=keys[:, keys.shape[1] - kept :],
            values=values[:, values.shape[1] - kept :],
            length=jnp.minimum(in_document, kept),
            position=cache.position + length,
            convolutions=conv_state,
            max_length=cache.max_length,
        )

    def init_state(self, batch_size, max_length=None):
        """An empty cache: of a fixed size that holds `max_length` tokens (or a window, if that is less), or growing."""
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 or None, got {max_length}")
        size = 0 if max_length is None else min(max_length, self.config.window or max_length)
        shape = (batch_size, size, *self.cache_shape)
        return KeyValueCache(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            length=jnp.zeros(batch_size, jnp.int32),
            position=jnp.int32(0),
            convolutions=self.projections.init_state(batch_size),
            max_length=max_length,
        )
