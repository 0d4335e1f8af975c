"""The same study on every engine gives the same weights; what fails or is not let in does not stop it."""

import contextlib
import hashlib
import json
import multiprocessing.resource_tracker
import os
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import federation
import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedhubert_lib import pretraining
from fedhubert_lib.federated import client_ids, deployment, pool
from fedhubert_lib.federated.protocol import Failure, Reply

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

STUDY = {"rounds": 2, "cohort": 3, "local_steps": 1, "validate_every": 2, "layers": 1, "hidden_size": 64}
STUDY |= {"server": "nesterov", "server_schedule": "clients", "server_rate": 0.7, "local_state": "cohort"}


def make(folder: Path) -> Path:
    return federation.make(folder, clients=3)


@pytest.fixture(scope="module")
def no_children_left() -> Callable[[], bool]:
    """True where no process is left that was started here; other tests of this process may have left a fork server."""
    multiprocessing.resource_tracker.ensure_running()  # of the standard library, which never ends
    before = set(psutil.Process().children())
    return lambda: not psutil.wait_procs(set(psutil.Process().children()) - before, timeout=60)[1]


def digest(checkpoint: Path) -> str:
    """Of names and bytes of all weights."""
    total = hashlib.sha256()
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            total.update(name.encode())
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    """The weights of the in-process engine."""
    torch.set_num_threads(1)
    run = make(tmp_path_factory.mktemp("inprocess"))
    return digest(pretraining.run(run, federation.pretrain(**STUDY)))


def test_the_seed_matters(tmp_path, expected):
    """Else the tests below would hold for any engine."""
    run = make(tmp_path)
    assert digest(pretraining.run(run, federation.pretrain(**STUDY, seed=1))) != expected


def test_pool_gives_the_weights_of_inprocess(tmp_path, expected, no_children_left):
    run = make(tmp_path)
    assert digest(pretraining.run(run, federation.pretrain(**STUDY, engine="pool"))) == expected
    assert no_children_left()


def test_pool_gives_the_weights_of_inprocess_where_clients_keep_moments(tmp_path):
    ends = []
    for engine in ("inprocess", "pool"):
        p = federation.pretrain(**STUDY | {"local_state": "keep", "engine": engine})
        ends.append(digest(pretraining.run(make(tmp_path / engine), p)))
    assert ends[0] == ends[1]


def test_ray_gives_the_weights_of_inprocess(tmp_path, expected):
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    run = make(tmp_path)
    assert digest(pretraining.run(run, federation.pretrain(**STUDY, engine="ray"))) == expected
    assert not ray.is_initialized()


@pytest.fixture
def two_workers(monkeypatch) -> None:
    monkeypatch.setattr(pool, "devices", lambda device: ["cpu", "cpu"])


def test_a_killed_worker_costs_one_clients_answer(tmp_path, two_workers, no_children_left):
    run, rows = make(tmp_path), []

    def on_row(row: dict) -> None:
        rows.append(row)
        if row["kind"] == "round" and row["round"] == 1:
            os.kill(first[0], signal.SIGKILL)

    with pool.connect(run, client_ids(run), "cpu") as clients:
        first = [worker.process.pid for worker in clients.workers]
        p = federation.pretrain(**STUDY | {"rounds": 3, "validate_every": 3})
        pretraining.run(run, p, on_row, clients)
        assert [worker.process.pid == pid for worker, pid in zip(clients.workers, first, strict=True)] == [False, True]
    assert [row["clients"] for row in rows if row["kind"] == "round"] == [3, 2, 3]
    (failure,) = [row for row in rows if row["kind"] == "failure"]
    assert failure["round"] == 2
    assert "SIGKILL" in failure["reason"]
    assert no_children_left()


def test_a_straggler_is_stopped_at_its_deadline(tmp_path, two_workers):
    run = make(tmp_path)
    with pool.connect(run, client_ids(run), "cpu") as clients:
        assert len(list(clients.ask("identify"))) == 3  # both workers are up
        hung = clients.workers[0].process.pid
        os.kill(hung, signal.SIGSTOP)
        answers = list(clients.ask("identify", timeout=10.0, clients=["client-000", "client-001"]))
        (late,) = [answer for answer in answers if isinstance(answer, Failure)]
        assert late.reason == "no answer before the deadline of 10.0 s"
        assert sum(isinstance(answer, Reply) for answer in answers) == 1
        assert not psutil.pid_exists(hung)
        assert [answer.client for answer in clients.ask("identify")] == client_ids(run)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt at SIGINT, which a shell's background commands ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_no_client(tmp_path, two_workers, no_children_left, interruptible):
    run = make(tmp_path)
    with pytest.raises(KeyboardInterrupt), pool.connect(run, client_ids(run), "cpu") as clients:
        assert len(list(clients.ask("identify"))) == 3  # both workers are up
        for worker in clients.workers:
            os.kill(worker.process.pid, signal.SIGSTOP)
        threading.Timer(1, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
        list(clients.ask("identify"))
    assert no_children_left()


# ---------------------------------------------------------------------------------------------------------- deployment


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, no_children_left) -> Iterator[Path]:
    """The run folder of a federation that is up: TLS, authenticated nodes, loopback only."""
    run = make(tmp_path_factory.mktemp("deployment"))
    folder = run / deployment.FOLDER
    deployment.prepare(folder, client_ids(run), port=deployment.free_port())
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with deployment.local(folder, run):
            yield run
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    assert no_children_left()


def test_deployment_gives_the_weights_of_inprocess(deployed, expected):
    p = federation.pretrain(**STUDY, engine="deployment")
    rows: list[dict] = []
    assert digest(pretraining.run(deployed, p, rows.append)) == expected
    assert [row["kind"] for row in rows if row["kind"] != "client"] == ["plan", *2 * ["cohort", "round"]]


def test_an_interrupted_stage_ends_on_the_server_too(deployed):
    shutil.rmtree(deployed / "03_pretrain", ignore_errors=True)

    def interrupt(row: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretraining.run(deployed, federation.pretrain(**STUDY | {"rounds": 50}, engine="deployment"), interrupt)
    patience = time.monotonic() + 600
    while (status := statuses(deployed)[0]).startswith(("starting", "running")) and time.monotonic() < patience:
        time.sleep(1)
    assert status.startswith("finished")


def statuses(run: Path) -> list[str]:
    """Of Flower's runs, the latest first."""
    listed = deployment.flwr(run / deployment.FOLDER, "list", deployment.CONNECTION, "--format", "json")
    return [row["status"] for row in json.loads(listed)["runs"]]


LET_IN = "SuperNode ID:"
"""What a SuperNode writes once the server has activated it."""


def refused(node: Path, run: Path, *changes: tuple[str, str | None]) -> str:
    """What a SuperNode says that is not let in: it ends with an error."""
    command = deployment.supernode_command(node, run)
    for option, value in changes:
        at = command.index(option)
        command[at : at + 2] = [option, value] if value is not None else []
    log = run / "refused.log"  # no pipe: what Flower starts holds it open for longer than the SuperNode lives
    process = deployment._start(command, node, log)
    try:
        assert process.wait(timeout=600) != 0
    finally:
        deployment._end([process])
    said = log.read_text()
    assert LET_IN not in said, said
    return said


def test_registered_nodes_are_let_in(deployed):
    """Else those below would hold for any node."""
    patience = time.monotonic() + 600
    for log in (deployed / deployment.FOLDER / "logs").glob("client-*.log"):
        while LET_IN not in log.read_text() and time.monotonic() < patience:
            time.sleep(1)
        assert LET_IN in log.read_text()


def test_an_unregistered_node_is_refused(deployed):
    folder = deployed / deployment.FOLDER
    node = folder.parent / "stranger"
    node.mkdir()
    for name in ("server.pem", "node.json"):
        (node / name).write_bytes((folder / "nodes" / "client-000" / name).read_bytes())
    deployment.write_node_keys(node)
    assert "Failed to activate SuperNode" in refused(node, deployed)


def test_another_servers_certificate_is_refused(deployed, tmp_path):
    deployment.write_server_keys(tmp_path, ["127.0.0.1"])
    node = deployed / deployment.FOLDER / "nodes" / "client-000"
    said = refused(node, deployed, ("--root-certificates", str(tmp_path / "server.pem")))
    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_plain_text_is_refused(deployed):
    port = deployment._address(deployed / deployment.FOLDER)["port"]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.settimeout(10)
        with contextlib.suppress(ConnectionError):
            assert not connection.recv(1000).startswith(b"HTTP/1.1 200")
    # The same words are answered inside TLS, so what was refused was the plain text.
    context = ssl.create_default_context(cafile=deployed / deployment.FOLDER / "server" / "server.pem")
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1")
