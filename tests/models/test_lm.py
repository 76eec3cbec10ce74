"""The language model: depth, state, documents, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax.layers import lower_bounds
from gsa_jax.models import LanguageModel
from tests.helpers import rel_err
from tests.layers.definitions import rms_norm
from tests.models.cases import PAIRS, VOCABULARY, config, model, token_ids

LENGTH = 12
HALF = LENGTH // 2
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=PAIRS)
def lm(request):
    """A model of each pair of mixers."""
    return model(config(PAIRS[request.param]))


@jax.jit
def run(model, tokens, state=None, segment_ids=None):
    return model(tokens, state, segment_ids)


@jax.jit
def steps(model, tokens, state):
    """`step` token by token inside one scan: (logits, state)."""
    state, logits = jax.lax.scan(lambda state, token: model.step(token, state)[::-1], state, tokens.T)
    return logits.swapaxes(0, 1), state


@jax.jit
def loss_and_gradients(model, tokens):
    definition, parameters = nnx.split(model)

    def loss(parameters):
        logits, _ = nnx.merge(definition, parameters)(tokens[:, :-1])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))

    return jax.value_and_grad(loss)(parameters)


def test_gradients_reach_every_parameter(lm):
    _, gradients = loss_and_gradients(lm, token_ids(LENGTH))
    for path, gradient in jax.tree.leaves_with_path(gradients):
        where = jax.tree_util.keystr(path)
        layers = gradient if "blocks" in where else gradient[None]
        for layer in layers:
            assert jnp.isfinite(layer).all() and jnp.any(layer != 0), where


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in PAIRS), ("gsa-softmax", {"mlp_size": 0, "tie_embeddings": True})],
    ids=str,
)
def test_the_scan_over_depth_is_block_after_block(name, settings):
    lm, tokens = model(config(PAIRS[name], **settings)), token_ids(LENGTH)

    @jax.jit
    def blocks_in_turn(lm, tokens):
        x, mixers = lm.embedding(tokens), lm.config.mixers
        bounds = lower_bounds(lm.lower_bounds[...]) if "hgrn2" in mixers else None
        for layer in range(lm.config.num_layers):
            repeat, i = divmod(layer, len(mixers))
            definition, stacked = nnx.split(lm.blocks[i])
            block = nnx.merge(definition, jax.tree.map(lambda p, repeat=repeat: p[repeat], stacked))
            y, _ = block.mixer(block.mixer_norm(x), **({"lower_bound": bounds[layer]} if mixers[i] == "hgrn2" else {}))
            x = x + y
            if lm.config.mlp_size:
                x = x + block.mlp(block.mlp_norm(x))
        return x

    x = np.asarray(blocks_in_turn(lm, tokens), np.float64)
    hidden = rms_norm(x, {"scale": np.asarray(lm.norm.scale)})
    tied = lm.config.tie_embeddings
    assert hasattr(lm, "head") is not tied
    head = lm.embedding.embedding.T if tied else lm.head.kernel[...]
    logits, _ = run(lm, tokens)
    assert logits.shape == (2, LENGTH, VOCABULARY) and logits.dtype == jnp.float32
    assert rel_err(logits, hidden @ np.asarray(head, np.float64)) < TOLERANCE


def test_a_sequence_may_be_split(lm):
    tokens = token_ids(LENGTH)
    logits, _ = run(lm, tokens)
    for state in (None, lm.init_state(2, LENGTH)):
        first, state = run(lm, tokens[:, :HALF], state)
        second, _ = run(lm, tokens[:, HALF:], state)
        assert rel_err(jnp.concatenate([first, second], axis=1), logits) < TOLERANCE


def test_token_by_token(lm):
    tokens, empty = token_ids(LENGTH), lm.init_state(2, LENGTH)
    logits, _ = run(lm, tokens)
    stepped, state = steps(lm, tokens, empty)
    assert rel_err(stepped, logits) < TOLERANCE
    assert jax.tree.structure(state) == jax.tree.structure(empty)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)


def test_unrolled_it_is_the_same_model(lm):
    """Outputs, and steps from a state of either."""
    tokens, unrolled = token_ids(LENGTH), lm.unrolled()
    assert len(unrolled.blocks) == unrolled.config.num_layers == len(unrolled.config.mixers) > len(lm.blocks)
    logits, _ = run(lm, tokens)
    assert rel_err(run(unrolled, tokens)[0], logits) < TOLERANCE
    _, state = run(lm, tokens[:, :HALF], lm.init_state(2, LENGTH))
    expected = unrolled.init_state(2, LENGTH)
    assert jax.tree.map(jnp.shape, lm.unroll_state(state)) == jax.tree.map(jnp.shape, expected)
    stepped, _ = steps(unrolled, tokens[:, HALF:], lm.unroll_state(state))
    assert rel_err(stepped, logits[:, HALF:]) < TOLERANCE


def test_packed_documents_are_run_alone(lm):
    tokens, rest = token_ids(LENGTH), token_ids(HALF, seed=1)
    logits, state = run(lm, tokens, segment_ids=jnp.asarray([[3] * HALF + [4] * HALF, [1] * HALF + [0] * HALF]))
    first, _ = run(lm, tokens[:, :HALF])
    second, state_alone = run(lm, tokens[:, HALF:])
    assert rel_err(logits, jnp.concatenate([first, second], axis=1)) < TOLERANCE
    assert rel_err(run(lm, rest, state)[0], run(lm, rest, state_alone)[0]) < TOLERANCE


def test_reset_rows_begin_anew(lm):
    tokens, empty = token_ids(LENGTH), lm.init_state(2, LENGTH)
    _, state = run(lm, tokens[:, :HALF], empty)
    logits, _ = run(lm, tokens[:, HALF:], lm.reset_state(state, empty, jnp.asarray([False, True])))
    assert rel_err(logits[0], run(lm, tokens)[0][0, HALF:]) < TOLERANCE
    assert rel_err(logits[1], run(lm, tokens[:, HALF:])[0][1]) < TOLERANCE


@pytest.mark.parametrize(("remat", "unroll"), [("dots", 1), ("full", 1), ("none", 4), ("dots", 3)])
def test_remat_and_unrolling_change_nothing(remat, unroll):
    settings, tokens = config(("hgrn2",), num_layers=4), token_ids(LENGTH)
    results = [
        loss_and_gradients(model(variant), tokens)
        for variant in (settings, dataclasses.replace(settings, remat=remat, unroll=unroll))
    ]
    for reference, result in zip(*map(jax.tree.leaves, results), strict=True):
        assert rel_err(result, reference) < TOLERANCE


def test_unrolled_there_is_no_loop_over_the_depth():
    def loops(**settings):
        lm = model(config(("softmax",), num_layers=4, **settings))
        return lm.config.unrolled, run.lower(lm, token_ids(8)).as_text().count("stablehlo.while")

    (unrolled, none), (rolled, one) = loops(unroll=4), loops()
    assert unrolled and not rolled and one == none + 1


def test_every_block_is_rematerialized_by_itself():
    lm = model(config(("gsa", "softmax"), remat="full", num_layers=4))
    assert str(jax.make_jaxpr(lambda lm: lm(token_ids(8))[0])(lm)).count("remat2[") == 2


def test_the_gradients_of_a_frequent_token_are_not_summed_in_bfloat16():
    tokens = jnp.zeros((2, 600), jnp.int32)

    def gradient(dtype):
        lm = model(config(("linear",), mlp_size=0), dtype=dtype)
        return jax.grad(lambda lm: jnp.sum(lm._embed(tokens), dtype=jnp.float32))(lm).embedding.embedding[0]

    assert rel_err(gradient(jnp.bfloat16), gradient(jnp.float32)) < 5e-3


def test_remat_saves_less():
    saved = {}
    for remat in ("none", "dots", "full"):
        lm = model(config(("softmax",), remat=remat, num_layers=8))
        _, pullback = jax.eval_shape(lambda lm=lm: jax.vjp(lambda lm: lm(token_ids(LENGTH))[0], lm))
        saved[remat] = sum(x.size for x in jax.tree.leaves(pullback))
    assert saved["full"] < saved["dots"] < saved["none"]


def test_bfloat16():
    settings, tokens = config(("gsa", "softmax")), token_ids(LENGTH)
    logits, _ = run(model(settings, dtype=jnp.bfloat16), tokens)
    assert logits.dtype == jnp.float32
    assert rel_err(logits, run(model(settings), tokens)[0]) < 5e-2


def test_a_new_model_predicts_about_uniformly():
    lm = jax.jit(lambda: LanguageModel(config(("gsa",), tie_embeddings=True), rngs=nnx.Rngs(0)))()
    log_probabilities = jax.nn.log_softmax(run(lm, token_ids(LENGTH))[0])
    np.testing.assert_allclose(log_probabilities, -np.log(VOCABULARY), atol=0.5)
    first, second = (lm.blocks[0].mixer.out.kernel[i] for i in range(2))
    assert not np.array_equal(first, second)  # each layer has its own draw


def test_what_a_model_does_not_take_is_named(lm):
    tokens, state = token_ids(LENGTH), lm.init_state(2, LENGTH)
    expected = "state must be a tuple of 2 states stacked over 2 repeats, as init_state makes it, got "
    for arguments, error, message in [
        ((tokens[0],), ValueError, r"tokens must have shape \[B, T\] .*, got \[12\]"),
        ((tokens.astype(float),), TypeError, "tokens must hold integers, got dtype float32"),
        (([[1, 2]],), TypeError, r"tokens must be an array of shape \[B, T\], got list"),
        ((tokens, state[:1]), TypeError, expected + "1 of them"),
        ((tokens, 5), TypeError, expected + "int"),
        ((tokens, lm.unroll_state(state)), TypeError, expected + "4 of them"),
        ((tokens, jax.tree.map(lambda x: x[:1], state)), ValueError, expected + r"an array of shape \[1"),
        ((tokens, jnp.zeros_like(tokens)), TypeError, expected + "ArrayImpl"),
    ]:
        with pytest.raises(error, match=message):
            lm(*arguments)
    with pytest.raises(ValueError, match=r"token must have shape \[B\] .*, got \[2, 12\]"):
        lm.step(tokens, state)


def test_the_states_may_come_in_a_list(lm):
    """As checkpoints that were read without their structure have them."""
    tokens = token_ids(LENGTH)
    _, state = run(lm, tokens)
    np.testing.assert_array_equal(run(lm, tokens, list(state))[0], run(lm, tokens, state)[0])
