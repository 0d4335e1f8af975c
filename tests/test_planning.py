"""What pretraining will need, by a measured step, on this machine and on pretended ones."""

import pytest
import torch

from fedhubert_lib import hubert, params, planning, resources
from fedhubert_lib.federated import pool

P = params.Pretrain(crop_seconds=4.0, batch_seconds=16.0, precision="float32")
MODEL = hubert.preset("tiny", num_hidden_layers=1), 10
GIB = 2**30


@pytest.mark.slow
def test_measure_step_needs_more_memory_for_a_larger_batch():
    """Whatever this process has held: a child's getrusage begins with its parent's peak."""
    torch.ones(2**29)  # 2 GiB
    one, many = (planning.measure_step(P, *MODEL, clips, "cpu") for clips in (1, 4))
    assert 2**30 > many.bytes > one.bytes > 2**20


@pytest.mark.parametrize("pooled", [0.0, 20.0])
def test_workers_share_the_clients_steps_and_no_pooled_ones(pooled):
    plan = planning.Plan("cpu", planning.Step(16.0, 0.5, GIB), 1_500_000, 50, 30, pooled, workers=2)
    assert plan.seconds == pytest.approx(30 * 0.5 + pooled), "rounds of 5 clients are three turns of 2 workers"
    assert "1.5 M parameters on cpu" in str(plan) and "50 steps, by 2 workers" in str(plan)
    assert ("as many in one process on pooled data" in str(plan)) == bool(pooled)


def pretend(monkeypatch, gpus: int, free: int, visible: str = "") -> None:
    """A machine with ``gpus`` GPUs of ``free`` bytes, as this process sees them, on which a clip needs 1 GiB."""

    def step(p, config, clusters, clips, device):
        if clips * GIB > free:
            raise torch.OutOfMemoryError
        return planning.Step(clips * p.crop_seconds, 0.5, clips * GIB)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(resources, "free_memory", lambda device: free)
    monkeypatch.setattr(planning, "measure_step", step)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def workers(engine: str, device: str, batch_seconds: float = 16.0) -> int:
    """Workers that share the steps. Raises MemoryError when theirs do not fit."""
    count, p = pool.side_by_side(engine, device), P.model_copy(update={"batch_seconds": batch_seconds})
    assert planning.fitting_step(p, *MODEL, resources.resolve(device), count).audio_seconds == batch_seconds
    return count


def test_eight_gpus(monkeypatch):
    pretend(monkeypatch, 8, 80 * GIB)
    assert pool.devices("cuda") == [f"cuda:{index}" for index in range(8)]
    assert workers("pool", "auto") == workers("pool", "cuda") == 8
    assert workers("inprocess", "auto") == workers("pool", "cuda:7") == 1
    with pytest.raises(ValueError, match=r"'cuda:8': this process sees 8 GPUs; give cuda:0 or the like"):
        resources.resolve("cuda:8")


def test_a_batch_that_full_crops_do_not_fill_is_measured_with_shorter_ones(monkeypatch):
    measured = []
    monkeypatch.setattr(
        planning, "measure_step", lambda p, config, clusters, clips, device: measured.append((clips, p))
    )
    planning.fitting_step(P.model_copy(update={"batch_seconds": 30.0, "crop_seconds": 15.6}), *MODEL, "cpu")
    ((clips, p),) = measured
    assert (clips, p.crop_seconds) == (2, 15.0)


def test_two_gpus_of_eight_gib(monkeypatch):
    pretend(monkeypatch, 2, 8 * GIB)
    assert workers("pool", "cuda") == 2
    with pytest.raises(MemoryError, match="64.0 does not fit on cuda, of which 8.0 GiB are free"):
        workers("pool", "cuda", 64.0)


@pytest.mark.parametrize("visible", ["3", "MIG-a1b2c3d4-0000-1111-2222-333344445555"])
def test_one_visible_gpu_or_part_of_one_is_the_first(monkeypatch, visible):
    pretend(monkeypatch, 1, 10 * GIB, visible)
    assert resources.resolve("auto") == "cuda"
    assert pool.devices("cuda") == ["cuda:0"]
    assert workers("pool", "auto") == 1
    with pytest.raises(ValueError, match=rf"sees 1 GPUs .CUDA_VISIBLE_DEVICES={visible}."):
        resources.resolve("cuda:3")


def test_no_gpu(monkeypatch):
    pretend(monkeypatch, 0, 10 * GIB)
    assert resources.resolve("auto") == "cpu"
    with pytest.raises(ValueError, match="this process sees 0 GPUs"):
        resources.resolve("cuda")
    with pytest.raises(ValueError, match="'gpu': auto, cpu, cuda or cuda:NUMBER is expected"):
        resources.resolve("gpu")
    monkeypatch.setattr(pool, "devices", lambda device: ["cpu"] * 4)
    with pytest.raises(MemoryError, match=r"4 workers' steps need 16.0 GiB, and 10.0 are free"):
        workers("pool", "cpu")
    assert workers("pool", "cpu", 8.0) == 4


@pytest.mark.parametrize(("devices", "cohort", "turns", "workers"), [(4, 6, 20, 4), (4, 3, 10, 3), (1, 6, 60, 1)])
def test_a_plan_counts_rounds_clients_and_the_turns_of_workers(tmp_path, monkeypatch, devices, cohort, turns, workers):
    pretend(monkeypatch, 0, 100 * GIB)
    monkeypatch.setattr(pool, "devices", lambda device: ["cpu"] * devices)
    monkeypatch.setattr(planning.recipes, "clusters", lambda run, codebook: 10)
    changes = {"rounds": 5, "local_steps": 2, "cohort": cohort, "engine": "pool", "device": "cpu"}
    plan = planning.plan(tmp_path, P.model_copy(update=changes | {"centralised": False}))
    assert (plan.steps, plan.turns, plan.workers) == (10 * cohort, turns, workers)
    assert plan.seconds == turns * 0.5
    beside = planning.plan(tmp_path, P.model_copy(update=changes | {"centralised": True}))
    assert beside.pooled == beside.seconds - plan.seconds > 0
