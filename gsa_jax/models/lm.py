"""The causal language model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gsa_jax.layers import MIXERS, RMSNorm, SwiGLU, lower_bounds
from gsa_jax.layers.linear import linear
from gsa_jax.layers.norm import add
from gsa_jax.models.config import ModelConfig
from gsa_jax.ops.arguments import check_array
from gsa_jax.ops.dot import dot
from gsa_jax.sharding import constrain, over_tokens


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: str, *, dtype, rngs):
        norm = functools.partial(_norm, config, dtype, rngs)
        self.mixer_norm = norm()
        self.mixer = MIXERS[mixer](
            config.hidden_size, getattr(config, mixer), implementation=config.implementation, dtype=dtype, rngs=rngs
        )
        self.has_mlp = config.resolved_mlp_size > 0
        if self.has_mlp:
            self.mlp_norm = norm()
            self.mlp = SwiGLU(config.hidden_size, config.resolved_mlp_size, dtype=dtype, rngs=rngs)

    def __call__(self, x, state, segment_ids, **mixer_inputs):
        """x [B, T, D] -> (x [B, T, D], the mixer's new state)."""
        x, normed = self.mixer_norm.of_sum(x)
        y, state = self.mixer(normed, state, segment_ids, **mixer_inputs)
        if not self.has_mlp:
            return add(x, y), state
        x, normed = self.mlp_norm.of_sum(x, y)
        return add(x, self.mlp(normed)), state


class LanguageModel(nnx.Module):
    """A causal language model: embedding, blocks, norm, head.

    The blocks of one pattern of mixers are one step of a `lax.scan` over the depth, so that compile time does not grow
    with the number of layers; `config.unroll` makes the loop shorter or none at all. `blocks[i]` holds the parameters
    of position i of the pattern, stacked over its repeats.
    Parameters are float32; activations have `dtype`, logits are float32. Call it under `jax.jit` or `nnx.jit`: outside
    of them each call compiles the loop anew.
    """

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.num_repeats = config.num_layers // len(config.mixers)
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=jnp.float32,
            embedding_init=nnx.initializers.normal(0.02),
            embedding_metadata={"axes": ("vocab", "embed")},
            rngs=rngs,
        )
        self.blocks = nnx.List([self._stack(mixer, rngs) for mixer in config.mixers])
        if "hgrn2" in config.mixers:
            shape = (config.num_layers, config.hidden_size)
            self.lower_bounds = nnx.Param(jnp.zeros(shape, jnp.float32), axes=("heads",))
        self.norm = _norm(config, dtype, rngs)
        if not config.tie_embeddings:
            self.head = linear(config.hidden_size, config.vocab_size, ("embed", "vocab"), dtype=dtype, rngs=rngs)

    def _stack(self, mixer, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return Block(self.config, mixer, dtype=self.dtype, rngs=rngs)

        return create(rngs.split(self.num_repeats))

    def __call__(self, tokens, state=None, segment_ids=None):
        """tokens [B, T] int -> (logits [B, T, vocab] float32, state after the last token)."""
        hidden, state = self.hidden(tokens, state, segment_ids)
        return self.logits(hidden), state

    def hidden(self, tokens, state=None, segment_ids=None):
        """tokens [B, T] int -> (what the head reads, [B, T, D], state after the last token).

        `state` is what an earlier call returned, or `init_state` made; None is the empty state. `segment_ids` [B, T]
        mark documents packed into one row (see `gsa_jax.layers.Mixer`). Tokens that the vocabulary lacks give NaN.

        Raises:
          TypeError, ValueError: an argument has the wrong dtype or shape, or is of another kind; the message names it.
        """
        check_array("tokens", tokens, {"B": None, "T": None}, jnp.integer)
        self._check_state(state)
        definitions, parameters = zip(*(nnx.split(blocks) for blocks in self.blocks), strict=True)

        def repeat(x, layer):
            parameters, states, bounds = layer
            new_states = []
            for i, (definition, mixer) in enumerate(zip(definitions, self.config.mixers, strict=True)):
                mixer_inputs = {"lower_bound": bounds[i]} if mixer == "hgrn2" else {}
                state = None if states is None else states[i]
                run = self._remat(functools.partial(_run_block, definition))
                x, new_state = run(parameters[i], x, state, segment_ids, mixer_inputs)
                new_states.append(new_state)
            x = constrain(x, "batch", "length", None)
            return x, tuple(new_states)

        x = constrain(self._embed(tokens), "batch", "length", None)
        layers = (parameters, state, self._lower_bounds())
        if self.config.unrolled:
            x, state = _in_a_row(repeat, x, layers)
        else:
            x, state = lax.scan(repeat, x, layers, unroll=self.config.unroll)
        return self.norm(x), state

    def _check_state(self, state):
        """Raises unless `state` is None or has the states of this depth."""
        if state is None:
            return
        blocks, repeats = len(self.blocks), self.num_repeats
        expected = f"state must be a tuple of {blocks} states stacked over {repeats} repeats, as init_state makes it"
        if not isinstance(state, tuple | list) or len(state) != blocks:
            got = f"{len(state)} of them" if isinstance(state, tuple | list) else type(state).__name__
            raise TypeError(f"{expected}, got {got}")
        for leaf in jax.tree.leaves(state):
            if jnp.shape(leaf)[:1] != (repeats,):
                raise ValueError(f"{expected}, got an array of shape {list(jnp.shape(leaf))}")

    def _embed(self, tokens):
        """The tokens' rows of the table, which is gathered in `dtype`; only a split of the vocabulary stays."""
        table = constrain(self.embedding.embedding[...].astype(self.dtype), "vocab", "embed")
        return _look_up(constrain(table, "vocab", None), tokens)

    def logits(self, hidden):
        """hidden [..., D] -> logits [..., vocab] in float32."""
        return dot(hidden, self.head_matrix().astype(self.dtype))

    def head_matrix(self):
        """The head, [D, vocab] in float32."""
        return self.embedding.embedding[...].T if self.config.tie_embeddings else self.head.kernel[...]

    def init_state(self, batch_size, max_length=None):
        """An empty state for `batch_size` rows, for each position of the pattern stacked over its repeats.

        `max_length` bounds what softmax attention remembers; without it its state grows with every call.
        """
        states = []
        for blocks in self.blocks:
            definition, parameters = nnx.split(blocks)
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parameters)
            first = nnx.merge(definition, shapes)
            state = first.mixer.init_state(batch_size, max_length)
            states.append(jax.tree.map(lambda x: jnp.broadcast_to(x, (self.num_repeats, *x.shape)), state))
        return tuple(states)

    def reset_state(self, state, empty, rows):
        """`state`, with `empty` (what `init_state` made) in the `rows` [B] (bool) where a new document begins.

        Raises:
          ValueError: the two differ in shape, as a state of softmax attention that grows: `max_length` bounds it.
        """

        def reset(empty, carried):
            if empty.shape != carried.shape:
                raise ValueError(f"empty must have the shapes of state, got {empty.shape}, expected {carried.shape}")
            if carried.ndim < 2:  # a count of tokens, common to all rows
                return carried
            return jnp.where(rows.reshape(-1, *[1] * (carried.ndim - 2)), empty, carried)

        return jax.tree.map(reset, empty, state)

    def step(self, token, state):
        """One token of each row: [B] int -> (logits [B, vocab] in float32, the new state)."""
        check_array("token", token, {"B": None}, jnp.integer)
        logits, state = self(token[:, None], state)
        return logits[:, 0], state

    def unrolled(self):
        """The same model without the loop over its depth: its pattern is the whole depth, and every block has its
        parameters, copies, to itself.

        That is for decoding: a loop copies the weights of each layer out of their stack before it multiplies with them,
        this one reads them where they are. It takes longer to compile.
        """
        model = nnx.merge(*nnx.split(self))
        stacks = [nnx.split(blocks) for blocks in self.blocks]
        model.config = dataclasses.replace(self.config, mixers=self.config.mixers * self.num_repeats)
        model.num_repeats = 1
        model.blocks = nnx.List(
            [
                nnx.merge(definition, jax.tree.map(lambda x, i=i: x[i : i + 1], parameters))
                for i in range(self.num_repeats)
                for definition, parameters in stacks
            ]
        )
        return model

    def unroll_state(self, state):
        """A state of this model as one of `unrolled()`."""
        repeats = range(self.num_repeats)
        return tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], states) for i in repeats for states in state)

    def _remat(self, function):
        if self.config.remat == "none":
            return function
        policy = None
        if self.config.remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        # Without a loop between them XLA would have the backward pass use what the forward pass had, and so save it.
        together = self.config.unrolled or self.config.unroll > 1 or len(self.config.mixers) > 1
        return jax.checkpoint(function, policy=policy, prevent_cse=together)

    def _lower_bounds(self):
        """HGRN2's lower bounds, [repeats, mixers of the pattern, D]; None without HGRN2."""
        if "hgrn2" not in self.config.mixers:
            return None
        return lower_bounds(self.lower_bounds[...]).reshape(self.num_repeats, len(self.config.mixers), -1)


def _norm(config, dtype, rngs):
    epsilon, implementation = config.norm_epsilon, config.implementation
    return RMSNorm(config.hidden_size, epsilon=epsilon, implementation=implementation, dtype=dtype, rngs=rngs)


def _look_up(table, tokens):
    """Rows of a table [vocab, D], each device those of its own tokens.

    They are taken in float32, so that a device adds up their gradients in float32: thousands in a row of the table.
    """

    def take(table, tokens):
        return jnp.take(table.astype(jnp.float32), tokens, axis=0).astype(dtype)

    dtype = table.dtype
    return over_tokens(take, table, tokens=tokens)


def _in_a_row(repeat, x, layers):
    """`lax.scan(repeat, x, layers)` without a loop in the program."""
    stacks, structure = jax.tree.flatten(layers)
    repeat = jax.jit(repeat)  # which is traced once
    states = []
    for layer in zip(*(_unstack(stack) for stack in stacks), strict=True):
        x, state = repeat(x, jax.tree.unflatten(structure, layer))
        states.append(state)
    return x, jax.tree.map(lambda *states: jnp.stack(states), *states)


@jax.custom_vjp
def _unstack(stack):
    """The rows of an array, whose gradients are put into place one by one as they come, not all together at the end."""
    return tuple(stack)


def _unstack_forward(stack):
    return _unstack(stack), None


def _unstack_backward(_, gradients):
    stack = jnp.zeros((len(gradients), *gradients[0].shape), gradients[0].dtype)
    for i in reversed(range(len(gradients))):
        stack = lax.dynamic_update_index_in_dim(stack, gradients[i], i, 0)
    return (stack,)


_unstack.defvjp(_unstack_forward, _unstack_backward)


def _run_block(definition, parameters, x, state, segment_ids, mixer_inputs):
    return nnx.merge(definition, parameters)(x, state, segment_ids, **mixer_inputs)


def abstract_model(config, **options):
    """The model's structure with shapes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0), **options))


def count_parameters(config):
    """(all parameters, those that are multiplied with every token: all but the embedding's look-up table)."""
    model = abstract_model(config)
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    looked_up = 0 if config.tie_embeddings else math.prod(model.embedding.embedding.shape)
    return total, total - looked_up
