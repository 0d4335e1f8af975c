"""The engine for one machine with several devices: a worker process each, alive for the whole run.

Tensors are handed over in anonymous shared memory (memfd), which is not bound by the size of /dev/shm and is gone with
the last process that holds it: a cohort's common tensors are written once, whatever its size. The rest is JSON on a
pipe. Linux only.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from fedhubert_lib.federated import handlers, workers
from fedhubert_lib.federated.protocol import Clients, Failure, Reply
from fedhubert_lib.threads import cores

ALIGNMENT = 64


class Parcel:
    """Tensors in shared memory that lives as long as this object, or as a reader's tensors."""

    def __init__(self, arrays: Mapping[str, Tensor]) -> None:
        self._descriptor = os.memfd_create("fedhubert")
        self.layout: dict[str, tuple[str, list[int], int]] = {}
        offset = 0
        for name, tensor in arrays.items():
            self.layout[name] = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset)
            values = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            while values:
                written = os.pwrite(self._descriptor, values, offset)
                values, offset = values[written:], offset + written
            offset += -offset % ALIGNMENT
        os.ftruncate(self._descriptor, max(offset, 1))

    @property
    def address(self) -> dict[str, Any]:
        """What a process of the same user needs to read it, as JSON."""
        return {"path": f"/proc/{os.getpid()}/fd/{self._descriptor}", "layout": self.layout}

    def __del__(self) -> None:
        os.close(self._descriptor)


def read(address: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a parcel, mapped and not copied. Who changes them changes a private copy."""
    size = os.stat(address["path"]).st_size
    storage = torch.UntypedStorage.from_file(address["path"], shared=False, nbytes=size)
    arrays = {}
    for name, (dtype, shape, offset) in address["layout"].items():
        values = torch.empty(0, dtype=getattr(torch, dtype))
        arrays[name] = values.set_(storage, offset // values.element_size(), torch.Size(shape))
    return arrays


@dataclass(frozen=True)
class _Worker:
    process: subprocess.Popen
    pipe: Connection


class PoolClients(workers.WorkerClients):
    """``protocol.Clients`` over one persistent process per entry of ``devices``."""

    def __init__(self, run: Path, clients: Sequence[str], devices: Sequence[str]) -> None:
        if not sys.platform.startswith("linux"):
            raise OSError("the pool engine needs Linux (memfd); use engine inprocess or ray")
        self._run, self._devices = run, list(devices)
        self._workers: dict[int, _Worker] = {}
        super().__init__(clients, len(self._devices))

    @property
    def processes(self) -> list[int]:
        """The workers' process ids."""
        return [self._workers[slot].process.pid for slot in sorted(self._workers)]

    def start(self, slot: int) -> None:
        """A fresh interpreter, not a fork (CUDA forbids it), and not multiprocessing's spawn (which runs the caller's
        main module again)."""
        ours, theirs = Pipe()
        command = "import sys; from fedhubert_lib.federated import pool; pool.work(int(sys.argv[1]))"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": str(workers.threads())},
                start_new_session=True,  # Ctrl-C is for this process; the workers end with it
            )
        self._workers[slot] = _Worker(process, ours)
        setup = {
            "run": str(self._run),
            "device": self._devices[slot],
            "threads": workers.threads(),
        }
        ours.send_bytes(json.dumps(setup).encode())

    def stop(self, slot: int) -> None:
        """Kill it: what a client writes is written atomically."""
        worker = self._workers.pop(slot)
        worker.pipe.close()
        worker.process.kill()
        worker.process.wait()

    def prepare(self, action: str, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """See the parent. The tensors of the last request are forgotten."""
        self._parcel = Parcel(arrays)
        self._request = {"action": action, "arrays": self._parcel.address, "config": dict(config)}

    def give(self, slot: int, client: str) -> None:
        """See the parent."""
        with contextlib.suppress(BrokenPipeError):  # it died while idle: collect() finds out, and says how
            self._workers[slot].pipe.send_bytes(json.dumps({**self._request, "client": client}).encode())

    def collect(self, busy: Sequence[int], seconds: float) -> Iterator[tuple[int, Reply | Failure | str | None]]:
        """See the parent."""
        slots = {self._workers[slot].pipe: slot for slot in busy}
        for pipe in wait(list(slots), seconds):
            slot = slots[pipe]
            try:
                news = json.loads(pipe.recv_bytes())
                if news is None or "reason" in news:
                    yield slot, news and Failure(**news)
                else:
                    yield slot, Reply(news["client"], read(news["arrays"]), news["metrics"])
            except (EOFError, OSError):  # OSError: it died between its answer and our reading of it
                yield slot, _death(self._workers[slot].process)

    def close(self) -> None:
        """Stop all workers."""
        for slot in list(self._workers):
            self.stop(slot)


def _death(process: subprocess.Popen) -> str:
    process.kill()
    code = process.wait()
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the worker process died ({how}); its standard error says more, and the system log if memory ran out"


def work(descriptor: int) -> None:
    """A worker's main: answer requests until the process that started it is gone."""
    pipe = Connection(descriptor)
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                requests.put(json.loads(pipe.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)  # at once, in the middle of training: nobody waits for the answer

    threading.Thread(target=listen, daemon=True).start()
    setup = requests.get()
    torch.set_num_threads(setup["threads"])
    pipe.send_bytes(b"null")  # up
    while True:
        request = requests.get()
        action = request["action"]
        home = handlers.home(Path(setup["run"]), request["client"], action, setup["device"], simulated=True)
        answer = handlers.answer(home, action, read(request["arrays"]), request["config"])
        if isinstance(answer, Failure):
            document = asdict(answer)
        else:
            parcel = Parcel(answer.arrays)  # lives until the next answer: the reader has mapped it by then
            document = {"client": answer.client, "arrays": parcel.address, "metrics": answer.metrics}
        pipe.send_bytes(json.dumps(document).encode())


def devices(device: str) -> list[str]:
    """One entry per worker: every GPU for ``cuda``, one for ``cuda:N``, as many as the cores hold for ``cpu``.

    On a CPU each worker takes as many threads as this process (torch.get_num_threads): set OMP_NUM_THREADS=1 for as
    many workers as cores.
    """
    if device == "cuda":
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device == "cpu":
        return ["cpu"] * max(1, cores() // workers.threads())
    return [device]


@contextlib.contextmanager
def connect(run: Path, clients: Sequence[str], device: str) -> Iterator[Clients]:
    """The clients of ``run`` in worker processes, one per device that ``device`` stands for."""
    pool = PoolClients(run, clients, devices(device))
    try:
        yield pool
    finally:
        pool.close()
