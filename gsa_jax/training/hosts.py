"""Several processes as one run: how they find each other, and what they tell each other outside of the training step.

A process is a "host" here, whatever the machine: with one process a GPU, as Slurm starts them, a machine has several.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gsa_jax.training.config import ConfigError, differences


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run, if there are any; call it before anything else that uses jax.

    Without arguments the run has several processes where `srun` started several tasks, and one elsewhere.

    Args:
      coordinator: "address:port" of process 0, as all processes reach it.
      num_processes: how many there are.
      process_id: which of them this is, from 0.

    Raises:
      ConfigError: some arguments are given and others are not, or they don't fit each other.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            jax.distributed.initialize()
        return
    if missing:
        raise ConfigError(f"{missing[0]}: not given, expected coordinator, num_processes and process_id together")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"process_id={process_id}: expected 0 <= process_id < num_processes={num_processes}")
    jax.distributed.initialize(coordinator, num_processes, process_id, cluster_detection_method="deactivate")


def gather(text: str) -> list[str]:
    """The texts that the hosts call this with, in the order of the hosts; all of them must call it."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    contents = multihost_utils.process_allgather(np.pad(content, (0, max(sizes) - len(content))))
    return [bytes(row[:size]).decode() for row, size in zip(contents, sizes, strict=True)]


def anywhere(flag: bool) -> bool:
    """Whether the flag is true on any host; all of them must call it."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def check_agreement(settings: dict[str, Any]) -> None:
    """Raises a ConfigError that names what differs, on all hosts, unless their settings, made of JSON, are the same."""
    for host, text in enumerate(gather(json.dumps(settings))):
        if texts := list(differences(json.loads(text), settings).values()):
            here = jax.process_index()
            raise ConfigError(f"the hosts disagree, host {host} (there) and host {here} (here): {'; '.join(texts[:3])}")


def together[Result](check: Callable[[], Result]) -> Result:
    """What `check` returns here; if it raises a ValueError or OSError on any host, all of them stop.

    Raises:
      ValueError, OSError: what `check` raised here.
      ConfigError: it raised on another host; the message says which and what.
    """
    try:
        result, problem = check(), None
    except (ValueError, OSError) as error:
        result, problem = None, error
    problems = gather(str(problem or ""))
    if problem:
        raise problem
    for host, text in enumerate(problems):
        if text:
            raise ConfigError(f"host {host}: {text}")
    return result


def rows_of_host(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the rows of a batch are dealt to `count` groups of hosts, and this host is in group `index`.

    Hosts are in one group if their devices have the same rows, as those that share one split by `tensor` or `context`.

    Raises:
      ConfigError: hosts that share a part of their rows.
    """
    data, fsdp, *_ = mesh.devices.shape
    rows_of: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(data * fsdp, -1)):
        for device in devices:
            rows_of.setdefault(device.process_index, set()).add(row)
    groups = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, groups)) != data * fsdp or len(set(map(len, groups))) > 1:
        raise ConfigError(
            f"mesh: data={data} x fsdp={fsdp} parts of the batch on {len(rows_of)} hosts make some share part of their "
            "rows, expected all or none: tensor x context must divide the devices of a host or be a multiple of them"
        )
    return groups.index(tuple(sorted(rows_of[jax.process_index()]))), len(groups)
