"""Checkpoints of a run: saved in the background, the newest few kept, the last good one found."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from gsa_jax.models import LanguageModel, abstract_model
from gsa_jax.training.config import TrainConfig, differences
from gsa_jax.training.hosts import anywhere
from gsa_jax.training.sharding import is_variable
from gsa_jax.training.step import TrainState, compute_dtype


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: none is there, none can be read, or it is of another model."""


class Checkpoints:
    """The checkpoints of a run, `directory/<step>/`; a context manager that waits for what is being saved.

    A checkpoint appears under its name when it is complete, so one that was interrupted is never taken for good. Its
    parts: `params`, a nested dict by the modules' names; `training`, the optimizer's state and the step; `data`, the
    state of the data iterator of every host; and the config, as metadata.
    """

    def __init__(self, directory: Path | str, config: TrainConfig, *, cleanup: bool = False):
        """Opens, or creates, the folder of a run with these settings, of which `keep` says how many stay.

        `cleanup` removes what interrupted saves have left; it is for the one process that saves.
        """
        self._config = json.loads(config.to_json())
        self._checkpointer = ocp.training.Checkpointer(
            Path(directory).absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
            cleanup_tmp_directories=cleanup,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending; waits for the one that is being written."""
        self._checkpointer.wait()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, state: TrainState, data: Any) -> None:
        """Copies the state off the devices and goes on writing in the background; waits for the save before it.

        Args:
          state: the state after its step.
          data: the iterator that gave its batches, with grain's get_state.
        """
        self._checkpointer.save_checkpointables_async(
            int(state.step),
            {**_parts(state), "data": data},
            force=True,
            custom_metadata={"config": self._config},
        )

    def restore(self, like: TrainState, data: Any) -> TrainState | None:
        """The newest state that can be read, placed on the devices; None if there are no checkpoints.

        Checkpoints that cannot be read are passed over with a warning, and renamed out of the way.

        Args:
          like: the state's shapes, dtypes and shardings, see `init_state`.
          data: an iterator like the one that was saved; it goes on where that one was.

        Raises:
          CheckpointError: it is of another model, which names the first arrays that differ; none can be read.
        """
        if not self.steps:
            return None
        _, loaded, unreadable = self._load_newest({**_parts(like), "data": data})
        for step in unreadable if jax.process_index() == 0 else ():
            path = Path(self._checkpointer.directory) / str(step)
            path.rename(path.with_name(f"{step}.unreadable"))
        anywhere(bool(unreadable))  # all hosts see the folder as the first one leaves it
        self._checkpointer.reload()
        leaves = jax.tree.leaves((loaded["training"]["step"], loaded["params"], loaded["training"]["opt_state"]))
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def restore_params(self, like: nnx.State) -> tuple[int, nnx.State]:
        """The step and the parameters of the newest checkpoint that can be read; arguments and errors as `restore`."""
        if not self.steps:
            raise CheckpointError(f"{self._checkpointer.directory}: there are no checkpoints")
        step, loaded, _ = self._load_newest({"params": _names_and_arrays(like)})
        return step, jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(loaded))

    def _load_newest(self, parts: dict[str, Any]) -> tuple[int, dict[str, Any], list[int]]:
        """Step and parts of the newest checkpoint that all hosts can read, and the steps of the others after it."""
        unreadable = []
        for step in reversed(self.steps):
            loaded, error = self._load(step, parts)
            if not anywhere(error is not None):
                return step, loaded, unreadable
            self._check_same_arrays(step, parts)
            unreadable.append(step)
            cause = _root_cause(error) if error else "by another host"
            reason = f"{self._checkpointer.directory}/{step} cannot be read: {cause}"
            warnings.warn(reason, stacklevel=4)
        raise CheckpointError(f"none of the {len(unreadable)} checkpoints can be read; the oldest: {reason}")

    def _load(self, step: int, parts: dict[str, Any]) -> tuple[dict[str, Any] | None, Exception | None]:
        """The parts of that checkpoint, or what is wrong with its files. A want of memory is not."""
        try:
            return self._checkpointer.load_checkpointables(step, parts), None
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # whatever a damaged file, or another model, leads to
            return None, error

    def _check_same_arrays(self, step: int, parts: dict[str, Any]) -> None:
        """Raises CheckpointError if the checkpoint says that its arrays have other names or shapes than `parts`."""
        stored = self._checkpointer.checkpointables_metadata(step)
        arrays = [name for name in ("params", "training") if name in parts and stored.metadata.get(name)]
        there = dict(_shapes({name: stored.metadata[name] for name in arrays}))
        here = dict(_shapes({name: parts[name] for name in arrays}))
        differing = [name for name in here | there if here.get(name) != there.get(name)]
        if not differing:
            return
        fields = differences((stored.custom_metadata or {}).get("config", self._config), self._config)
        texts = [text for name, text in fields.items() if name.startswith("model.")]
        texts += [
            f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here" for name in differing
        ]
        more = f", and {len(texts) - 3} more" if len(texts) > 3 else ""
        raise CheckpointError(
            f"{self._checkpointer.directory}/{step} is of another model: {'; '.join(texts[:3])}{more}"
        )


def load_model(run_dir: Path | str) -> tuple[LanguageModel, TrainConfig, int]:
    """The trained model of a run folder on one device, the run's config, and the step of the checkpoint.

    The model computes in the dtype that the config asks for on this machine. Of several hosts all must call this.

    Raises:
      CheckpointError: no run there, or no readable checkpoint in it.
      ConfigError: its config.json can't be read.
    """
    file = Path(run_dir) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{run_dir}: expected the folder of a run, there is no config.json")
    if not file.with_name("checkpoints").is_dir():
        raise CheckpointError(f"{run_dir}: expected the folder of a run, there are no checkpoints")
    config = TrainConfig.read(file)
    graphdef, params = nnx.split(abstract_model(config.model, dtype=compute_dtype(config.dtype)))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params)
    with Checkpoints(Path(run_dir) / "checkpoints", config) as checkpoints:
        step, params = checkpoints.restore_params(like)
    return nnx.merge(graphdef, params), config, step


def _parts(state: TrainState) -> dict[str, Any]:
    state = _names_and_arrays(state)
    return {"params": state.params, "training": {"opt_state": state.opt_state, "step": state.step}}


def _names_and_arrays(tree: Any) -> Any:
    """The tree with its nnx variables replaced by their arrays, so that no "value" stands in their names."""
    return jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, tree, is_leaf=is_variable)


def _shapes(tree: Any) -> Iterator[tuple[str, str]]:
    """(name, "float32[2,3]") of every array or description of one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield name, f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _root_cause(error: BaseException) -> str:
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
