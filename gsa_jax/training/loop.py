"""The training loop."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gsa_jax.models import abstract_model, count_parameters
from gsa_jax.training.checkpoint import Checkpoints
from gsa_jax.training.compiler import compiler_options
from gsa_jax.training.config import ConfigError, TrainConfig, differences
from gsa_jax.training.data import Batch, Corpus, DataError, HostBatches, load_tokenizer, validation_batches
from gsa_jax.training.hosts import anywhere, check_agreement, rows_of_host, together
from gsa_jax.training.metrics import Console, MetricsLog, describe, plot_curves, read_metrics, speed
from gsa_jax.training.optimizer import make_optimizer, make_schedule
from gsa_jax.training.sharding import make_mesh, put_batch
from gsa_jax.training.step import (
    TrainState,
    compute_dtype,
    create_and_compile,
    init_state,
    loss_sum,
    make_eval_step,
    make_train_step,
)


class NonFiniteError(FloatingPointError):
    """The loss or the gradient became infinite or NaN; the message says at which step."""


@dataclasses.dataclass(frozen=True)
class TrainSummary:
    """How a run ended."""

    run_dir: Path
    """its folder"""
    step: int
    """steps done"""
    metrics: dict[str, float]
    """the last line of metrics.jsonl: step, loss, validation_bits_per_byte and so on"""
    interrupted: str | None
    """what ended it before its last step, "SIGTERM", "SIGINT" or a signal to another host; its checkpoint is saved"""
    skipped: list[str]
    """messages of the bad documents that were left out"""


def train(config: TrainConfig, *, resume: bool = False) -> TrainSummary:
    """Trains a language model and leaves config, checkpoints, metrics and a plot in `config.run_dir`.

    A resumed run goes on from its last good checkpoint and gives the numbers, to the bit, of one that was never
    interrupted; on GPUs, where XLA picks kernels by timing them, only under XLA_FLAGS=--xla_gpu_deterministic_ops=true.
    On SIGTERM or SIGINT the run finishes its step, saves, and returns: nothing is lost, so a script may exit with 0. A
    second signal acts as it would without this function.

    Args:
      config: the run. To resume one, model, data (but for skip_bad), batch_size, length and seed must be what they
        were; the rest may change.
      resume: go on with the run in `config.run_dir`.

    Raises:
      ConfigError: the folder holds something and `resume` is not asked for, or holds no run and it is; settings that
        don't fit each other, the devices or the run to be resumed.
      DataError: a corpus or tokenizer that can't be used.
      CheckpointError: the run's checkpoints can't be read or are of another model.
      NonFiniteError: the loss or the gradient is not finite; the last good checkpoint is untouched.
    """
    run_dir = Path(config.run_dir)
    check_agreement(json.loads(config.to_json()) | {"resume": resume, "jax": jax.__version__})
    mesh, corpus, held_out, batches, validation = together(functools.partial(_prepare, config, resume))
    _write_config(run_dir, config)
    with Checkpoints(run_dir / "checkpoints", config, cleanup=True) as checkpoints, jax.set_mesh(mesh):
        step, interrupted = _run(config, resume, mesh, checkpoints, batches, validation)
    if jax.process_index() == 0:
        plot_curves(run_dir)
    metrics = next(reversed(read_metrics(run_dir)), {})
    return TrainSummary(run_dir, step, metrics, interrupted, corpus.skipped + held_out.skipped)


def _prepare(
    config: TrainConfig, resume: bool
) -> tuple[Mesh, Corpus, Corpus, HostBatches, Callable[[], Iterator[Batch]]]:
    """The mesh, the corpora and this host's batches, once all that can be checked without compiling is."""
    mesh = make_mesh(config.mesh)
    host, hosts = rows_of_host(mesh)
    _check_model(config, mesh)
    _check_run_dir(Path(config.run_dir), config, resume)
    corpus, held_out = config.data.open("train"), config.data.open("validation")
    if not any(map(len, held_out)):
        if not any(map(len, corpus)):
            raise DataError(f"data.path={config.data.path!r}: there is no text in it, expected some")
        raise DataError(
            f"data.validation_fraction={config.data.validation_fraction}: there is no text in the validation split of "
            f"data.path={config.data.path!r}, expected a larger fraction"
        )
    sizes = {"length": config.length, "batch_size": config.batch_size}
    batches = HostBatches(config.data, seed=config.seed, host=host, hosts=hosts, corpus=corpus, **sizes)
    sizes["batch_size"] //= hosts * config.parts
    validation = functools.partial(
        validation_batches, config.data, shard_index=host, shard_count=hosts, corpus=held_out, **sizes
    )
    return mesh, corpus, held_out, batches, validation


def _run(
    config: TrainConfig,
    resume: bool,
    mesh: Mesh,
    checkpoints: Checkpoints,
    batches: HostBatches,
    validation: Callable[[], Iterator[Batch]],
) -> tuple[int, str | None]:
    """Trains from the last checkpoint, or the beginning, to the last step or a signal; returns the step and signal."""
    graphdef, _ = nnx.split(abstract_model(config.model, dtype=compute_dtype(config.dtype)))
    optimizer = make_optimizer(config.optimizer, config.steps)
    create, like = init_state(config.model, optimizer, mesh, config.seed)
    restored = checkpoints.restore(like, batches)
    step = first = int(restored.step) if restored else 0
    eval_step = jax.jit(make_eval_step(graphdef))
    with (
        Console() as console,
        MetricsLog(Path(config.run_dir), after_step=first, tensorboard=config.tensorboard) as log,
        _stop_signals() as signals,
    ):
        console.start(_description(config, mesh) + f", resumed at step {first}" * resume)
        schedule = make_schedule(config.optimizer, config.steps)
        train_step = make_train_step(graphdef, optimizer, schedule, config.parts)
        make = (lambda: restored) if restored else create
        batch_shape, options = (config.batch_size, config.length), compiler_options(config.model, mesh.size)
        state, train_step = create_and_compile(make, train_step, like, batch_shape, mesh, options)
        parts = config.eval_batches and config.eval_batches * config.parts

        def validate(state):
            return evaluate(eval_step, state, itertools.islice(validation(), parts), mesh)

        if step == config.steps and not _validated(Path(config.run_dir), step):
            log.write(step, validate(state))
        begin = time.perf_counter()
        window, window_begin = [], begin
        while step < config.steps:
            state, metrics = train_step(state, put_batch(next(batches), mesh))
            window.append(metrics)
            step += 1
            last = step == config.steps
            evaluating = last or step % config.eval_every == 0
            saving = last or step % config.checkpoint_every == 0
            due = evaluating or saving or step % config.log_every == 0
            stop = (due or jax.process_count() == 1) and anywhere(bool(signals))  # hosts ask each other at times only
            if not (due or stop):
                continue

            window = jax.device_get(window)
            _check_finite(window, step, checkpoints)
            tokens, seconds = sum(int(metrics["tokens"]) for metrics in window), time.perf_counter() - window_begin
            values = _summarize(window) | speed(config.model, mesh, tokens / seconds)
            if evaluating:
                values |= validate(state)
            log.write(step, values)
            seconds_left = (time.perf_counter() - begin) / (step - first) * (config.steps - step)
            stays = evaluating or not console.is_terminal
            console.step(step, config.steps, describe(values), seconds_left, stays=stays)
            if saving or stop:
                checkpoints.save(state, batches)
            if stop:
                break
            window, window_begin = [], time.perf_counter()
    interrupted = signals[0] if signals else "a signal to another host"
    return step, interrupted if step < config.steps else None


def evaluate(eval_step: Callable, state: TrainState, batches: Iterable[Batch], mesh: Mesh) -> dict[str, float]:
    """The validation loss in nats per token and in bits per byte of text, over all `batches`."""
    sums = [eval_step(state.params, put_batch(batch, mesh)) for batch in batches]
    totals = {name: sum(float(batch[name]) for batch in sums) for name in ("nll", "tokens", "bytes")}
    return {
        "validation_loss": totals["nll"] / totals["tokens"],
        "validation_bits_per_byte": totals["nll"] / math.log(2) / totals["bytes"],
    }


def _validated(run_dir: Path, step: int) -> bool:
    """Whether the metrics of a run tell how good it was at that step."""
    return any("validation_loss" in line for line in read_metrics(run_dir) if line["step"] == step)


def _check_finite(window: list[dict[str, np.ndarray]], step: int, checkpoints: Checkpoints) -> None:
    """Raises NonFiniteError for the first bad one of the steps up to `step`, whose metrics are `window`."""
    for i, metrics in enumerate(window, step - len(window) + 1):
        if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
            continue
        saved = f"the last checkpoint is that of step {checkpoints.steps[-1]}" if checkpoints.steps else "none is saved"
        raise NonFiniteError(
            f"step {i}: the loss is {metrics['loss']} and the norm of its gradient {metrics['grad_norm']}; {saved}"
        )


def _summarize(window: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The mean loss over the tokens of some steps, the last gradient norm and learning rate."""
    losses, tokens = ([float(metrics[name]) for metrics in window] for name in ("loss", "tokens"))
    return {
        "loss": float(np.average(losses, weights=tokens)),
        "grad_norm": float(window[-1]["grad_norm"]),
        "learning_rate": float(window[-1]["learning_rate"]),
    }


def _description(config: TrainConfig, mesh: Mesh) -> str:
    parameters, _ = count_parameters(config.model)
    device = mesh.devices.flat[0].device_kind
    return (
        f"{config.run_dir}: {parameters:,} parameters, {config.batch_size} x {config.length} tokens a step, "
        f"{compute_dtype(config.dtype)} on {mesh.size} x {device}"
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Gathers the names of SIGTERM and SIGINT in a list, the first one; the second acts as if this were not here."""
    signals: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number, _):
        signals.append(signal.Signals(number).name)
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield signals
    finally:
        restore()


# Checks


def _check_model(config: TrainConfig, mesh: Mesh) -> None:
    """Raises where the model does not fit its tokens, itself or the devices, as tracing its loss finds out."""
    tokens = jax.ShapeDtypeStruct((config.batch_size // config.parts, config.length), np.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), tokens)
    try:
        graphdef, params = nnx.split(abstract_model(config.model, dtype=compute_dtype(config.dtype)))
        with jax.set_mesh(mesh):
            jax.eval_shape(functools.partial(loss_sum, graphdef), params, batch)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: expected at least {tokenizer.vocab_size}, the tokens of "
            f"data.tokenizer={config.data.tokenizer!r}"
        )


def _check_run_dir(run_dir: Path, config: TrainConfig, resume: bool) -> None:
    """Refuses to overwrite anything, and to resume a run with settings that its checkpoints don't fit."""
    stored = run_dir / "config.json"
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={config.run_dir!r}: is a file, expected a folder")
    if not resume:
        if jax.process_index() == 0 and run_dir.exists() and any(run_dir.iterdir()):
            raise ConfigError(
                f"run_dir={config.run_dir!r}: not empty, and is not overwritten; resume it or name another"
            )
        return
    if not stored.is_file():
        raise ConfigError(f"run_dir={config.run_dir!r}: there is no run to resume, expected a config.json")
    earlier = TrainConfig.read(stored)
    saved = [int(folder.name) for folder in (run_dir / "checkpoints").glob("[0-9]*") if folder.name.isdigit()]
    logged = next(reversed(read_metrics(run_dir)), {"step": 0})["step"]
    if not saved and logged >= 2 * earlier.checkpoint_every:  # one more may have been on its way
        raise ConfigError(
            f"run_dir={config.run_dir!r}: the metrics reach step {logged}, and there is no checkpoint to go on from; "
            f"expected those of every {earlier.checkpoint_every} steps in {run_dir / 'checkpoints'}"
        )
    done = max(saved, default=logged)
    if config.steps < done:
        raise ConfigError(f"steps={config.steps}: the run has come to step {done}, expected at least as many")
    changed = differences(*(json.loads(settings.to_json()) for settings in (earlier, config)))
    fixed = [text for name, text in changed.items() if name.split(".")[0] in _FIXED and name not in _FREE]
    if fixed:
        raise ConfigError(f"run_dir={config.run_dir!r}: can't be resumed with other settings: {'; '.join(fixed[:3])}")


_FIXED = ("model", "data", "batch_size", "length", "seed")
"""The settings that must stay when a run is resumed: what its parameters and its place in the data mean."""

_FREE = ("data.skip_bad",)
"""Those of them that need not: a run that came to a bad document may go on without it."""


def _write_config(run_dir: Path, config: TrainConfig) -> None:
    if jax.process_index() > 0:
        return
    try:
        config.write(run_dir / "config.json")
    except OSError as error:
        raise ConfigError(
            f"run_dir={config.run_dir!r}: can't be written ({error}), expected a folder that can"
        ) from error
