"""The engine for a Ray cluster: one actor per device of all its machines, which share the run folder.

Ray itself is used, not Flower's simulation on top of it: that draws node ids at random, sends each client's state to
and fro with every message, and owns the server's thread. Actors live for the whole run; the tensors that a cohort has
in common go into Ray's object store once.

``RAY_ADDRESS`` names a running cluster; without it Ray starts on this machine, and stops at the end.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhubert_lib.federated import handlers, workers
from fedhubert_lib.federated.protocol import Clients, Failure, Reply
from fedhubert_lib.threads import cores

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import ray  # noqa: E402


class Actor:
    """A worker, on the device that Ray gave it."""

    def __init__(self, run: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._run, self._device = Path(run), device

    def ready(self) -> None:
        """Returns once the worker is up."""

    def answer(
        self, client: str, action: str, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]
    ) -> Failure | tuple[dict[str, np.ndarray], dict[str, float]]:
        """What ``client`` answers. Ray's arrays are read-only views of its store: clients get copies."""
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        home = handlers.home(self._run, client, action, self._device, simulated=True)
        answer = handlers.answer(home, action, tensors, config)
        if isinstance(answer, Failure):
            return answer
        return {name: tensor.numpy() for name, tensor in answer.arrays.items()}, answer.metrics


class RayClients(workers.WorkerClients):
    """``protocol.Clients`` over Ray actors that compute on ``device``: as many as the cluster has room for."""

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
        self._arguments = (str(run.resolve()), "cuda:0" if gpu else device, workers.threads())
        self._actors: dict[int, Any] = {}
        self._awaited: dict[int, list[ray.ObjectRef]] = {}
        """What is still to come of each slot: that its actor is up, then the answer to its request."""
        super().__init__(clients, count)

    def start(self, slot: int) -> None:
        """See the parent."""
        self._actors[slot] = self._make.remote(*self._arguments)
        self._awaited[slot] = [self._actors[slot].ready.remote()]

    def stop(self, slot: int) -> None:
        """See the parent."""
        ray.kill(self._actors.pop(slot))

    def prepare(self, action: str, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """See the parent. The tensors of the last request are forgotten."""
        stored = ray.put({name: tensor.detach().numpy() for name, tensor in arrays.items()})
        self._request = (action, stored, json.loads(json.dumps(dict(config))))

    def give(self, slot: int, client: str) -> None:
        """See the parent."""
        self._awaited[slot].append(self._actors[slot].answer.remote(client, *self._request))

    def collect(self, busy: Sequence[int], seconds: float) -> Iterator[tuple[int, Reply | Failure | str | None]]:
        """See the parent."""
        slots = {self._awaited[slot][0]: slot for slot in busy}
        for reference in ray.wait(list(slots), timeout=seconds)[0]:
            slot = slots[reference]
            try:
                news = ray.get(self._awaited[slot].pop(0))
            except ray.exceptions.RayError as error:
                yield slot, f"the Ray worker died: {str(error).splitlines()[0]}"
                continue
            if news is None or isinstance(news, Failure):
                yield slot, news
            else:
                arrays, metrics = news
                tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
                yield slot, Reply(self._busy[slot], tensors, metrics)

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
        actors = RayClients(run, clients, device)
        try:
            yield actors
        finally:
            actors.close()
    finally:
        if started:
            ray.shutdown()


def _local() -> dict[str, Any]:
    """Settings of a cluster that is started here: as many workers as this process may use cores, no web page."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    return {"num_cpus": cores(), "include_dashboard": False}
