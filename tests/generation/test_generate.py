"""Generation: what it draws, in which blocks, and that it compiles once and does not grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax.generation import SamplingConfig, generate, stream
from gsa_jax.generation.generate import _for_decoding, _state_grows
from gsa_jax.models import LanguageModel
from tests.models.cases import PAIRS, VOCABULARY, config, model, token_ids

PROMPT = token_ids(5)
NUM_TOKENS = 7
GREEDY = SamplingConfig(temperature=0)


@jax.jit
def whole_sequence(lm, tokens):
    """The logits of all tokens at once; compiled once for models of the same configuration."""
    return lm(tokens)[0]


@pytest.fixture(scope="module")
def lm():
    """A hybrid of a fixed-size memory and a key-value cache."""
    return model(config(("gsa", "softmax")))


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_greedy_tokens_are_the_most_likely_of_the_whole_sequence(name, unroll):
    lm = model(config(PAIRS[name]))
    tokens = generate(lm, PROMPT, NUM_TOKENS, sampling=GREEDY, unroll=unroll)
    assert tokens.shape == (2, NUM_TOKENS) and tokens.dtype == jnp.int32
    logits = whole_sequence(lm, jnp.concatenate([PROMPT, tokens], axis=1))
    np.testing.assert_array_equal(tokens, jnp.argmax(logits[:, 4:-1], axis=-1))


@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_block_sizes_change_nothing(lm, block_size):
    blocks = list(stream(lm, PROMPT, NUM_TOKENS, block_size=block_size))
    assert [x.shape[1] for x in blocks] == {1: [1] * 7, 3: [3, 3, 1], 100: [7]}[block_size]
    np.testing.assert_array_equal(jnp.concatenate(blocks, axis=1), generate(lm, PROMPT, NUM_TOKENS))


@pytest.mark.parametrize("unroll", [False, True])
def test_steps_have_the_matrices_in_the_dtype_they_are_multiplied_in(unroll):
    """And nothing else: norms, and what computes in float32, keep theirs."""
    lm = model(config(("gla", "softmax")), dtype=jnp.bfloat16)
    definition, parameters = _for_decoding(*nnx.split(lm), unroll=unroll)
    for path, x in jax.tree.leaves_with_path(parameters):
        name = jax.tree_util.keystr(path)
        rounded = ("kernel" in name and "gate_up" not in name) or "embedding" in name
        assert x.dtype == (jnp.bfloat16 if rounded else jnp.float32), name
    tokens = generate(nnx.merge(definition, parameters), PROMPT, NUM_TOKENS, unroll=False)
    np.testing.assert_array_equal(tokens, generate(lm, PROMPT, NUM_TOKENS, unroll=unroll))


def test_the_key_decides(lm):
    draw = lambda key: np.asarray(generate(lm, PROMPT, NUM_TOKENS, key=key))  # noqa: E731
    np.testing.assert_array_equal(draw(jax.random.key(3)), draw(jax.random.key(3)))
    np.testing.assert_array_equal(draw(None), draw(jax.random.key(0)))
    assert not np.array_equal(draw(jax.random.key(3)), draw(jax.random.key(4)))


def test_rows_are_drawn_each_by_itself(lm):
    same = jnp.broadcast_to(PROMPT[:1], (16, 5))
    tokens = np.asarray(generate(lm, same, NUM_TOKENS))
    assert len(np.unique(tokens, axis=0)) > 1
    assert tokens.min() >= 0 and tokens.max() < VOCABULARY


def test_the_decode_loop_compiles_once_and_its_memory_stays(monkeypatch):
    """Its trace is a call of `LanguageModel.step`; its memory is what lives between blocks."""
    lm, traces, traced_step = model(config(("gsa", "softmax"), vocab_size=43)), [], LanguageModel.step

    def counted(self, token, state):
        traces.append(token.shape)
        return traced_step(self, token, state)

    monkeypatch.setattr(LanguageModel, "step", counted)
    after_each_block, bytes_alive = [], []
    for seed in (0, 1):
        blocks = stream(lm, PROMPT, 12, block_size=4, key=jax.random.key(seed), sampling=SamplingConfig(top_k=5))
        for block in blocks:
            assert block.shape == (2, 4)
            del block
            after_each_block.append(len(traces))
            bytes_alive.append(sum(x.nbytes for x in jax.live_arrays()))
    assert after_each_block[0] > 0
    assert after_each_block == after_each_block[:1] * 6
    assert bytes_alive[:3] == bytes_alive[:1] * 3


@pytest.mark.parametrize(("mixers", "with_a_longer_cache"), [(("gsa",), 1), (("gsa", "softmax"), 2)], ids=str)
def test_another_number_of_tokens_compiles_nothing_that_a_longer_cache_does_not_need(
    monkeypatch, mixers, with_a_longer_cache
):
    """A prefill's trace is a call of `init_state`, that of a decode loop a call of `step`."""
    lm, traces = model(config(mixers, vocab_size=44)), {"init_state": 0, "step": 0}

    def count(name, traced):
        def counted(*arguments):
            traces[name] += 1
            return traced(*arguments)

        monkeypatch.setattr(LanguageModel, name, counted)

    _state_grows(lm.config)  # which asks once for each config
    for name in traces:
        count(name, getattr(LanguageModel, name))
    next(stream(lm, PROMPT, 3, block_size=4))
    first = dict(traces)
    for num_tokens in (6, 251):
        next(stream(lm, PROMPT, num_tokens, block_size=4))
    assert traces == first
    next(stream(lm, PROMPT, 252, block_size=4))
    assert traces == {name: with_a_longer_cache * calls for name, calls in first.items()}


@pytest.mark.parametrize(
    ("prompt", "num_tokens", "message"),
    [
        (np.zeros((1, 0)), 1, r"prompt must have shape \[B, T\] with at least one token, got \[1, 0\]"),
        (np.zeros(3), 1, r"prompt must have shape \[B, T\] with at least one token, got \[3\]"),
        (PROMPT, 0, "num_tokens must be at least 1, got 0"),
        ([[0, VOCABULARY]], 1, "prompt must hold token ids from 0 to 40, got 41"),
        (jnp.asarray([[3], [-1]]), 1, "prompt must hold token ids from 0 to 40, got -1"),
        (np.asarray([[2**32 + 1]]), 1, "prompt must hold token ids from 0 to 40, got 4294967297"),
    ],
)
def test_what_can_not_be_continued(lm, prompt, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(lm, prompt, num_tokens)


@pytest.mark.parametrize("prompt", [[[1.7, 2.2]], np.ones((1, 2), bool)])
def test_a_prompt_holds_integers(lm, prompt):
    with pytest.raises(TypeError, match="prompt must hold integers, got"):
        generate(lm, prompt, 1)


def test_blocks_have_at_least_one_token(lm):
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        next(stream(lm, PROMPT, NUM_TOKENS, block_size=0))


@pytest.mark.parametrize(("mixers", "grows"), [(("gsa", "gla"), False), (("gsa", "softmax"), True)])
def test_states_that_grow_are_told_by_what_they_hold(mixers, grows):
    assert _state_grows(config(mixers)) == grows
