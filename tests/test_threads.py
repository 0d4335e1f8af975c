"""Threads are as many as were granted, wherever that is written, and wait without a core."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from fedhubert_lib import threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """16 cores, no quota, no Slurm; returns how to write a file of a pretended /sys/fs/cgroup."""
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(threads, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "MEMBERSHIP", tmp_path / "membership")

    def write(place, text):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def test_affinity(machine, monkeypatch):
    assert threads.cores() == threads.count() == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7})
    assert threads.cores() == 2


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "200000 100000\n"}, 2),  # a container
        ("0::/", {"cpu.max": "max 100000\n"}, 16),
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),  # half a core is one thread
        ("0::/slurm/job_1/step_0", {"slurm/job_1/cpu.max": "400000 100000\n", "slurm/cpu.max": "max 100000"}, 4),
        ("0::/slurm/job_1/step_0", {"slurm/job_1/step_0/cpu.max": "300000 100000\n", "cpu.max": "max 100000"}, 3),
        ("4:cpu,cpuacct:/a\n1:name=systemd:/", {"cpu,cpuacct/a/cpu.cfs_quota_us": "600000"}, 6),  # version 1
        ("4:cpu:/docker/of-the-host\n0::/", {"cpu/cpu.cfs_quota_us": "500000"}, 5),
        ("4:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1"}, 16),
        ("5:cpuset:/\n0::/", {"cpuset/cpu.cfs_quota_us": "100000"}, 16),
    ],
)
def test_quotas_of_control_groups(machine, membership, files, cores):
    machine("membership", membership)
    for place, text in files.items():
        machine(f"cgroup/{place}", text)
        machine(f"cgroup/{place.replace('quota', 'period')}", "100000") if "quota" in place else None
    assert threads.cores() == cores


def test_slurm(machine, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    assert threads.cores() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert threads.cores() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")  # more than there are
    assert threads.cores() == 16


def test_what_somebody_has_chosen_holds(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert threads.count() == 3 and threads.cores() == 16
    monkeypatch.setattr(os, "environ", os.environ.copy())
    threads.configure()
    assert os.environ["OMP_NUM_THREADS"] == "3,1"


def test_libraries_and_children_are_told_on_import():
    """Before torch is loaded, which reads it once."""
    code = "import fedhubert_lib, os, torch; print(os.environ['GOMP_SPINCOUNT'], torch.get_num_threads())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | {"SLURM_CPUS_PER_TASK": "1"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["1000", "1"]


def test_each_works_on_all_cores_with_a_thread_on_each(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    together = threading.Barrier(3, timeout=300)
    before = torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()]

    def work(item):
        together.wait()  # passes only where three are at work at once
        np.ones((200, 200)) @ np.ones((200, 200))
        return item, torch.get_num_threads(), {pool["num_threads"] for pool in threadpool_info()}

    assert list(threads.each(work, range(6))) == [(item, 1, {1}) for item in range(6)]
    assert (torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()]) == before


def test_each_ends_at_the_first_error():
    done = []

    def work(item):
        if item == 1:
            raise ValueError("here")
        done.append(item)

    with pytest.raises(ValueError, match="here"):
        list(threads.each(work, range(10_000)))
    assert len(done) < 10_000


def test_limited_gives_back_what_was():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads.limited(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    with threads.limited(0):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
