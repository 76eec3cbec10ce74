"""The oracle's hand-written gradients are those of its outputs: central differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import rel_err
from tests.ops import oracle
from tests.ops.cases import Sizes, linear_attention, make_case, slot_attention

SIZES = Sizes(B=2, T=4, H=4, G=2, K=3, V=2, M=3)


def assert_gradients_are_differences(function, arrays, cotangents, step=1e-6):
    arrays = {name: np.array(x, np.float64) for name, x in arrays.items()}
    _, gradients = function(arrays, cotangents)

    def value():
        outputs, _ = function(arrays, cotangents)
        products = (np.asarray(outputs[name]) * np.asarray(c, np.float64) for name, c in cotangents.items())
        return sum(np.sum(np.where(np.isfinite(product), product, 0)) for product in products)

    for name, x in arrays.items():
        differences = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            middle = x[index]
            x[index] = middle + step
            above = value()
            x[index] = middle - step
            differences[index] = (above - value()) / (2 * step)
            x[index] = middle
        assert rel_err(gradients[name], differences) < 1e-7, name


@pytest.mark.parametrize("gates", ["ordinary", "all kinds"])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_slot_attention(write, state, gates):
    arrays, cotangents = make_case(slot_attention, SIZES, write=write, state=state, gates=gates)
    assert_gradients_are_differences(oracle.slot_attention, arrays, cotangents)


@pytest.mark.parametrize("gates", ["ordinary", "all kinds"])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_linear_attention(scalar, state, gates):
    arrays, cotangents = make_case(linear_attention, SIZES, scalar=scalar, state=state, gates=gates)
    assert_gradients_are_differences(oracle.linear_attention, arrays, cotangents)


@pytest.mark.parametrize("names", [("write_logits",), ("write_logits", "normalizer")])
def test_abc_gate(names):
    shapes = {"write_logits": (2, 4, 2, 3), "normalizer": (2, 2, 3), "log_decay": (2, 4, 2, 3), "write": (2, 4, 2, 3)}
    draws = {name: np.random.default_rng(len(name)).normal(size=shape) for name, shape in shapes.items()}
    cotangents = {name: draws[name] for name in ("log_decay", "write", "normalizer")}
    assert_gradients_are_differences(oracle.abc_gate, {name: draws[name] for name in names}, cotangents)


def test_documents_are_calls_of_their_own():
    arrays, cotangents = make_case(slot_attention, SIZES)
    outputs, gradients = oracle.documents(
        oracle.slot_attention, arrays, cotangents, jnp.asarray([[0, 0, 1, 1], [5, 5, 5, 5]])
    )
    row = jax.tree.map(lambda x: x[1:], (arrays, cotangents))
    whole_outputs, whole_gradients = oracle.slot_attention(*row)
    first = {name: x[:1] if name in ("keys", "values") else x[:1, :2] for name, x in arrays.items()}
    no_state = {name: x[:1] * (0 if name != "out" else 1) for name, x in cotangents.items()} | {
        "out": cotangents["out"][:1, :2]
    }
    first_outputs, first_gradients = oracle.slot_attention(first, no_state)
    for name in arrays:
        assert rel_err(gradients[name][1:], whole_gradients[name]) == 0
    for name in ("keys", "values"):
        assert rel_err(outputs[name][1:], whole_outputs[name]) == 0
        assert rel_err(gradients[name][:1], first_gradients[name]) == 0
    assert rel_err(outputs["out"][:1, :2], first_outputs["out"]) == 0
