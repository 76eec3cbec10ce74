"""A host's part of every training batch, in an order and with a state that do not depend on the number of hosts."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gsa_jax.training.data.corpus import Corpus, DataError
from gsa_jax.training.data.pipeline import Batch, DataConfig, training_batches


class HostBatches(Iterator[Batch]):
    """This host's rows of every batch.

    The rows of a batch come in equal parts from `config.streams` streams of documents, which are read by whichever
    hosts have their rows. The state is that of the streams, so that other hosts, more or fewer, can go on with it: what
    `gsa_jax.training.Checkpoints` saves (orbax' `StatefulCheckpointable`) is a file a host with the streams it read.
    """

    def __init__(
        self, config: DataConfig, *, batch_size: int, length: int, seed: int, host: int, hosts: int, corpus: Corpus
    ):
        """Rows `host` · batch_size / hosts on, of every batch of all hosts.

        Raises:
          DataError: `hosts` or `config.streams` does not divide the batch; what `training_batches` raises.
        """
        for name, parts in (("data.streams", config.streams), ("hosts", hosts)):
            if batch_size % parts:
                raise DataError(f"{name}={parts}: expected a divisor of batch_size={batch_size}")
        if config.streams > len(corpus):
            raise DataError(f"data.streams={config.streams}: expected at most one for each of {len(corpus)} documents")
        rows = batch_size // config.streams
        begin, end = (index * batch_size // hosts for index in (host, host + 1))
        self._streams = {
            index: training_batches(
                config,
                batch_size=rows,
                length=length,
                seed=seed,
                shard_index=index,
                shard_count=config.streams,
                corpus=corpus,
            )
            for index in range(begin // rows, -(-end // rows))
        }
        self._rows = slice(begin - begin // rows * rows, end - begin // rows * rows)

    def __next__(self) -> Batch:
        parts = [next(stream) for stream in self._streams.values()]
        return {name: np.concatenate([part[name] for part in parts])[self._rows] for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """The states of the streams that this host reads, by their numbers; survives JSON."""
        return {str(index): stream.get_state() for index, stream in self._streams.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where the streams were; there may be more of them in `state`."""
        for index, stream in self._streams.items():
            stream.set_state(state[str(index)])

    async def save(self, directory):
        """Called by orbax on every host: takes the state now and gives what writes it in the background."""
        state = json.dumps(self.get_state())

        async def write():
            path = await directory.await_creation()
            await asyncio.to_thread((path / f"host_{jax.process_index()}.json").write_text, state)

        return write()

    async def load(self, directory):
        """Called by orbax on every host: gives what reads the state of all hosts and sets this one's."""

        async def read():
            files = sorted(directory.glob("host_*.json"))
            state = {}
            for file in files:
                state |= json.loads(await asyncio.to_thread(file.read_text))
            if missing := {str(index) for index in self._streams} - state.keys():
                raise ValueError(f"{directory}: expected the state of stream {min(missing)} of the data")
            self.set_state(state)

        return read()
