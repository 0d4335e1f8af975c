"""What takes a while: kill -9 at random moments, all of LibriSpeech's 2,338 speakers, deployments by their commands."""

import multiprocessing
import multiprocessing.process
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from federation import make, pretrain, rows, train_narrow

from fedhubert_lib import checkpoints, federated, files, params, pooled, pretraining
from fedhubert_lib.federated import deployment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow")]


FORKS = multiprocessing.get_context("forkserver")
"""A child forked from the tests' own process would wait for ever for threads that other tests have started there."""
FORKS.set_forkserver_preload(["fedhubert_lib.pretraining"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(stage, run: Path, p) -> multiprocessing.process.BaseProcess:
    """Run ``stage`` in a child process."""
    child = FORKS.Process(target=train_narrow, args=(stage, run, p))
    child.start()
    return child


def killed_after(child: multiprocessing.process.BaseProcess, metrics: Path, more: int, pause: float) -> bool:
    """Kill ``child`` ``pause`` seconds after it wrote ``more`` rows; False if it ended before, as it should."""
    last, written = len(files.read_rows(metrics)), 0
    while written < more:
        if child.exitcode is not None:
            assert child.exitcode == 0
            return False
        now = len(files.read_rows(metrics))  # a start first drops the rows of rounds that it does again
        last, written = now, written + max(0, now - last)
        time.sleep(0.001)
    time.sleep(pause)
    child.kill()
    child.join()
    return True


@pytest.mark.parametrize(
    ("stage", "below", "most"),
    [(pretraining.run, "03_pretrain", 6), (pooled.train, "03_pretrain/centralised", 2)],
    ids=["federated", "centralised"],
)
def test_chaos_any_number_of_kills_ends_with_the_same_files(stage, below, most, tmp_path, one_thread):
    """Personal heads, kept moments and SCAFFOLD's variates on clients' disks, moments on the server's: all in play."""
    p = pretrain(rounds=8, head="personal", local_state="keep", server="scaffold", server_rate=1.0)
    whole, parts = make(tmp_path / "whole"), make(tmp_path / "parts")
    stage(whole, p)
    generator, kills = random.Random(0), 0
    while killed_after(
        start(stage, parts, p), parts / below / "metrics.jsonl", generator.randint(0, most), generator.uniform(0, 0.1)
    ):
        kills += 1
    assert kills >= 3
    assert contents(parts / below / "checkpoint") == contents(whole / below / "checkpoint")
    assert rows(parts / below / "metrics.jsonl") == rows(whole / below / "metrics.jsonl")


def test_all_speakers_of_librispeech_in_one_process(tmp_path):
    """Memory stays where it was after the first rounds; state is on disk, of those alone who took part."""
    base = make(tmp_path / "base", clients=8, utterances=2)
    run = tmp_path / "run"
    ids = [f"client-{number:04d}" for number in range(2338)]
    for stage in ("01_partition", "02_kmeans"):
        (run / stage / "clients").mkdir(parents=True)
        for number, client in enumerate(ids):
            (run / stage / "clients" / client).symlink_to(base / stage / "clients" / f"client-{number % 8:03d}")
    pd.DataFrame({"client": ids}).to_parquet(run / "01_partition" / "clients.parquet")
    (run / "02_kmeans" / "codebooks").symlink_to(base / "02_kmeans" / "codebooks")
    process, memory = psutil.Process(), []

    def watch(row):
        if row["kind"] == "round":
            memory.append(process.memory_info().rss)

    p = pretrain(rounds=6, cohort=64, local_steps=1, head="personal", validate_every=6)
    pretraining.run(run, p, watch)
    assert federated.client_ids(run) == ids
    assert max(memory[2:]) - memory[1] < 32 * 2**20  # the cohort's updates alone are three times that
    ledger = files.read_rows(run / "03_pretrain/metrics.jsonl")
    took_part = {row["client"] for row in ledger if row["kind"] == "client"}
    assert 300 < len(took_part) <= 6 * 64
    assert {path.name for path in (run / "03_pretrain/clients").iterdir()} == took_part
    assert len(checkpoints.rounds(run / "03_pretrain")) <= 2


# ---------------------------------------------------------------------------------------------------------- deployment

TWO = shlex.split("--set partition.clients=2 --set pretrain.cohort=2 --set distill.cohort=2")
SHORT = TWO + shlex.split(
    "--set kmeans.codebooks=[federated] --set kmeans.lloyd_rounds=1 --set pretrain.rounds=1 --set distill.rounds=1"
    " --set pretrain.validate_every=2 --set evaluate.seeds=1 --set evaluate.probe_steps=10"
)


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory) -> Path:
    """The run folder ``toy`` as the first command of docs/deployment.md leaves it, with two clients."""
    outputs = tmp_path_factory.mktemp("outputs")
    assert code(outputs, "run params/toy.yaml --until partition", *TWO) == 0
    return outputs / "toy"


def fedhubert(outputs: Path, line: str, *more: str) -> subprocess.Popen:
    """Start the command ``line`` without ``fedhubert``, where proxies are set that nobody listens at."""
    dead = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    environment = os.environ | dead | {"FEDHUBERT_OUTPUTS": str(outputs), "OMP_NUM_THREADS": "1"}
    program = str(Path(sys.executable).with_name("fedhubert"))
    words = [word.replace("outputs/", f"{outputs}/") for word in shlex.split(line, comments=True)]
    return subprocess.Popen([program, *words, *more], env=environment, cwd=params.ROOT)


def code(outputs: Path, line: str, *more: str) -> int:
    """The exit code of the command ``line``, which is stopped if this process is."""
    process = fedhubert(outputs, line, *more)
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()


def done(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("*/done.json"))


@pytest.mark.timeout(1800)  # a busy machine takes its time
def test_nodes_on_one_machine_by_the_commands_of_the_documentation(partitioned, tmp_path):
    """With the records that the other engines leave; here the first stage alone."""
    shutil.copytree(partitioned, tmp_path / "toy")
    text = (params.ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    text = text[text.index("## Three nodes") :]
    lines = re.findall(r"^    fedhubert (.*)$", text[: text.index("The last command")], re.MULTILINE)
    assert [line.split("#")[0].split()[:2] for line in lines][1:] == [["deploy", "prepare"], ["deploy", "local"]]
    assert code(tmp_path, lines[1].split("#")[0], "--port", str(deployment.free_port())) == 0
    (tmp_path / "toy/01_partition/done.json").rename(tmp_path / "done.json")
    assert code(tmp_path, lines[2].split("#")[0], "kmeans", *SHORT) == 1  # said before anything starts
    (tmp_path / "done.json").rename(tmp_path / "toy/01_partition/done.json")
    assert code(tmp_path, lines[2].split("#")[0], "kmeans", *SHORT) == 0
    assert done(tmp_path / "toy") == list(params.FOLDERS.values())[:3]
    assert (tmp_path / "toy/02_kmeans.ipynb").exists()


@pytest.mark.timeout(3600)
def test_a_server_without_a_file_of_a_client_goes_from_kmeans_to_the_table(partitioned, tmp_path):
    """Server and clients in folders of their own; stopped in the middle, the same command resumes."""
    server = tmp_path / "toy"
    shutil.copytree(partitioned, server)
    clients = federated.client_ids(server)
    assert code(tmp_path, f"deploy prepare outputs/toy --port {deployment.free_port()}") == 0
    for client in clients:
        assert code(tmp_path, f"export-client outputs/toy {client} {tmp_path / client}") == 0
    shutil.rmtree(server / "01_partition" / "clients")
    running = [fedhubert(tmp_path, "deploy server outputs/toy")]
    try:
        while not (server / deployment.FOLDER / deployment.REGISTERED).exists():
            assert running[0].poll() is None
            time.sleep(0.2)
        for client in clients:
            node = server / deployment.FOLDER / "nodes" / client
            running.append(fedhubert(tmp_path, f"deploy client {tmp_path / client} {node}"))
        stages = "deploy run outputs/toy params/toy.yaml"
        changes = "--set pretrain.centralised=false --set distill.centralised=false --set pretrain.rounds=2"
        alone = [*SHORT, *shlex.split(changes)]
        running.append(stopped := fedhubert(tmp_path, f"{stages} kmeans pretrain", *alone))
        while not checkpoints.rounds(server / "03_pretrain"):
            assert stopped.poll() is None
            time.sleep(0.1)
        stopped.send_signal(signal.SIGUSR2)
        assert stopped.wait() == 75
        assert code(tmp_path, stages, *alone) == 0
    finally:
        for process in running:
            process.terminate()
        assert all(process.wait(timeout=600) is not None for process in running)
    assert [row["round"] for row in rows(server / "03_pretrain/metrics.jsonl") if row["kind"] == "round"] == [1, 2]
    assert done(server) == list(params.FOLDERS.values())
    assert {"teacher", "student"} <= set(pd.read_csv(server / "05_evaluate" / "report.csv")["system_name"])
    assert not list(server.glob("0[1234]_*/clients"))


def test_pooled_training_on_a_server_without_the_clients_folders_is_refused(tmp_path):
    """Before a round begins, and before anybody is asked."""
    run = make(tmp_path)
    shutil.rmtree(run / "01_partition" / "clients" / "client-000")
    with pytest.raises(FileNotFoundError, match="centralised: false"):
        pretraining.run(run, pretrain(engine="deployment"))
