import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax.training import (
    CheckpointError,
    Checkpoints,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    TrainState,
    checkpoint,
    load_model,
    make_mesh,
    make_optimizer,
    shardings,
)
from gsa_jax.training.data import HostBatches
from tests.training.tiny import run_config


def make_state(step: int, width: int = 3) -> TrainState:
    """A state of two parameters whose numbers tell the step."""
    params = nnx.State(
        {
            "mlp": nnx.State({"kernel": nnx.Param(jnp.full((4, width), step, jnp.float32), axes=("embed", "mlp"))}),
            "norm": nnx.Param(jnp.full(4, -step, jnp.float32), axes=(None,)),
        }
    )
    return TrainState(jnp.int32(step), params, make_optimizer(OptimizerConfig(), steps=10).init(params))


def abstract(state: TrainState) -> TrainState:
    placed = shardings(state, make_mesh(MeshConfig()))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)


def make_data(config: TrainConfig):
    corpus = config.data.open("train")
    return HostBatches(config.data, batch_size=2, length=16, seed=0, host=0, hosts=1, corpus=corpus)


def equal(x: TrainState, y: TrainState) -> bool:
    return jax.tree.structure(x) == jax.tree.structure(y) and all(
        map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(y))
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return run_config(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 3, of which 1 went, and the batches that come after 2 and 3."""
    folder, data, following = tmp_path_factory.mktemp("saved"), make_data(config), {}
    with Checkpoints(folder, config) as checkpoints:
        for step in (1, 2, 3):
            following[step] = next(data)["inputs"]
            checkpoints.save(make_state(step), data)
        following = {2: following[3], 3: next(data)["inputs"]}
    return folder, following


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))


def test_the_newest_is_restored_where_it_is_asked_for_and_the_data_goes_on(folder, saved, config):
    data, like = make_data(config), abstract(make_state(0))
    with Checkpoints(folder, config) as checkpoints:
        assert checkpoints.steps == [2, 3]
        state = checkpoints.restore(like, data)
    assert equal(state, make_state(3))
    assert jax.tree.all(jax.tree.map(lambda x, asked: x.sharding == asked.sharding, state, like))
    assert state.params["norm"].get_metadata()["axes"] == (None,)
    np.testing.assert_array_equal(next(data)["inputs"], saved[1][3])


def test_parameters_are_stored_by_the_names_of_modules(folder):
    names = json.loads((folder / "3" / "params" / "_METADATA").read_text())["tree_metadata"]
    assert set(names) == {"('mlp', 'kernel')", "('norm',)"}


def test_a_new_folder_has_no_checkpoints(tmp_path, config):
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.steps == [] and checkpoints.restore(abstract(make_state(0)), make_data(config)) is None


@pytest.mark.filterwarnings("ignore:.*cannot be read", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"", None])
def test_the_last_good_one_is_found_behind_a_damaged_one(folder, saved, config, damage):
    found = {2: [], 3: []}
    for file in [path.relative_to(folder) for path in (folder / "3").rglob("*") if path.is_file()]:
        shutil.rmtree(folder)
        shutil.copytree(saved[0], folder)
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        if damage:
            (folder / file).write_bytes(damage(content))
        data = make_data(config)
        with Checkpoints(folder, config) as checkpoints:
            state = checkpoints.restore(abstract(make_state(0)), data)
            step = int(state.step)
            assert checkpoints.steps == ([2] if step == 2 else [2, 3])
        assert equal(state, make_state(step))
        np.testing.assert_array_equal(next(data)["inputs"], saved[1][step])
        assert (folder / "3.unreadable").is_dir() == (step == 2)
        found[step].append(str(file))
    for part in ("params/manifest.ocdbt", "training/manifest.ocdbt", "params/_METADATA", "params/d/", "data/host"):
        assert any(part in file for file in found[2]), found


def test_reading_leaves_what_is_being_written_alone(folder, config):
    being_written = folder / "4.orbax-checkpoint-tmp"
    shutil.copytree(folder / "3", being_written, ignore=shutil.ignore_patterns("commit_success.txt"))
    with Checkpoints(folder, config) as checkpoints:
        assert checkpoints.steps == [2, 3]
    assert being_written.is_dir()
    with Checkpoints(folder, config, cleanup=True) as checkpoints:
        checkpoints.save(make_state(5), make_data(config))  # waits for the cleaning, which goes on in the background
        assert checkpoints.steps == [3, 5]
    assert not being_written.exists()


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_it_says_so_when_none_is_good_and_changes_nothing(folder, config):
    for step in (2, 3):
        (folder / str(step) / "params" / "manifest.ocdbt").write_bytes(b"")
    with Checkpoints(folder, config) as checkpoints:
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints can be read; the oldest: .*/2 cannot"):
            checkpoints.restore(abstract(make_state(0)), make_data(config))
        assert checkpoints.steps == [2, 3]


def test_a_want_of_memory_condemns_no_checkpoint(folder, config, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with Checkpoints(folder, config) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", exhausted)
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            checkpoints.restore(abstract(make_state(0)), make_data(config))
        assert checkpoints.steps == [2, 3]


@pytest.mark.filterwarnings("ignore:.*another host")
def test_what_another_host_cannot_read_none_takes(folder, config, monkeypatch):
    answers = iter([True, False, False])
    monkeypatch.setattr(checkpoint, "anywhere", lambda here: next(answers))
    with Checkpoints(folder, config) as checkpoints:
        assert int(checkpoints.restore(abstract(make_state(0)), make_data(config)).step) == 2


def test_a_checkpoint_of_another_model_names_what_differs(folder, config):
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_size=77))
    expected = (
        r"/3 is of another model: model.mlp_size is 32 there and 77 here; "
        r"params/mlp/kernel is float32\[4,3\] there and float32\[4,5\] here; .*, and 1 more$"
    )
    with Checkpoints(folder, other) as checkpoints, pytest.raises(CheckpointError, match=expected):
        checkpoints.restore(abstract(make_state(0, width=5)), make_data(config))


def test_missing_and_additional_arrays_are_named(folder, config):
    like = abstract(make_state(0))
    del like.params["norm"]
    like.params["head"] = like.params["mlp"]["kernel"]
    with Checkpoints(folder, config) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(like, make_data(config))
    assert "params/norm is float32[4] there and missing here" in str(error.value)
    assert "params/head is missing there and float32[4,3] here" in str(error.value)


@pytest.mark.parametrize("missing", ["", "nothing"])
def test_a_folder_that_is_no_run_has_no_model(tmp_path, missing):
    with pytest.raises(CheckpointError, match="expected the folder of a run"):
        load_model(tmp_path / missing)


def test_a_run_without_checkpoints_has_no_model(tmp_path, config):
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(CheckpointError, match="there are no checkpoints"):
        load_model(tmp_path)
