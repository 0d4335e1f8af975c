"""What is granted to this process and what it has used, on this machine and on pretended ones."""

import os
from types import SimpleNamespace

import pynvml
import pytest
import torch

from fedhubert_lib import identity, resources, threads
from fedhubert_lib.meter import Meter


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """16 cores and 64 GiB, no quota, no Slurm; returns how to write a file of a pretended /sys/fs/cgroup."""
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    memory = SimpleNamespace(total=64 << 30, available=48 << 30)
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(resources, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "MEMBERSHIP", tmp_path / "membership")

    def write(place, text):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def test_cores_by_affinity_and_slurm(machine, monkeypatch):
    assert resources.cores() == threads.count() == 16
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    assert resources.cores() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert resources.cores() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")  # more than the machine has
    assert resources.cores() == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7})
    assert resources.cores() == 2


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
def test_cores_by_quotas_of_control_groups(machine, membership, files, cores):
    machine("membership", membership)
    for place, text in files.items():
        machine(f"cgroup/{place}", text)
        if "quota" in place:
            machine(f"cgroup/{place.replace('quota', 'period')}", "100000")
    assert resources.cores() == cores


@pytest.mark.parametrize(
    ("membership", "files", "limit", "free"),
    [
        ("0::/", {}, 64, 48),
        ("0::/", {"memory.max": 8, "memory.current": 3}, 8, 5),  # a container
        ("0::/slurm/job_1/step_0", {"slurm/job_1/memory.max": 16, "slurm/job_1/memory.current": 6}, 16, 10),
        ("0::/a/b", {"a/b/memory.max": "max", "a/b/memory.current": 1, "a/memory.max": 4, "a/memory.current": 3}, 4, 1),
        ("0::/a", {"memory.max": 128, "memory.current": 1}, 64, 48),  # more than the machine has
        ("9:memory:/a", {"memory/a/memory.limit_in_bytes": 2, "memory/a/memory.usage_in_bytes": 1}, 2, 1),  # version 1
        ("0::/", {"memory.max": 8, "memory.current": 7, "inactive_file": 4}, 8, 5),  # files that were read
        (
            "9:memory:/a",
            {"memory/a/memory.limit_in_bytes": 8, "memory/a/memory.usage_in_bytes": 7, "total_inactive_file": 4},
            8,
            5,
        ),
    ],
)
def test_memory_by_limits_of_control_groups(machine, membership, files, limit, free):
    machine("membership", membership)
    read = [f"{name} {gibibytes << 30}\n" for name, gibibytes in files.items() if name.endswith("inactive_file")]
    for place, gibibytes in files.items():
        if "/" in place or "." in place:
            machine(f"cgroup/{place}", gibibytes if gibibytes == "max" else f"{gibibytes << 30}\n")
            if read:  # not every kernel has it
                machine(f"cgroup/{place.rpartition('memory.')[0]}memory.stat", "".join(["inactive_file 0\n", *read]))
    assert resources.memory_limit() == limit << 30
    assert resources.free_memory(torch.device("cpu")) == free << 30


def test_memory_that_slurm_grants_counts_where_a_cluster_enforces_none(monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    assert resources.memory_limit() == 4 << 30
    assert resources.free_memory(torch.device("cpu")) < (4 << 30) - (100 << 20), "less what this process holds"
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    for name, value in {"MEM_PER_CPU": "1024", "CPUS_ON_NODE": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert resources.memory_limit() == 3 << 30


def test_hardware_and_meter_of_this_machine():
    facts = identity.hardware()
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 2**28 and facts["gpus"] == []
    row = Meter("cpu").used()
    assert row["peak_memory_bytes"] > 2**26 and row.keys() == {"peak_memory_bytes"}
    assert "gpu_memory_bytes" not in Meter("cuda:3").used(), "a server without a GPU meters a study on GPUs"


def test_the_meter_of_a_gpu_counts_its_joules_and_never_stops_a_training(monkeypatch):
    counters, handles = [5_000, 12_500], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handles.append)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: counters.pop(0))
    assert Meter("cuda").used()["gpu_joules"] == 7.5
    assert "gpu_joules" not in Meter("cuda", "pool").used(), "whose workers compute, on several GPUs perhaps"
    assert handles == ["GPU-1234"] * 2, "by UUID: under CUDA_VISIBLE_DEVICES the driver counts otherwise"

    def fail(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetHandleByUUID", "nvmlInit"):
        monkeypatch.setattr(pynvml, name, fail)
        assert "gpu_joules" not in Meter("cuda:0").used()
