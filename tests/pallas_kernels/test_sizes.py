"""The sizes that kernels choose: where they come from, and that every one of them does."""

import functools

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
    monkeypatch.setattr(sizes, "_table", lambda: {sizes.device().device_kind: {"turns 4x64": 4}})
    with sizes.trial({"turns 4x64": 1}) as choices:
        assert choose() == 1
    assert choices == {"turns 4x64": sizes.Choice(1, (1, 2, 4))}
    assert choose() == 4


def test_a_size_that_does_not_do_is_refused(monkeypatch):
    expected = "turns 4x64: got 3 from {}, expected one of 1, 2, 4"
    with sizes.trial({"turns 4x64": 3}), pytest.raises(ValueError, match=expected.format("the trial")):
        choose()
    monkeypatch.setattr(sizes, "_table", lambda: {"cpu": {"turns 4x64": 3}})
    with pytest.raises(ValueError, match=expected.format(r".*sizes\.json for cpu")):
        choose()


def test_the_table_is_read_from_its_file(monkeypatch, tmp_path):
    assert isinstance(sizes._table(), dict)
    monkeypatch.setattr(sizes, "TABLE", tmp_path / "sizes.json")
    sizes.TABLE.write_text('{"cpu": {"turns 4x64": 1}}')
    sizes._table.cache_clear()
    try:
        assert choose() == 1
    finally:
        sizes._table.cache_clear()


def test_as_many_blocks_as_the_device_runs():
    with jax.sharding.use_abstract_mesh(mesh(num_cores=78)):
        assert sizes.multiprocessors() == 78
    assert sizes.multiprocessors() == 132  # on a CPU


def test_the_device_is_the_default_one_unless_a_mesh_is_in_context():
    last = jax.devices()[-1]
    with jax.default_device(last):
        assert sizes.device() is last
        with jax.sharding.use_abstract_mesh(mesh()):
            assert sizes.device().device_kind == H100
    with jax.default_device("cpu"):
        assert sizes.device() is jax.devices("cpu")[0]


def every_option(op, arrays, run):
    """(result, sizes) with the sizes of the rules, then with the first options of all kernels, ... with the last."""

    def choices(taken):
        with sizes.trial(taken) as seen:
            jax.eval_shape(functools.partial(forward_and_backward, op, implementation="pallas"), arrays)
        return seen

    rules = choices({})
    yield run(op, arrays), {}
    number = most = 0
    while number <= most:
        taken, found = {}, rules
        while not found.keys() <= taken.keys():  # another size may bring kernels of other shapes, which choose anew
            most = max(most, *(len(choice.options) - 1 for choice in found.values()))
            taken |= {name: choice.options[min(number, len(choice.options) - 1)] for name, choice in found.items()}
            found = choices(taken)
        with sizes.trial(taken):
            result = run(op, arrays)
        yield result, taken
        number += 1


@pytest.mark.parametrize("op", OPS)
def test_every_size_lowers(op):
    pallas = functools.partial(op, implementation="pallas")
    seen = set()

    def lower(_, arrays):
        return count_kernels(functools.partial(forward_and_backward, pallas), arrays)

    with jax.sharding.use_abstract_mesh(mesh()):
        for kernels, taken in every_option(op, shapes(op, LONG), lower):
            assert kernels > 0
            seen |= {name.rsplit(" ", 1)[0] for name in taken}
    assert {"memory_read segments", "memory_read_states segments", "chunk_states_reverse segments"} & seen
    assert {"chunk_gates warpgroups", "memory_read_states warpgroups"} <= seen


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_every_size_gives_the_same(op):
    arrays, cotangents = make_case(op, LONG, dtype=jnp.bfloat16)

    def run(op, arrays):
        return jax.block_until_ready(outputs_and_gradients(op, arrays, cotangents, implementation="pallas"))

    expected = run(op, arrays)
    for results, _ in every_option(op, arrays, run):
        assert_all_close(results, expected, 5e-3)
