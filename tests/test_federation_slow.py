"""What takes a while: kill -9 at random moments, and a federation of all of LibriSpeech's 2,338 speakers."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from federation import make, pretrain, rows

from fedhubert_lib import federated, files, hubert, pretraining
from fedhubert_lib.federated import checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked child cannot use the threads that its parent started."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    monkeypatch.setitem(hubert.PRESETS, "tiny", {**hubert.PRESETS["tiny"], **narrow})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(stage, run: Path, p) -> int:
    """Run ``stage`` in a child process; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            stage(run, p)
            code = 0
        finally:
            os._exit(code)
    return child


def killed_after(child: int, metrics: Path, more: int, pause: float) -> bool:
    """Kill ``child`` ``pause`` seconds after it wrote ``more`` rows; False if it ended before, as it should."""
    last, written = len(files.read_rows(metrics)), 0
    while written < more:
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            assert ended[1] == 0
            return False
        now = len(files.read_rows(metrics))  # a start first drops the rows of rounds that it does again
        last, written = now, written + max(0, now - last)
        time.sleep(0.001)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


@pytest.mark.parametrize(
    ("stage", "below", "most"),
    [(pretraining.run, "03_pretrain", 6), (pretraining.centralised, "03_pretrain/centralised", 2)],
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

    p = pretrain(rounds=8, cohort=64, local_steps=1, head="personal", validate_every=8)
    pretraining.run(run, p, watch)
    assert federated.client_ids(run) == ids
    assert max(memory[2:]) - memory[1] < 32 * 2**20  # the cohort's updates alone are three times that
    ledger = files.read_rows(run / "03_pretrain/metrics.jsonl")
    took_part = {row["client"] for row in ledger if row["kind"] == "client"}
    assert 400 < len(took_part) <= 8 * 64
    assert {path.name for path in (run / "03_pretrain/clients").iterdir()} == took_part
    assert len(checkpoints.rounds(run / "03_pretrain")) <= 2
