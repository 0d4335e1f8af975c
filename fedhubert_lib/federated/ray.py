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

from fedhubert_lib.federated import handlers, pool
from fedhubert_lib.federated.pool import WorkerClients
from fedhubert_lib.federated.protocol import Failure, Reply, Request
from fedhubert_lib.resources import cores

START_SECONDS = 300
"""Time that a worker has to start: on a cluster that others use, too, its place may not become free."""

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import ray  # noqa: E402


class Actor:
    """Runs on the device that Ray gave it. Ray's arrays are read-only views of its store: both ends take copies."""

    def __init__(self, run: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._run, self._device = Path(run), device

    def answer(
        self, client: str, action: str, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]
    ) -> Failure | tuple[dict[str, np.ndarray], dict[str, float]]:
        """The reply of ``client`` as NumPy arrays and metrics, or its failure."""
        home = handlers.home(self._run, client, action, self._device, simulated=True)
        answer = handlers.answer(home, action, _tensors(arrays), config)
        pool.leave_lost_gpu(answer)
        return answer if isinstance(answer, Failure) else (_arrays(answer.arrays), answer.metrics)


class RemoteActor:
    """A worker of ``pool.WorkerClients``: an actor of the cluster, with ``resources``, made of ``arguments``."""

    def __init__(self, resources: Mapping[str, int], *arguments: Any) -> None:
        self._resources, self._arguments = resources, arguments

    def start(self) -> None:
        self._actor = ray.remote(Actor).options(**self._resources).remote(*self._arguments)

    def answer(self, client: str, packed: Sequence[Any], timeout: float | None) -> Reply | Failure:
        try:
            ray.get(self._actor.__ray_ready__.remote(), timeout=START_SECONDS)  # which is not the client's time
            answer = ray.get(self._actor.answer.remote(client, *packed), timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"no worker within {START_SECONDS} s, or no answer before the deadline") from error
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"the Ray worker died: {str(error).splitlines()[0]}") from error
        return answer if isinstance(answer, Failure) else Reply(client, _tensors(answer[0]), answer[1])

    def stop(self) -> None:
        ray.kill(self._actor)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _pack(request: Request) -> Sequence[Any]:
    return request.action, ray.put(_arrays(request.arrays)), json.loads(json.dumps(request.config))


@contextlib.contextmanager
def connect(run: Path, ids: Sequence[str], device: str) -> Iterator[WorkerClients]:
    """The clients of ``run`` over a Ray cluster whose machines all see that folder under the same path: as many actors
    as the cluster has room for on ``device``."""
    gpu, width, started = device.startswith("cuda"), torch.get_num_threads(), not ray.is_initialized()
    resources = {"num_cpus": 0, "num_gpus": 1} if gpu else {"num_cpus": width}
    if started:
        # A cluster that is started here has as many workers as this process may use cores, and no web page.
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": cores(), "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="warning", **local)
    try:
        rooms = [node["Resources"].get("GPU" if gpu else "CPU", 0) for node in ray.nodes() if node["Alive"]]
        count = sum(int(room / (1 if gpu else width)) for room in rooms)  # no worker lies on two machines
        if count == 0:
            raise RuntimeError(
                f"Ray has no room for a worker on {device!r} ({resources}); it has {ray.cluster_resources()}"
            )
        # In an actor, Ray shows only the actor's own GPU.
        arguments = str(run.resolve()), "cuda:0" if gpu else device, width
        workers = [RemoteActor(resources, *arguments) for _ in range(count)]
        with contextlib.closing(WorkerClients(ids, workers, _pack)) as clients:
            yield clients
    finally:
        if started:
            ray.shutdown()
