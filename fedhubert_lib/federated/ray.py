"""The engine for a Ray cluster: one actor per device of all its machines, which share the run folder.

Ray itself is used, not Flower's simulation on top of it: that draws node ids at random, sends each client's state to
and fro with every message, and owns the server's thread. Actors live for the whole run; the tensors that a cohort has
in common go into Ray's object store once.

``RAY_ADDRESS`` names a running cluster; without it Ray starts on this machine, and stops at the end.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict

from fedhubert_lib.federated import messages, workers
from fedhubert_lib.federated.inprocess import InProcessGrid
from fedhubert_lib.federated.protocol import Clients
from fedhubert_lib.threads import cores

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import ray  # noqa: E402


class Actor:
    """A worker: one in-process engine on the device that Ray gave it."""

    def __init__(self, run: str, clients: Sequence[str], device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._grid = InProcessGrid(Path(run), clients, device)

    def ready(self) -> None:
        """Returns once the worker is up."""

    def answer(
        self, client: str, arrays: Mapping[str, np.ndarray], rest: dict[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What ``client`` answers. Ray's arrays are read-only views of its store: clients get copies."""
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        content = workers.answer(self._grid, client, workers.put_together(tensors, rest))
        tensors, rest = workers.take_apart(content)
        return {name: tensor.numpy() for name, tensor in tensors.items()}, rest


class RayGrid(workers.WorkerGrid):
    """A Grid over Ray actors that compute on ``device``: as many as the cluster has room for."""

    def __init__(self, run: Path, clients: Sequence[str], device: str) -> None:
        gpu = device.startswith("cuda")
        resources = {"num_cpus": 0, "num_gpus": 1} if gpu else {"num_cpus": workers.threads()}
        count = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0) / (1 if gpu else workers.threads()))
        if count == 0:
            raise RuntimeError(
                f"Ray has no room for a worker on {device!r} ({resources}); it has {ray.cluster_resources()}"
            )
        self._make = ray.remote(Actor).options(**resources)
        # In an actor, Ray shows only the actor's own GPU.
        self._arguments = (str(run.resolve()), list(clients), "cuda:0" if gpu else device, workers.threads())
        self._actors: dict[int, Any] = {}
        self._awaited: dict[int, list[ray.ObjectRef]] = {}
        """What is still to come of each slot: that its actor is up, then the answer to its request."""
        self._stored: dict[tuple, Any] = {}
        super().__init__(run, clients, count)

    def start(self, slot: int) -> None:
        """See the parent."""
        self._actors[slot] = self._make.remote(*self._arguments)
        self._awaited[slot] = [self._actors[slot].ready.remote()]

    def stop(self, slot: int) -> None:
        """See the parent."""
        ray.kill(self._actors.pop(slot))

    def give(self, slot: int, client: str, content: RecordDict) -> None:
        """Store the tensors, unless another client of this cohort was given the same ones."""
        arrays, rest = workers.take_apart(content)
        key = tuple((name, tensor.data_ptr(), tensor.shape) for name, tensor in arrays.items())
        if key not in self._stored:
            self._stored[key] = ray.put({name: tensor.numpy() for name, tensor in arrays.items()})
        self._awaited[slot].append(self._actors[slot].answer.remote(client, self._stored[key], rest))

    def push_messages(self, messages: Any) -> Any:
        """See the parent. The tensors of the last push are forgotten."""
        self._stored.clear()
        return super().push_messages(messages)

    def collect(self, busy: Sequence[int], seconds: float) -> Iterator[tuple[int, RecordDict | str | None]]:
        """See the parent."""
        slots = {self._awaited[slot][0]: slot for slot in busy}
        for reference in ray.wait(list(slots), timeout=seconds)[0]:
            slot = slots[reference]
            try:
                news = ray.get(self._awaited[slot].pop(0))
            except ray.exceptions.RayError as error:
                yield slot, f"the Ray worker died: {str(error).splitlines()[0]}"
                continue
            if news is None:
                yield slot, None
            else:
                arrays, rest = news
                content = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
                yield slot, workers.put_together(content, rest)

    def close(self) -> None:
        """Stop all actors."""
        for slot in list(self._actors):
            self.stop(slot)


@contextlib.contextmanager
def connect(run: Path, clients: Sequence[str], device: str) -> Iterator[Clients]:
    """The clients of ``run`` over a Ray cluster whose machines all see that folder under the same path."""
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level="warning", **_local())
    try:
        grid = RayGrid(run, clients, device)
        try:
            yield messages.GridClients(grid, grid.nodes, messages.SharedArray)
        finally:
            grid.close()
    finally:
        if started:
            ray.shutdown()


def _local() -> dict[str, Any]:
    """Settings of a cluster that is started here: as many workers as this process may use cores, no web page."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    return {"num_cpus": cores(), "include_dashboard": False}
