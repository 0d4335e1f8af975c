"""What a deployment's machines are given: keys, certificates, configuration, commands."""

import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from fedhubert_lib import cli, params, partition
from fedhubert_lib.federated import deployment

CLIENTS = ["client-000", "client-001"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / deployment.FOLDER
    deployment.prepare(path, CLIENTS, host="localhost", port=12345)
    return path


def handshake(folder: Path, authority: Path, host: str = "localhost") -> str:
    """The TLS version that a client trusting ``authority`` speaks with a server of ``folder``."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server" / "server.pem", folder / "server" / "server.key")
    client = ssl.create_default_context(cafile=authority)
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:  # the client hung up, or refused
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as connection:
            return connection.version()
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_nodes_trust_the_server_and_no_other(folder, tmp_path, host):
    assert handshake(folder, folder / "nodes" / "client-000" / "server.pem", host) == "TLSv1.3"
    deployment.prepare(tmp_path / "other", [], host="localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        handshake(folder, tmp_path / "other" / "server" / "server.pem", host)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch|not valid for"):
        handshake(folder, folder / "server" / "server.pem", "example.org")


def test_private_keys_are_private_and_stay_where_they_belong(folder):
    private = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.key"))
    assert private == [*(f"nodes/{client}/node.key" for client in CLIENTS), "server/server.key"]
    assert {stat.S_IMODE((folder / path).stat().st_mode) for path in private} == {0o600}
    # A client's folder: its key, the server's certificate, where the server is.
    names = sorted(path.name for path in (folder / "nodes" / "client-000").iterdir())
    assert names == ["node.json", "node.key", "node.pub", "server.pem"]
    assert (folder / "nodes/client-000/node.key").read_bytes() != (folder / "nodes/client-001/node.key").read_bytes()


def test_keys_are_not_made_twice(folder):
    with pytest.raises(FileExistsError, match="has keys already"):
        deployment.prepare(folder, CLIENTS)
    with pytest.raises(FileExistsError, match="client-001.*without its name lets it in"):
        deployment.add_client(folder, "client-001")


def test_register_makes_the_folders_of_new_clients(tmp_path, monkeypatch, capsys):
    deployment.prepare(tmp_path / deployment.FOLDER, CLIENTS[:1])
    monkeypatch.setattr(deployment, "flwr", lambda folder, *arguments: "")
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # of the process that runs the tests
    assert cli.main(["deploy", "register", str(tmp_path), CLIENTS[1]]) == 0
    assert f"registered: {CLIENTS[0]}, {CLIENTS[1]}" in capsys.readouterr().out
    assert (tmp_path / deployment.FOLDER / "nodes" / CLIENTS[1] / "node.json").is_file()


def test_keys_that_an_interrupt_left_unfinished_are_made_anew(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("write_node_keys", "_write_private"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(deployment, name, interrupted)
            deployment.prepare(tmp_path, CLIENTS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(deployment.shutil, "copy", interrupted)
        deployment.prepare(tmp_path, CLIENTS)
    deployment.prepare(tmp_path, CLIENTS[:1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(deployment.shutil, "copy", interrupted)
        deployment.add_client(tmp_path, CLIENTS[1])
    deployment.add_client(tmp_path, CLIENTS[1])
    assert sorted(path.name for path in (tmp_path / "nodes").iterdir()) == CLIENTS
    assert handshake(tmp_path, tmp_path / "nodes" / CLIENTS[1] / "server.pem") == "TLSv1.3"


@pytest.mark.parametrize("host", ["::1", "fl.example.org:9092", "https://fl.example.org"])
def test_a_host_that_no_address_can_be_made_of_is_refused(tmp_path, host):
    with pytest.raises(ValueError, match="give a name or an IPv4 address"):
        deployment.prepare(tmp_path / "f", CLIENTS, host)
    assert not (tmp_path / "f").exists()


def test_no_port_is_given_twice():
    assert len({deployment.free_port() for _ in range(300)}) == 300


def test_a_server_that_cannot_find_itself_says_so(tmp_path, monkeypatch):
    deployment.prepare(tmp_path / "f", CLIENTS, "no-such-host.invalid")
    monkeypatch.setattr(deployment, "START_SECONDS", 0.5)
    monkeypatch.setattr(
        deployment, "superlink_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    with pytest.raises(deployment.DeploymentError, match=r"does not answer at no-such-host\.invalid .*/etc/hosts"):
        deployment.serve(tmp_path / "f")


def test_a_folder_that_was_moved_names_its_own_certificate(folder, tmp_path, monkeypatch):
    moved = shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.setattr(deployment, "flwr", lambda *_: "")
    deployment.register(moved)
    config = tomllib.loads((moved / "flower" / "config.toml").read_text())["superlink"]
    chosen = config[config["default"]]
    assert chosen == {"address": "localhost:12345", "root-certificates": str(moved / "server" / "server.pem")}


def test_flower_reaches_its_own_server_past_any_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "intranet")
    deployment.prepare(tmp_path / "f", ["client-000"], "bench.example.org")
    of_server, of_node = (
        deployment.environment(tmp_path / "f" / name)["no_proxy"] for name in ("", "nodes/client-000")
    )
    assert "bench.example.org" in of_server and "intranet" in of_server and "bench.example.org" not in of_node


def test_commands_name_tls_and_keys_and_nothing_insecure(folder, tmp_path):
    server = deployment.superlink_command(folder)
    client = deployment.supernode_command(folder / "nodes" / "client-001", tmp_path / "a run", "auto")
    assert "--enable-supernode-auth" in server
    assert "--auth-supernode-private-key" in client
    assert not {"--insecure"} & {*server, *client}
    assert client[client.index("--superlink") + 1] == "localhost:12345"
    settings = tomllib.loads(client[client.index("--node-config") + 1].replace('" ', '"\n'))
    assert settings == {"client": "client-001", "run": str(tmp_path / "a run"), "device": "cpu"}
    with pytest.raises(deployment.DeploymentError, match="cuda:99"):
        deployment.supernode_command(folder / "nodes" / "client-001", tmp_path, "cuda:99")
    with pytest.raises(deployment.DeploymentError, match='a"run: Flower takes no path with a double quote'):
        deployment.supernode_command(folder / "nodes" / "client-001", tmp_path / 'a"run')
    assert deployment.environment(folder)["FLWR_TELEMETRY_ENABLED"] == "0"


def test_a_temporary_folder_whose_path_is_too_long_for_a_socket_is_named(folder, tmp_path, monkeypatch):
    (long := tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr(deployment.wire.tempfile, "tempdir", str(long))
    monkeypatch.setattr(deployment, "_listens", lambda _: True)
    folder.rename(moved := tmp_path / deployment.FOLDER)
    try:
        with pytest.raises(deployment.DeploymentError, match="x/fedhubert-.*/socket: .*; set TMPDIR to a shorter path"):
            deployment.connect(tmp_path, CLIENTS, "cpu").__enter__()
    finally:
        moved.rename(folder)


def test_a_client_whose_lists_cannot_be_used_does_not_start_its_node(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(deployment, "_start", lambda *_: pytest.fail("started"))
    lists = tmp_path / "01_partition" / "clients" / "client-001"
    lists.mkdir(parents=True)
    (tmp_path / "a.flac").touch()
    good = {"utterance": ["a"], "path": [str(tmp_path / "a.flac")], "speaker": ["84"], "samples": [16_000]}
    for changes, reason in (
        ({"samples": [8_000]}, "train.parquet: lists no utterance that is long enough"),
        ({"samples": [1.5]}, "train.parquet: column samples holds float64"),
        ({"speaker": [84]}, "train.parquet: column speaker holds something other than text"),
        ({"path": ["a.flac"]}, "train.parquet: a.flac: no such file, or no absolute path"),
        ({"path": ["/gone.flac"]}, "train.parquet: /gone.flac: no such file"),
        ({}, "validation.parquet: a is listed twice"),
    ):
        pd.DataFrame(good | changes).to_parquet(lists / "train.parquet")
        pd.DataFrame(good).to_parquet(lists / "validation.parquet")
        with pytest.raises(partition.PartitionError, match=f"client-001/{reason}"):
            deployment.attend(folder / "nodes" / "client-001", tmp_path)
    with pytest.raises(partition.PartitionError, match="train.parquet: no such file; `fedhubert export-client`"):
        deployment.attend(folder / "nodes" / "client-001", tmp_path / "elsewhere")
    pd.DataFrame(good)[["path", "samples"]].to_parquet(lists / "train.parquet")
    with pytest.raises(partition.PartitionError, match="train.parquet: no column speaker, utterance"):
        deployment.attend(folder / "nodes" / "client-001", tmp_path)


def test_a_client_of_a_name_that_is_a_path_is_refused(folder, tmp_path):
    node = tmp_path / "node"
    node.mkdir()
    (node / "node.json").write_text('{"client": "../client-000", "host": "localhost", "port": 1}')
    with pytest.raises(ValueError, match=r"node.json: '../client-000' is no name"):
        deployment.supernode_command(node, tmp_path)
    with pytest.raises(ValueError, match="client: '../../server' is no name"):
        deployment.add_client(folder, "../../server")


def test_the_app_that_flower_carries_to_clients_holds_no_code(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deployment.flwr(folder, "build", "--app", str(folder / "app"))
    (app,) = tmp_path.glob("*.fab")
    assert not [name for name in zipfile.ZipFile(app).namelist() if name.endswith(".py")]


def test_a_federation_that_is_not_there_is_named(tmp_path, capsys):
    assert cli.main(["deploy", "register", str(tmp_path)]) != 0
    said = capsys.readouterr().err
    assert "federation.json" in said
    assert "prepare" in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["prepare", "RUN", "--host", "::1"], "give a name or an IPv4"), (["register", "RUN", "a/b"], "'a/b' is no name")],
)
def test_a_host_or_client_that_cannot_be_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # of the process that runs the tests
    deployment.prepare(tmp_path / deployment.FOLDER, CLIENTS)
    (tmp_path / "01_partition").mkdir()
    pd.DataFrame({"client": CLIENTS}).to_parquet(tmp_path / "01_partition" / "clients.parquet")
    assert cli.main(["deploy", *(str(tmp_path) if word == "RUN" else word for word in arguments)]) != 0
    said = capsys.readouterr().err
    assert said.startswith("fedhubert: ") and reason in said and said.count("\n") == 1


def test_a_run_is_named_or_a_folder_which_comes_first(outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # of the process that runs the tests
    monkeypatch.setattr(deployment, "serve", lambda folder, bind: print(folder))
    monkeypatch.chdir(tmp_path)
    for folder in (outputs / "study", tmp_path / "study"):
        folder.mkdir()
        cli.main(["deploy", "server", "study"])
        given = Path("study") if folder.parent == tmp_path else folder
        assert capsys.readouterr().out == f"{given / deployment.FOLDER}\n"


def test_records_that_a_server_needs_are_named(tmp_path):
    (tmp_path / "00_corpus").mkdir()
    (tmp_path / "00_corpus" / "done.json").touch()
    with pytest.raises(deployment.DeploymentError, match="needs 01_partition/done.json, 01_partition/clients.parquet"):
        deployment.check_records(tmp_path)


# --------------------------------------------------------------------------------------------------------------- Slurm

PROGRAM = """#!/bin/bash
trap 'touch told; sleep 0.5; exit 75' USR2
touch begun
if [ "$CODE" ]; then exit $CODE; fi
while true; do sleep 0.1; done
"""
"""Stands for fedhubert: finishes its checkpoint after USR2 and exits with 75, or ends by itself with CODE."""


@pytest.mark.parametrize(("ends", "signals"), [(None, 1), (None, 2), ("0", 0), ("1", 0), ("75", 0)])
def test_the_slurm_script_of_the_readme_requeues_what_was_stopped(tmp_path, ends, signals):
    text = (params.ROOT / "README.md").read_text()
    script = textwrap.dedent(text[text.index("    #!/bin/bash") :].split("\n\n")[0])
    for name, content in {
        "job.sh": script,
        ".venv/bin/fedhubert": PROGRAM,
        "bin/scontrol": '#!/bin/bash\necho "$@" >> requeued\n',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"SLURM_JOB_ID": "42", "DATA": "/data", "CODE": ends or "", "PATH": path}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment)
    try:
        for mark in ["begun", "told"][:signals]:
            while not (tmp_path / mark).exists():
                time.sleep(0.01)
            job.send_signal(signal.SIGUSR2)
        code = job.wait(timeout=600)
    finally:
        job.kill()
    assert code == int(ends or 75)
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 42\n" if code == 75 else "")
