"""Trains one model on MQAR: the examples, the compiled functions, the loop."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.mqar.config import Config
from experiments.mqar.task import IGNORE, generate
from gsa_jax.models import LanguageModel, ModelConfig
from gsa_jax.training.step import compute_dtype

WEIGHT_DECAY = 0.1
SOLVED = 0.99
"""The test accuracy above which training stops."""
STEPS_A_REPORT = 10
"""How often the loss is fetched from the device."""


class Examples(NamedTuple):
    """MQAR examples, int32 arrays of as many rows; also a batch of them."""

    tokens: np.ndarray
    """[n, T]"""
    positions: np.ndarray
    """where the N queries of a row stand, ascending [n, N]"""
    answers: np.ndarray
    """the values asked for there [n, N]"""

    def take(self, rows: np.ndarray) -> "Examples":
        """The examples of those indices."""
        return Examples(*(array[rows] for array in self))


def make_examples(seed: int, num_examples: int, length: int, num_pairs: int, vocab_size: int) -> Examples:
    """Examples of `experiments.mqar.task.generate`, with the positions without a loss left out of the targets."""
    tokens, targets = generate(seed, num_examples, length, num_pairs, vocab_size=vocab_size)
    rows, positions = np.nonzero(targets != IGNORE)
    shape = (num_examples, num_pairs)
    return Examples(tokens, positions.astype(np.int32).reshape(shape), targets[rows, positions].reshape(shape))


class TrainState(NamedTuple):
    """What a step changes."""

    params: nnx.State
    opt_state: Any


class Functions(NamedTuple):
    """A model's compiled functions, the same for every learning rate."""

    init: Callable[[int], TrainState]
    """seed -> the first state"""
    train_step: Callable[[TrainState, Examples, float], tuple[TrainState, jax.Array]]
    """(state, batch, learning rate) -> (the next state, loss in nats a query); the old state is given up"""
    count_right: Callable[[nnx.State, Examples], jax.Array]
    """(parameters, batch) -> how many queries are answered right"""


def make_functions(config: ModelConfig) -> Functions:
    """Compiles lazily; computes in bfloat16 on accelerators and in float32 on the CPU.

    The optimizer is AdamW on all parameters. Its step is proportional to the learning rate, which is therefore an
    argument of the compiled step and not a part of it.
    """
    dtype = compute_dtype("auto")
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, dtype=dtype, rngs=nnx.Rngs(0))))
    optimizer = optax.adamw(1.0, weight_decay=WEIGHT_DECAY)

    def init(seed):
        params = nnx.state(LanguageModel(config, rngs=nnx.Rngs(jax.random.key(seed))))
        return TrainState(params, optimizer.init(params))

    def loss(params, batch):
        logits = query_logits(nnx.merge(graphdef, params), batch)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers))

    def train_step(state, batch, learning_rate):
        value, grads = jax.value_and_grad(loss)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda update: learning_rate * update, updates)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

    def count_right(params, batch):
        return num_right(query_logits(nnx.merge(graphdef, params), batch), batch.answers)

    return Functions(jax.jit(init), jax.jit(train_step, donate_argnums=0), jax.jit(count_right))


def query_logits(model: LanguageModel, batch: Examples) -> jax.Array:
    """The model's logits at the queries alone, float32 [B, N, vocab]: no other position carries a loss."""
    hidden, _ = model.hidden(batch.tokens)
    return model.logits(jnp.take_along_axis(hidden, batch.positions[..., None], axis=1))


def num_right(logits: jax.Array, answers: jax.Array) -> jax.Array:
    """How many queries have their largest logit at the answer: [B, N, vocab], [B, N] -> int32 scalar."""
    return jnp.sum(jnp.argmax(logits, axis=-1) == answers, dtype=jnp.int32)


def accuracy(functions: Functions, params: nnx.State, examples: Examples, batch_size: int) -> float:
    """The share of all queries that are answered right."""
    batches = in_batches(np.arange(len(examples.tokens)), batch_size)
    right = [functions.count_right(params, examples.take(rows)) for rows in batches]
    return int(sum(right)) / examples.answers.size


class Report(NamedTuple):
    """Where a training stands."""

    step: int
    """steps done"""
    num_steps: int
    """steps that all epochs take"""
    learning_rate: float
    """of the last step"""
    loss: float
    """mean over the steps since the report before, nats a query"""
    accuracy: float | None
    """share of the test set's queries that are answered right; None between tests"""
    examples_per_second: float
    """of the steps since the report before, without the test"""
    seconds: float
    """since the start, compilation and tests included"""


def train(
    functions: Functions,
    train_set: Examples,
    test_set: Examples,
    config: Config,
    learning_rate: float,
) -> Iterator[Report]:
    """Trains through all epochs, or until the test accuracy is above `SOLVED`, or until the loss is not finite.

    Each epoch goes through the shuffled training set once, its last batch being what is left over; the learning rate
    is that of `rate_of_epoch`. A test follows every `config.steps_a_test` steps (None: every epoch) and the last step.
    """
    began = time.perf_counter()
    state = functions.init(config.seed)
    rng = np.random.default_rng(config.seed)
    steps_an_epoch = -(-len(train_set.tokens) // config.batch_size)
    steps_a_test = config.steps_a_test or steps_an_epoch
    num_steps = config.epochs * steps_an_epoch
    step, num_examples, losses, resumed = 0, 0, [], began
    for epoch in range(config.epochs):
        rate = rate_of_epoch(learning_rate, epoch, config.epochs)
        for rows in in_batches(rng.permutation(len(train_set.tokens)), config.batch_size):
            state, loss = functions.train_step(state, train_set.take(rows), rate)
            step, num_examples = step + 1, num_examples + len(rows)
            losses.append(loss)
            is_test = step == num_steps or step % steps_a_test == 0
            if not is_test and step % STEPS_A_REPORT and step > 1:  # the first step, which compiles, stands alone
                continue
            mean_loss = float(np.mean(jax.device_get(losses)))
            speed = num_examples / (time.perf_counter() - resumed)
            result = accuracy(functions, state.params, test_set, config.batch_size) if is_test else None
            yield Report(step, num_steps, rate, mean_loss, result, speed, time.perf_counter() - began)
            if not np.isfinite(mean_loss) or (result is not None and result > SOLVED):
                return
            num_examples, losses, resumed = 0, [], time.perf_counter()


def rate_of_epoch(peak: float, epoch: int, epochs: int) -> float:
    """The learning rate of epoch 0 .. epochs - 1: a cosine from the peak that would reach 0 with one epoch more."""
    return float(peak * (1 + np.cos(np.pi * epoch / epochs)) / 2)


def in_batches(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cuts indices into batches, the last one of what is left over."""
    return np.split(rows, range(batch_size, len(rows), batch_size))
