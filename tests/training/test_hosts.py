"""Two processes with four devices each as one run, and runs that go on with other devices than they began with."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gsa_jax.training import ConfigError, hosts, initialize_hosts, read_metrics
from gsa_jax.training.data import DataError, HostBatches
from gsa_jax.training.hosts import rows_of_host, together
from tests.training.tiny import run_config


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(command, devices, **environment):
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    environment = os.environ | flags | environment
    command = [sys.executable, "-m", *map(str, command)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(processes):
    """(exit code, what it said) of each."""
    said = ["".join(process.communicate(timeout=300)) for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def run_stages(file, *runs, hosts=1):
    """Runs what `tests.training.stages` takes on 8 devices; returns for each the rows that each step got, sorted."""
    file.write_text(json.dumps(runs))
    command, port = ["tests.training.stages", file], free_port()
    if hosts == 1:
        processes = [start(command, 8)]
    else:
        processes = [start([*command, port, host], 8 // hosts) for host in range(hosts)]
    for code, said in finish(processes):
        assert code == 0, said
    return [gather_rows(run["rows"], hosts) for run in runs]


def gather_rows(path, hosts):
    rows = [json.loads(Path(f"{path}.{host}").read_text()) for host in range(hosts)]
    return {int(step): sorted(sum((of_host[step] for of_host in rows), [])) for step in rows[0]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two streams, with their rows: one on 8 devices (two hosts), 2, 1 and 4, the other on one device."""
    folder = tmp_path_factory.mktemp("hosts")
    every = {"log_every": 1, "eval_every": 100, "checkpoint_every": 3}
    moved = run_config(folder, "moved", batch_size=8, eval_batches=None, **every)
    moved = dataclasses.replace(moved, data=dataclasses.replace(moved.data, streams=2))
    whole = dataclasses.replace(moved, run_dir=str(folder / "whole"))
    moved = dataclasses.replace(moved, accumulation=2)

    def run(name, config, *stages, first=1):
        config = json.loads(config.to_json())
        return {"config": config, "stages": stages, "first": first, "rows": str(folder / name)}

    begin = run("begin", moved, {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "stop": 5})
    stages = {"mesh": {"fsdp": 2}, "stop": 8}, {"mesh": {}, "stop": 11}, {"mesh": {"data": 2, "tensor": 2}}
    (rows,) = run_stages(folder / "begin.json", begin, hosts=2)
    later, unbroken = run_stages(
        folder / "later.json", run("later", moved, *stages, first=4), run("whole", whole, {"mesh": {}})
    )
    return moved, rows | later, whole, unbroken


def test_no_row_is_lost_or_read_twice_when_hosts_and_devices_change(runs):
    _, moved, _, whole = runs
    assert sorted(moved) == sorted(whole) == list(range(1, 13))
    assert moved == whole
    assert len({row for step in whole.values() for row in step}) == 12 * 8


def test_the_losses_are_those_of_one_device(runs):
    moved, whole = ({line["step"]: line for line in read_metrics(config.run_dir)} for config in (runs[0], runs[2]))
    assert [line["step"] for line in read_metrics(runs[0].run_dir)] == list(range(1, 13))  # one host writes
    for step in whole:
        assert moved[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-5)
    assert moved[12]["validation_loss"] == pytest.approx(whole[12]["validation_loss"], rel=1e-5)


def test_hosts_that_disagree_are_stopped_by_name_before_anything_is_written(tmp_path):
    config = run_config(tmp_path)
    common = ["experiments.language_model", "--data", config.data.path, "--run-dir", tmp_path / "run", "--steps", "4"]
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    tasks = [{"SLURM_PROCID": str(host), "SLURM_LOCALID": str(host)} for host in range(2)]
    arguments = [[*common, "--optimizer.b1", b1] for b1 in ("0.9", "0.95")]
    processes = [start(given, 1, **job, **task) for given, task in zip(arguments, tasks, strict=True)]
    for code, said in finish(processes):
        assert code == 2 and "Traceback" not in said, said
        assert "the hosts disagree" in said and "optimizer.b1 is 0.9" in said
    assert not (tmp_path / "run").exists()


def test_arguments_for_some_hosts_only_are_refused():
    with pytest.raises(ConfigError, match="process_id: not given, expected coordinator, num_processes and process_id"):
        initialize_hosts("localhost:1", 2)
    with pytest.raises(ConfigError, match="process_id=2: expected 0 <= process_id < num_processes=2"):
        initialize_hosts("localhost:1", 2, 2)


@pytest.mark.parametrize(
    ("sizes", "hosts", "expected"),
    [
        ((2, 2, 2, 1), 2, (0, 2)),
        ((1, 1, 4, 2), 2, (0, 1)),
        ((2, 1, 4, 1), 4, (0, 2)),
        ((8, 1, 1, 1), 1, (0, 1)),
    ],
)
def test_rows_are_dealt_to_groups_of_hosts(sizes, hosts, expected):
    assert rows_of_host(FakeMesh(sizes, hosts)) == expected


def test_hosts_that_share_some_rows_are_refused():
    with pytest.raises(ConfigError, match="data=3 x fsdp=1 parts of the batch on 2 hosts make some share part of"):
        rows_of_host(FakeMesh((3, 1, 2, 1), 2))


class FakeMesh:
    """What `rows_of_host` asks of a mesh, for devices dealt to hosts in order."""

    def __init__(self, sizes, hosts):
        devices = [SimpleNamespace(process_index=i * hosts // math.prod(sizes)) for i in range(math.prod(sizes))]
        self.devices = np.array(devices, object).reshape(sizes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return run_config(tmp_path_factory.mktemp("corpus")).data


@pytest.mark.parametrize(("streams", "hosts"), [(1, 2), (2, 4), (4, 2), (3, 2)])
def test_hosts_read_the_rows_of_one(corpus, streams, hosts):
    config = dataclasses.replace(corpus, streams=streams)
    sizes = {"batch_size": 12, "length": 16, "seed": 0, "corpus": config.open("train")}
    whole = HostBatches(config, host=0, hosts=1, **sizes)
    parts = [HostBatches(config, host=host, hosts=hosts, **sizes) for host in range(hosts)]
    for _ in range(2):
        rows = next(whole)["inputs"].tolist()
        assert rows == [row for part in parts for row in next(part)["inputs"].tolist()]
    resumed = HostBatches(config, host=0, hosts=1, **sizes)
    resumed.set_state({name: state for part in parts for name, state in part.get_state().items()})
    assert next(resumed)["inputs"].tolist() == next(whole)["inputs"].tolist()


def test_streams_that_do_not_divide_the_batch_are_refused(corpus):
    config = dataclasses.replace(corpus, streams=5)
    with pytest.raises(DataError, match="data.streams=5: expected a divisor of batch_size=12"):
        HostBatches(config, batch_size=12, length=16, seed=0, host=0, hosts=1, corpus=config.open("train"))


def test_a_mistake_on_one_host_stops_all(monkeypatch):
    assert together(lambda: 3) == 3
    monkeypatch.setattr(hosts, "gather", lambda text: [text, "/corpus: no such file"])
    with pytest.raises(ConfigError, match="host 1: /corpus: no such file"):
        together(lambda: 3)
    with pytest.raises(FileNotFoundError):
        together(lambda: os.stat("/no/such/file"))
