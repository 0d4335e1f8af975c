"""What a run will need, by a measured step, on this machine and on pretended ones."""

import pytest
import torch

from fedhubert_lib import federated, hubert, planning, resources

WORK = planning.Workload(hubert.preset("tiny", num_hidden_layers=1), 10, 4.0, "float32")
GIB = 2**30


@pytest.mark.slow
def test_measure_step_needs_more_memory_for_a_larger_batch():
    """Whatever this process has held: a child's getrusage begins with its parent's peak."""
    torch.ones(2**29)  # 2 GiB
    one, many = (planning.measure_step(WORK, clips, "cpu") for clips in (1, 4))
    assert 2**30 > many.bytes > one.bytes > 2**20


@pytest.mark.parametrize("fits", [1, 2, 3, 7, 16, 29])
def test_largest_batch_is_the_last_that_fits(monkeypatch, fits):
    """With steps of known memory: measured ones depend on what the system reclaims meanwhile."""
    monkeypatch.setattr(
        planning, "measure_step", lambda work, n, device: planning.Step(n * 4.0, 1.0, (n << 24) + 2**20)
    )
    monkeypatch.setattr(resources, "free_memory", lambda device: (2**20 + (fits + 0.5) * 2**24) / 0.8)
    assert planning.largest_batch(WORK, "cpu", at_most=400.0) == 4.0 * fits
    assert planning.largest_batch(WORK, "cpu", at_most=10.0) == 4.0 * min(fits, 2)
    monkeypatch.setattr(resources, "free_memory", lambda device: 2**20)
    with pytest.raises(MemoryError, match="does not fit"):
        planning.largest_batch(WORK, "cpu", at_most=400.0)


@pytest.mark.slow
def test_plan_on_this_machine():
    plan = planning.plan(WORK, batch_seconds=8.0, steps=50)
    assert plan.seconds == pytest.approx(50 * plan.step.seconds)
    assert "M parameters on cpu" in str(plan) and "50 steps" in str(plan)


def pretend(monkeypatch, gpus: int, free: int, visible: str = "") -> None:
    """A machine with ``gpus`` GPUs of ``free`` bytes, as this process sees them, on which a clip needs 1 GiB."""

    def step(work, clips, device):
        if clips * GIB > free:
            raise torch.OutOfMemoryError
        return planning.Step(clips * work.crop_seconds, 0.5, clips * GIB)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(resources, "free_memory", lambda device: free)
    monkeypatch.setattr(planning, "measure_step", step)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def plan(engine: str, device: str, batch_seconds: float = 16.0) -> planning.Plan:
    workers = federated.side_by_side(engine, device)
    return planning.plan(WORK, batch_seconds, 800, resources.resolve(device), workers)


def test_eight_gpus(monkeypatch):
    pretend(monkeypatch, 8, 80 * GIB)
    assert federated.devices("cuda") == [f"cuda:{index}" for index in range(8)]
    assert plan("pool", "auto").seconds == 800 * 0.5 / 8
    assert "by 8 workers" in str(plan("pool", "cuda"))
    assert plan("inprocess", "auto").seconds == plan("pool", "cuda:7").seconds == 400.0
    with pytest.raises(ValueError, match=r"'cuda:8': this process sees 8 GPUs; they count from cuda:0"):
        resources.resolve("cuda:8")


def test_two_gpus_of_eight_gib(monkeypatch):
    pretend(monkeypatch, 2, 8 * GIB)
    assert plan("pool", "cuda").workers == 2
    with pytest.raises(MemoryError, match="64.0 does not fit on cuda; 24 does"):
        plan("pool", "cuda", 64.0)


@pytest.mark.parametrize("visible", ["3", "MIG-a1b2c3d4-0000-1111-2222-333344445555"])
def test_one_visible_gpu_or_part_of_one_is_the_first(monkeypatch, visible):
    pretend(monkeypatch, 1, 10 * GIB, visible)
    assert resources.resolve("auto") == "cuda"
    assert federated.devices("cuda") == ["cuda:0"]
    assert plan("pool", "auto").workers == 1
    with pytest.raises(ValueError, match=rf"sees 1 GPUs .CUDA_VISIBLE_DEVICES={visible}."):
        resources.resolve("cuda:3")


def test_no_gpu(monkeypatch):
    pretend(monkeypatch, 0, 10 * GIB)
    assert resources.resolve("auto") == "cpu"
    with pytest.raises(ValueError, match="this process sees 0 GPUs"):
        resources.resolve("cuda")
    with pytest.raises(ValueError, match="torch knows none of that name"):
        resources.resolve("gpu")
    monkeypatch.setattr(federated, "devices", lambda device: ["cpu"] * 4)
    with pytest.raises(MemoryError, match=r"4 workers' steps need 16.0 GiB, and 10.0 are free"):
        plan("pool", "cpu")
    assert plan("pool", "cpu", 8.0).workers == 4
