"""Every kernel of Gated Slot Attention, in the interpreter, against its formula in float64."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decays, slots, states
from pallas_kernels import key_read as key_read_module
from pallas_kernels import memory_read as memory_read_module
from pallas_kernels.gates import chunk_gates
from pallas_kernels.gates_backward import gates_backward
from pallas_kernels.key_read import key_read
from pallas_kernels.memory_read import memory_read
from pallas_kernels.slot_softmax import slot_softmax
from pallas_kernels.slot_softmax_backward import slot_softmax_backward
from pallas_kernels.write_backward import write_backward
from tests.ops.cases import GATES, assert_close
from tests.pallas_kernels import formulas
from tests.pallas_kernels.formulas import SIZE, by_chunks, by_tokens, per_head

B, T, H, G, K, V, M, N = 1, 168, 2, 1, 128, 192, SIZE, 3
"""the last chunk is cut short, two heads share a group, and an odd number of chunks leaves a warpgroup without one"""
NUM_SLOTS, SCALE = 40, 0.1
TOLERANCE = 5e-3
"""by norm: results and the factors of products are rounded to 8 bits or 11"""
KINDS = {
    "write given, gates in two parts": (jnp.bfloat16, np.float32, True),
    "write derived, gates in one part": (np.float16, np.float16, False),
}


@functools.cache
def gates(dtype, gates_dtype, write):
    """Gates, mild in the first chunk only, write strengths or None, and what `chunk_gates` makes of them."""
    rng = np.random.default_rng(0)
    log_decay = GATES["runs of -20 and -1000"](rng, (B, T, G, M))
    log_decay += np.where(rng.random((1, T, 1, 1)) < 0.5, GATES["ordinary"](rng, (B, T, G, M)), 0)
    log_decay[rng.random(log_decay.shape) < 0.01] = -np.inf
    log_decay[:, :SIZE] = GATES["weak"](rng, (B, SIZE, G, M))
    log_decay = log_decay.astype(gates_dtype)
    write = (rng.random((B, T, G, M)) / 8).astype(dtype) if write else None
    return log_decay, write, [np.asarray(x) for x in chunk_gates(log_decay, write, dtype)]


class Operands:
    """Random operands, rounded as the kernels get them."""

    def __init__(self, kind):
        self.rng, self.dtype = np.random.default_rng(1), kind[0]
        self.log_decay, self.write, (self.parts, *self.prepared, self.mild) = gates(*kind)

    def normal(self, *shape, dtype=None):
        return self.rng.normal(size=shape).astype(dtype or self.dtype)

    def scores(self):
        """Scores [B, T, H, 64] by the tokens of the chunk, zero for later ones."""
        return self.normal(B, T, H, SIZE) * np.tri(SIZE, dtype=self.dtype)[np.arange(T) % SIZE][:, None]

    def scores_in_parts(self):
        """The same, and what might be rounding's."""
        return self.scores(), (self.scores() / 256).astype(self.dtype)

    def gates(self, num_heads=H):
        """Log decays as the parts hold them and write strengths, by chunks."""
        log_decay = by_chunks(self.parts.astype(np.float64).sum(0), num_heads)
        write = formulas.write_strength(log_decay) if self.write is None else by_chunks(self.write, num_heads)
        return log_decay, write


@pytest.fixture(params=KINDS)
def operands(request, interpreted):
    with interpreted():
        return Operands(KINDS[request.param])


def check(results, references, names):
    results = dict(zip(names.split(), results, strict=True))
    assert_close(results, dict(zip(names.split(), references, strict=True)), TOLERANCE)


def added(arrays, index):
    """With the two parts of a number from that index on as their sum."""
    first, second = (np.asarray(x, np.float64) for x in arrays[index : index + 2])
    return [*arrays[:index], first + second, *arrays[index + 2 :]]


def packed(p, dtype):
    """Probabilities, as `tiles.pack_probabilities` leaves them."""
    return (2.0**15 * p).astype(np.float16).view(dtype)


def unpacked(x):
    return np.asarray(x).view(np.float16).astype(np.float64) / 2**15


def tokens(*arrays):
    return [by_tokens(x, T) for x in arrays]


def heads(*arrays):
    return [by_chunks(x, H) for x in arrays]


def test_chunk_gates(operands):
    clamped = np.maximum(operands.log_decay.astype(np.float64), decays.STRONGEST)
    np.testing.assert_allclose(operands.parts.astype(np.float64).sum(0), clamped, rtol=2**-16)
    key, kept = formulas.chunk_gates(*operands.gates(G))
    check(operands.prepared, (*tokens(key), kept), "key kept")
    np.testing.assert_array_equal(operands.mild[0, 0, :, 0], [1, 0, 0])


@pytest.mark.parametrize(("segments", "forgets"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("reverse", [False, True])
def test_chunk_states(interpreted, operands, reverse, segments, forgets, monkeypatch):
    """The last of these forget all in each chunk but the first: what is before it in its segment need not be read."""
    monkeypatch.setattr(states, "SHORTEST_SEGMENT", pl.cdiv(N, segments))
    monkeypatch.setattr(states, "FEWEST_SEGMENTS", 2)
    heads_of_x = H if reverse else G
    x, key = operands.normal(B, T, heads_of_x, V), operands.normal(B, T, heads_of_x, M)
    kept = np.asarray(operands.rng.random((B, G, N, M)), np.float32)
    kept[:, :, 1:] *= 1e-36 if forgets else 1
    initial = operands.normal(B, heads_of_x, M, V, dtype=np.float32)
    other = operands.normal(B, G, N, M, V) if reverse else None
    with interpreted():
        before, last, *dots = states.chunk_states(x, key, kept, initial, other=other, reverse=reverse)
    direction = slice(None, None, -1 if reverse else 1)
    in_time = [by_chunks(x, heads_of_x), by_chunks(key, heads_of_x), per_head(kept, heads_of_x)]
    expected_before, expected_last = formulas.chunk_states(*(x[:, :, direction] for x in in_time), initial)
    expected_before = expected_before[:, :, direction]
    check((before, last), (expected_before, expected_last), "before last")
    if reverse:
        check([dots[0].sum(3)], [(expected_before * per_head(other, H)).sum(-1)], "dot")


@pytest.mark.parametrize("num_segments", [2, 3, 8, 13])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_between_segments(num_segments, reverse):
    rng = np.random.default_rng(0)
    initial = rng.standard_normal((2, 4, 1, 3, 5), np.float32)
    added = rng.standard_normal((2, 4, num_segments - 1, 3, 5), np.float32)
    kept = rng.choice([0, 0.5, 0.9, 1], (2, 2, num_segments, 3)).astype(np.float32)
    found = states._between_segments(added, kept, initial, reverse)
    in_time = slice(None, None, -1 if reverse else 1)
    factors, summands, expected = per_head(kept, 4)[:, :, in_time, :, None], added[:, :, in_time], [initial[:, :, 0]]
    for i in range(num_segments - 1):
        expected.append(factors[:, :, i] * expected[-1] + summands[:, :, i])
    assert_close({"states": found}, {"states": np.stack(expected, axis=2)[:, :, in_time]}, 1e-6)


def test_chunks_that_leave_nothing():
    kept = np.ones((1, 1, 3, 4, 2), np.float32)
    kept[0, 0, 0, 2] = 0, 1e-36  # all slots of the first segment forget in its third chunk, one of the second
    kept[0, 0, 1, 2, 0] = 0
    kept[0, 0, 2, :, 0], kept[0, 0, 2, 0, 1], kept[0, 0, 2, 3, 1] = 1e-12, 1e-20, 1e-20  # the third's by and by
    np.testing.assert_array_equal(states._forgotten(kept, reverse=False)[0, 0], [2, 0, 0])
    np.testing.assert_array_equal(states._forgotten(kept, reverse=True)[0, 0], [1, 0, 0])
    kept[0, 0, 2, 3, 1] = 1e-36
    np.testing.assert_array_equal(states._forgotten(kept, reverse=False)[0, 0], [2, 0, 1])
    kept[0, 0, 2, 3, 0] = 1e-36
    np.testing.assert_array_equal(states._forgotten(kept, reverse=False)[0, 0], [2, 0, 3])


@pytest.mark.parametrize(
    ("width", "slots", "options"),
    [
        (2 * SIZE, M, {"segments": 2, "states": True}),  # two warpgroups; more than cores may deadlock here
        (3 * SIZE, 2 * M, {"states": True}),  # one
        (2 * SIZE, 5 * M, {}),  # two, and slots in two groups
    ],
)
def test_memory_read(interpreted, operands, width, slots, options, monkeypatch):
    segments = options.pop("segments", 1)
    monkeypatch.setattr(states, "SHORTEST_SEGMENT", pl.cdiv(N, segments))
    monkeypatch.setattr(states, "FEWEST_SEGMENTS", 2)
    monkeypatch.setattr(memory_read_module, "FEWEST_PROGRAMS", 1)
    x, key = operands.normal(B, T, G, width), operands.normal(B, T, G, slots)
    kept = np.asarray(operands.rng.random((B, G, N, slots)), np.float32)
    initial = operands.normal(B, G, slots, width, dtype=np.float32)
    scores, reader = operands.scores_in_parts(), operands.normal(B, T, H, slots)
    with interpreted():
        results = memory_read(x, key, kept, initial, scores, reader, **options)
    arrays = *heads(x, key), per_head(kept, H), per_head(initial, H), sum(heads(*scores)), *heads(reader)
    out, *of_groups = formulas.memory_read(*arrays)
    expected = *tokens(out), *(state[:, :: H // G] for state in of_groups)
    check(results, expected[: len(results)], "out last states" if options else "out last")


@pytest.mark.parametrize("segments", [1, 2])
def test_key_read(interpreted, operands, segments, monkeypatch):
    monkeypatch.setattr(states, "SHORTEST_SEGMENT", pl.cdiv(N, segments))
    monkeypatch.setattr(states, "FEWEST_SEGMENTS", 2)
    monkeypatch.setattr(key_read_module, "WARPGROUPS", 2)  # more than cores may deadlock here
    monkeypatch.setattr(key_read_module, "BLOCK", 2 * SIZE)
    q, k, key = (operands.normal(B, T, heads, size) for heads, size in ((H, 4 * SIZE), (G, 4 * SIZE), (G, M)))
    kept = np.asarray(operands.rng.random((B, G, N, M)), np.float32)
    initial = operands.normal(B, G, M, 4 * SIZE, dtype=np.float32)
    with interpreted():
        products, last = key_read(q, k, key, kept, initial)
    before, expected_last = formulas.chunk_states(*heads(k, key), per_head(kept, H), per_head(initial, H))
    x, s = (np.einsum("...id,...jd->...ij", *pair) for pair in ((heads(q)[0], before), heads(q, k)))
    by_kind = np.asarray(products, np.float64).reshape(2, 3, *products.shape[1:]).sum(0)
    results = by_kind[0] + by_kind[1], by_kind[2], last
    check(results, (*tokens(x, s), expected_last[:, :: H // G]), "x s last")


def test_slot_softmax(interpreted, operands):
    q, k, keys = operands.normal(B, T, H, K), operands.normal(B, T, G, K), operands.normal(B, G, N, M, K)
    arguments = slots.multiplied(q, k, keys), operands.parts, operands.mild, operands.write
    options = {"scale": SCALE, "num_slots": NUM_SLOTS}
    with interpreted():
        results = slot_softmax(*arguments, residuals=True, **options)
        without = slot_softmax(*arguments, **options)
    expected = formulas.slot_softmax(*heads(q, k), *operands.gates(), per_head(keys, H), **options)
    *others, p = added(results, 1)
    check((*others, unpacked(p)), tokens(*expected), "reader value_scores qk before p")
    jax.tree.map(np.testing.assert_array_equal, tuple(without), tuple(results[:2]))


def test_slot_softmax_of_products(interpreted, operands):
    """As `key_read` leaves them: for both halves of the channels of the state, in two parts, and of the chunk."""
    q, k, keys = operands.normal(B, T, H, K), operands.normal(B, T, G, K), operands.normal(B, G, N, M, K)
    products = []
    for channels in slice(0, K // 2), slice(K // 2, K):
        states, x, y = per_head(keys, H)[..., channels], *heads(q[..., channels], k[..., channels])
        x, s = tokens(*(np.einsum("...id,...jd->...ij", x, other) for other in (states, y)))
        rounded = x.astype(operands.dtype)
        products += [rounded, (x - rounded).astype(operands.dtype), s.astype(operands.dtype)]
    options = {"scale": SCALE, "num_slots": NUM_SLOTS}
    with interpreted():
        source = slots.added(np.stack(products))
        results = slot_softmax(source, operands.parts, operands.mild, operands.write, **options)
    expected = formulas.slot_softmax(*heads(q, k), *operands.gates(), per_head(keys, H), **options)
    check(results, tokens(*expected)[:2], "reader value_scores")


def test_slot_softmax_backward(interpreted, operands):
    d_out, v, values = operands.normal(B, T, H, V), operands.normal(B, T, G, V), operands.normal(B, G, N, M, V)
    p = packed(operands.rng.dirichlet(np.ones(M), size=(B, T, H)), operands.dtype)
    gates = operands.parts, operands.mild, operands.write
    with interpreted():
        results = slot_softmax_backward(d_out, v, *gates, values, p, scale=SCALE)
    expected = formulas.slot_softmax_backward(
        *heads(d_out, v), *operands.gates(), per_head(values, H), *heads(unpacked(p)), scale=SCALE
    )
    check(added(results, 0), tokens(*expected), "key_scores d_scores key value d_before ds")


def test_write_backward(interpreted, operands):
    memories = [
        (operands.normal(B, T, G, D), operands.normal(B, T, H, D), *operands.scores_in_parts(), d_state)
        for D in (K, V)
        for d_state in [operands.normal(B, H, N, M, D)]
    ]
    key = operands.normal(B, T, G, M)
    with interpreted():
        results = write_backward(memories, key)
    expected = formulas.write_backward(
        [(*added(heads(*memory), 2), per_head(state, H)) for *memory, state in memories], *heads(key)
    )
    check(results, tokens(*expected), "d_key dk dv")


def test_gates_backward(interpreted, operands):
    reads = [(operands.scores(), operands.normal(B, T, H, M), operands.normal(B, T, H, M)) for _ in "kv"]
    p = packed(operands.rng.random((B, T, H, M)), operands.dtype)
    d_key, d_kept = operands.normal(B, T, H, M), operands.normal(B, H, N, M, dtype=np.float32)
    with interpreted():
        results = gates_backward(
            [reads[0], (*reads[1][:2], p)],
            operands.parts,
            operands.mild,
            operands.write,
            d_key,
            d_kept,
            out_dtype=operands.log_decay.dtype,
        )
    log_decay, write = operands.gates()
    write = None if operands.write is None else write
    reads[1] = (*reads[1][:2], unpacked(p))
    expected = formulas.gates_backward([heads(*read) for read in reads], log_decay, write, *heads(d_key), d_kept)
    check(results, tokens(*map(np.asarray, expected)), "d_log_decay" if write is None else "d_log_decay d_write")
