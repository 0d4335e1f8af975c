"""The engine for a real federation: a SuperLink, a SuperNode at each client, ``flwr run`` to connect a stage to them.

``prepare`` writes all that the machines need into one folder: the server's certificate, a key per client, and a
Flower app that only names this library. ``register`` adds Flower's configuration.

    federation/federation.json, app/, flower/config.toml, server/server.pem, server/server.key
    federation/nodes/CID/ server.pem node.key node.pub node.json   to the machine of client CID, over a safe channel

The SuperLink keeps its state in memory. Its database option is not used: in Flower 1.41, where it was tried, clients
that answer together meet a locked SQLite file, and the answers are lost. Keys are registered anew at each start;
checkpoints hold the rest.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from fedhubert_lib import files, partition, resources
from fedhubert_lib.federated import wire
from fedhubert_lib.federated.protocol import Clients

FOLDER = "federation"
"""Its place in a run folder."""
CONNECTION = "fedhubert"
PORT = 9092
REGISTERED = "flower/registered.jsonl"
"""The clients that were let in since the SuperLink began, which keeps them in memory."""
YEARS = 5
"""Validity of the certificate."""
START_SECONDS = 180
AGAIN_SECONDS = 10

RECORDS = ("00_corpus/done.json", "01_partition/done.json", "01_partition/clients.parquet")
"""The parts of 00 and 01 that a server needs, beside the public speech and keywords that 05 reads."""

LOOPBACK = "localhost,127.0.0.1,::1"
"""Addresses that no proxy is asked for, whatever the environment says of proxies."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the machines have the library already
}

_PROJECT = """\
[project]
name = "fedhubert-app"
version = "1.0.0"
description = "Names of the code, which is the library that is installed on every machine"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedhubert"
config = {socket = ""}

[tool.flwr.app.components]
serverapp = "fedhubert_lib.federated.flower:server"
clientapp = "fedhubert_lib.federated.flower:client"
"""
"""The app that Flower carries to every machine: no code at all."""
_CONFIG = '[superlink]\ndefault = "{0}"\n\n[superlink.{0}]\naddress = "{host}:{port}"\nroot-certificates = {1}\n'


class DeploymentError(ChildProcessError):
    """A SuperLink, SuperNode or run that failed; the text ends with its output."""


# -------------------------------------------------------------------------------------------------- files for machines


def prepare(folder: Path, clients: Sequence[str], host: str = "127.0.0.1", port: int = PORT) -> None:
    """Write keys, certificates and app for ``clients`` and a server that they reach at ``host``.

    ``host`` is a name or an IPv4 address. What an interrupt has left is made anew. Raises FileExistsError where a
    federation was prepared before: new keys would lock its nodes out.
    """
    if {":", "/"} & set(host):
        raise ValueError(f"--host {host}: give a name or an IPv4 address, and its port with --port")
    folder = folder.resolve()
    if (folder / "federation.json").exists():
        raise FileExistsError(f"{folder}: has keys already; add a client with `deploy register`, or delete the folder")
    for unfinished in (folder / "server", folder / "nodes"):
        shutil.rmtree(unfinished, ignore_errors=True)
    # Flower's own processes on the server's machine come by its loopback address.
    write_server_keys(folder / "server", list(dict.fromkeys([host, "localhost", "127.0.0.1"])))
    files.write_text(folder / "app" / "pyproject.toml", _PROJECT)
    address = {"host": host, "port": port}
    for client in clients:
        add_client(folder, client, address)
    files.write_json(folder / "federation.json", address)  # last: without it, keys are made anew


def add_client(folder: Path, client: str, address: dict[str, Any] | None = None) -> None:
    """Write one more client's folder, of the server at ``address`` (default: as prepared); ``register`` lets it in."""
    address = address or _address(folder)
    node = folder / "nodes" / wire.checked_name("client", client)
    if node.exists():
        raise FileExistsError(f"{node}: this client has its key; `deploy register` without its name lets it in")
    with files.atomic(node) as temporary:
        write_node_keys(temporary)
        shutil.copy(folder / "server" / "server.pem", temporary)
        files.write_json(temporary / "node.json", {"client": client, **address})


def _address(folder: Path) -> dict[str, Any]:
    path = folder / "federation.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no federation yet; prepare it first")
    return json.loads(path.read_text(encoding="utf-8"))


def write_server_keys(folder: Path, names: Sequence[str]) -> None:
    """Write ``server.key`` and ``server.pem`` for a server that is reached by ``names`` (host names or IP addresses).

    The certificate is signed by its own key. Clients have it beforehand, so no authority has to vouch for it.
    """
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=365 * YEARS))
    builder = builder.add_extension(x509.SubjectAlternativeName([_host(name) for name in names]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    _write_private(folder / "server.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "server.pem").write_bytes(builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM))


def write_node_keys(folder: Path) -> None:
    """Write a new key pair for a client, ``node.key`` and ``node.pub``, in the form that Flower reads."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(folder / "node.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (folder / "node.pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write_private(path: Path, content: bytes) -> None:
    """Readable by its owner alone, from the first moment on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(content)


# ----------------------------------------------------------------------------------------------------------- processes


def superlink_command(folder: Path, bind: str | None = None) -> list[str]:
    """The command of the server's SuperLink. ``bind`` is the address to listen on; default: the host's."""
    address, certificate = _address(folder), str(folder / "server" / "server.pem")
    return [
        "flower-superlink",
        *("--ssl-ca-certfile", certificate, "--ssl-certfile", certificate),
        *("--ssl-keyfile", str(folder / "server" / "server.key")),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--host", bind or address["host"], "--port", str(address["port"])),
    ]


def supernode_command(node: Path, run: Path, device: str = "cpu") -> list[str]:
    """The command of a client's SuperNode. ``node`` is the client's folder from ``prepare``; ``run`` the run folder
    with its data. The port is for Flower's internal use. Raises DeploymentError for a device that is not here."""
    about = json.loads((node / "node.json").read_text(encoding="utf-8"))
    client = wire.checked_name(str(node / "node.json"), about["client"])
    try:
        settings = {"client": client, "run": str(run.resolve()), "device": resources.resolve(device)}
    except ValueError as error:
        raise DeploymentError(str(error)) from error
    if '"' in settings["run"]:
        raise DeploymentError(f"{settings['run']}: Flower takes no path with a double quote; move the folder")
    return [
        "flower-supernode",
        *("--root-certificates", str(node / "server.pem")),
        *("--superlink", f"{about['host']}:{about['port']}"),
        *("--auth-supernode-private-key", str(node / "node.key")),
        *("--node-config", " ".join(f"{key}={json.dumps(text, ensure_ascii=False)}" for key, text in settings.items())),
        *("--host", "127.0.0.1", "--port", str(free_port())),
    ]


def serve(folder: Path, bind: str | None = None) -> int:
    """Run the SuperLink, all prepared keys registered, until it or this process is stopped; return its exit code."""
    with _superlink(folder, bind) as process:
        return process.wait()


@contextlib.contextmanager
def local(folder: Path, run: Path, device: str = "cpu") -> Iterator[None]:
    """The whole federation on this machine: a SuperLink and a SuperNode per client, until the ``with`` block ends."""
    nodes: list[subprocess.Popen] = []
    with _superlink(folder, log=folder / "logs" / "superlink.log"):
        try:
            for node in sorted(folder.glob("nodes/[!.]*")):
                log = folder / "logs" / f"{node.name}.log"
                nodes.append(_start(supernode_command(node, run, device), node, log))
            yield
        finally:
            _end(nodes)


@contextlib.contextmanager
def _superlink(folder: Path, bind: str | None = None, log: Path | None = None) -> Iterator[subprocess.Popen]:
    """A SuperLink that listens, with all prepared keys registered. Raises DeploymentError when it does not start."""
    if _listens(folder):
        raise DeploymentError(f"{folder}: its address is in use, by a server that runs already; stop that first")
    (folder / REGISTERED).unlink(missing_ok=True)
    process = _start(superlink_command(folder, bind), folder, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(folder):
            if process.poll() is not None:
                raise DeploymentError(f"the SuperLink did not start.{_tail(log)}")
            if time.monotonic() > deadline:
                raise DeploymentError(
                    f"the SuperLink does not answer at {_address(folder)['host']} after {START_SECONDS:g} s; this"
                    f" machine, too, has to reach it by that name (a line in /etc/hosts).{_tail(log)}"
                )
            time.sleep(0.2)
        register(folder)
        yield process
    finally:
        _end([process])


def attend(node: Path, run: Path, device: str = "cpu") -> NoReturn:
    """Run a client's SuperNode until this process is stopped, and start it anew when it ends.

    A server that was restarted knows its key, not its session. Raises PartitionError where the lists in ``run``
    cannot be used.
    """
    client = json.loads((node / "node.json").read_text(encoding="utf-8"))["client"]
    partition.check_lists(run / "01_partition" / "clients" / client)
    while True:
        supernode = _start(supernode_command(node, run, device), node)
        try:
            code = supernode.wait()
        finally:
            _end([supernode])
        why = "" if code else ", as where the server stops or answers 401: a wrong clock, or a key unknown to it"
        print(f"the SuperNode ended (exit code {code}{why}); it starts again in {AGAIN_SECONDS} s", flush=True)
        time.sleep(AGAIN_SECONDS)


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's processes: its files in ``home/flower``, no calls to others' servers."""
    # Flower starts further programs by name: those of this interpreter's environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    names = "no_grpc_proxy", "no_proxy", "NO_PROXY"
    direct = [LOOPBACK, *([_address(home)["host"]] if (home / "federation.json").exists() else [])]  # a server's own
    proxies = dict.fromkeys(names, ",".join(filter(None, [*map(os.environ.get, names), *direct])))
    return os.environ | QUIET | proxies | {"FLWR_HOME": str((home / "flower").resolve()), "PATH": path}


_GIVEN: set[int] = set()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on and that was not given before: who gets it binds it later."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port


def register(folder: Path) -> list[str]:
    """Let in the clients that have not been let in since the running SuperLink began; return them."""
    certificate = json.dumps(str((folder / "server" / "server.pem").resolve()), ensure_ascii=False)  # TOML, too
    config = _CONFIG.format(CONNECTION, certificate, **_address(folder))  # now, since the folder may have moved
    files.write_text(folder / "flower" / "config.toml", config)
    registered = {row["client"] for row in files.read_rows(folder / REGISTERED)}
    new = [path for path in sorted(folder.glob("nodes/[!.]*/node.pub")) if path.parent.name not in registered]

    def let_in(key: Path) -> str:
        flwr(folder, "supernode", "register", str(key), CONNECTION, "--name", key.parent.name)
        files.append_row(folder / REGISTERED, {"client": key.parent.name})
        return key.parent.name

    with ThreadPoolExecutor(4) as pool:  # each starts an interpreter
        return list(pool.map(let_in, new))


def flwr(folder: Path, *arguments: str) -> str:
    """What the command ``flwr`` prints. Raises DeploymentError when it fails."""
    command = ["flwr", *arguments]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeploymentError(f"flwr {' '.join(arguments)}: failed:\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def connect(run: Path, ids: Sequence[str], device: str) -> Iterator[Clients]:
    """The clients ``ids`` of the federation that was prepared in ``run``, over its running SuperLink: ``flwr run``.

    Their nodes choose the device, not ``device``. Raises DeploymentError where no SuperLink listens, no client
    connects, or Flower's part ends too early.
    """
    folder = run / FOLDER
    check(run)
    log = folder / "logs" / "flwr-run.log"
    with wire.folder() as scratch, socket.socket(socket.AF_UNIX) as listener:
        address = str(scratch / "socket")  # not in the run folder: such addresses have 107 characters at most
        try:
            listener.bind(address)
        except OSError as error:
            raise DeploymentError(f"{address}: {error}; set TMPDIR to a shorter path") from error
        listener.listen()
        command = ["run", str(folder / "app"), CONNECTION, "--stream", "--run-config", f"socket={json.dumps(address)}"]
        process = _start(["flwr", *command], folder, log)
        try:
            with _accept(listener, process, log) as pipe:
                yield wire.RemoteClients(pipe, ids, scratch)
                wire.send(pipe, wire.END)
        except ConnectionError as error:
            raise DeploymentError(f"{error}; the same command resumes.{_tail(log)}") from error
        finally:
            _end([process])


def check(run: Path) -> None:
    """Raise DeploymentError, or FileNotFoundError, unless a SuperLink of the federation of ``run`` listens."""
    if not _listens(run / FOLDER):
        raise DeploymentError(
            "{host}:{port}: no SuperLink answers; start it with `fedhubert deploy server {run}`, and the clients with"
            " `fedhubert deploy client`".format(**_address(run / FOLDER), run=run)
        )


def check_records(run: Path) -> None:
    """Raise DeploymentError unless ``run`` has what a server needs of 00_corpus and 01_partition."""
    if missing := [name for name in RECORDS if not (run / name).exists()]:
        raise DeploymentError(
            f"{run}: a server needs {', '.join(missing)}; run `fedhubert run STUDY --until partition` there, or copy"
            " 00_corpus and 01_partition (without its clients/) from the site that made the partition"
        )


def _listens(folder: Path) -> bool:
    address = _address(folder)
    with contextlib.suppress(OSError), socket.create_connection((address["host"], address["port"]), timeout=10):
        return True
    return False


def _accept(listener: socket.socket, process: subprocess.Popen, log: Path) -> Connection:
    """The connection of the ServerApp that ``process`` starts."""
    listener.settimeout(0.5)
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            accepted, _ = listener.accept()
            accepted.setblocking(True)
            return Connection(accepted.detach())
    raise DeploymentError(f"flwr run did not start the ServerApp.{_tail(log)}")


def _start(command: Sequence[str], home: Path, log: Path | None = None) -> subprocess.Popen:
    """Start a Flower program; its output goes to ``log``, and Ctrl-C is for this process, which then ends it."""
    if log is None:
        return subprocess.Popen(command, env=environment(home))
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as stream:
        output: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment(home), start_new_session=True, **output)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """End processes and all that they started (Flower gives its children sessions of their own), killed after 20 s."""
    family = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [parent := psutil.Process(process.pid), *parent.children(recursive=True)]
        process.terminate()
    for member in psutil.wait_procs(family, timeout=20)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    for process in processes:
        process.wait()


def _tail(log: Path | None) -> str:
    return f" {log} ends:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}" if log else ""
