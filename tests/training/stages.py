"""A program that trains in stages, each on a mesh of its own, and writes down which rows every step got.

Takes the path of a file with a list of runs {"config": ..., "stages": [...], "first": step, "rows": path} and, for two
processes, a port and the number of the process. A stage has its "mesh", and "stop" if it breaks off before that step.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path
from unittest import mock

import jax

from gsa_jax.training import MeshConfig, TrainConfig, initialize_hosts, loop


class Broken(Exception):
    """The run breaks off."""


def train(config: TrainConfig, stop: int | None, rows: dict[int, list[str]], first: int) -> None:
    """Trains from step `first` on and notes in `rows` what each step gets on this host."""
    put_batch, step = loop.put_batch, first - 1

    def put_and_note(batch, mesh):
        nonlocal step
        if "target_bytes" not in batch:
            step += 1
            if step == stop:
                raise Broken
            rows[step] = [hashlib.md5(row.tobytes()).hexdigest() for row in batch["inputs"]]
        return put_batch(batch, mesh)

    size = math.prod(dataclasses.asdict(config.mesh).values())
    devices = jax.devices()[:size]
    with (
        mock.patch.object(loop, "put_batch", put_and_note),
        mock.patch.object(jax, "devices", lambda: devices),
        contextlib.suppress(Broken),
    ):
        loop.train(config, resume=first > 1)


def main(run: dict) -> None:
    """Trains through the stages of a run, each from the last checkpoint, and writes down the rows of this host."""
    config, rows, first = TrainConfig.from_json(json.dumps(run["config"])), {}, run["first"]
    for stage in run["stages"]:
        stop = stage.get("stop")
        train(dataclasses.replace(config, mesh=MeshConfig(**stage["mesh"])), stop, rows, first)
        first = stop and (stop - 1) // config.checkpoint_every * config.checkpoint_every + 1
    Path(f"{run['rows']}.{jax.process_index()}").write_text(json.dumps(rows))


if __name__ == "__main__":
    path, *host = sys.argv[1:]
    if host:
        initialize_hosts(f"localhost:{host[0]}", 2, int(host[1]))
    for run in json.loads(Path(path).read_text()):
        main(run)
