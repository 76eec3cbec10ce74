"""The sizes that kernels choose: where they come from, and that every one of them does."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import sizes
from tests.ops.cases import OPS, Sizes, assert_all_close, make_case, outputs_and_gradients
from tests.pallas_kernels.hopper import H100, count_kernels, forward_and_backward, mesh, shapes

LONG = Sizes(B=1, T=1536, H=2, G=1, K=128, V=128, M=64)
"""With segments to choose, and warpgroups of `memory_read`."""


def choose(rule=2):
    return sizes.choose("turns", (4, 64), rule, (1, 2, 4))


def test_the_rule_where_nothing_else_is_known():
    assert choose() == 2


def test_the_table_of_the_device(monkeypatch):
    monkeypatch.setattr(sizes, "_table", lambda: {H100: {"turns 4x64": 4, "turns 4x65": 1}})
    assert choose() == 2  # for a CPU
    with jax.sharding.use_abstract_mesh(mesh()):
        assert choose() == 4


def test_a_trial_goes_first_and_sees_what_is_chosen(monkeypatch):
    monkeypatch.setattr(sizes, "_table", lambda: {sizes.device_kind(): {"turns 4x64": 4}})
    with sizes.trial({"turns 4x64": 1}) as choices:
        assert choose() == 1
    assert choices == {"turns 4x64": sizes.Choice(1, (1, 2, 4))}
    assert choose() == 4


def test_a_size_that_does_not_do_is_refused():
    with sizes.trial({"turns 4x64": 3}), pytest.raises(ValueError, match="turns 4x64: got 3, expected one of 1, 2, 4"):
        choose()


def test_the_table_is_json_with_sizes_by_device():
    table = json.loads(sizes.TABLE.read_text())
    assert all(isinstance(size, int) for device in table.values() for size in device.values())


def test_as_many_blocks_as_the_device_runs():
    with jax.sharding.use_abstract_mesh(mesh(num_cores=78)):
        assert sizes.multiprocessors() == 78
    assert sizes.multiprocessors() == 132  # on a CPU


def extremes(op, arrays, run):
    """(result, sizes) with all sizes that the kernels choose at their least, then at their greatest."""
    for best in (min, max):
        taken, settled = {}, False
        while not settled:  # another size may bring kernels of other shapes, which choose anew
            with sizes.trial(taken) as choices:
                result = run(op, arrays)
            settled = choices.keys() <= taken.keys()
            taken |= {name: best(choice.options) for name, choice in choices.items()}
        yield result, taken


@pytest.mark.parametrize("op", OPS)
def test_every_size_lowers(op):
    pallas = functools.partial(op, implementation="pallas")
    seen = set()

    def lower(_, arrays):
        return count_kernels(functools.partial(forward_and_backward, pallas), arrays)

    for kernels, taken in extremes(op, shapes(op, LONG), lower):
        assert kernels > 0
        seen |= {name.rsplit(" ", 1)[0] for name in taken}
    assert "segments" in seen and any(name.endswith("warpgroups") for name in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_every_size_gives_the_same(op):
    arrays, cotangents = make_case(op, LONG, dtype=jnp.bfloat16)

    def run(op, arrays):
        return jax.block_until_ready(outputs_and_gradients(op, arrays, cotangents, implementation="pallas"))

    expected = run(op, arrays)
    for results, _ in extremes(op, arrays, run):
        assert_all_close(results, expected, 5e-3)
