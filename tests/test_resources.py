"""Measured facts about this machine."""

import pytest
import torch

from fedhubert_lib import hubert, resources

CONFIG = hubert.preset("tiny", num_hidden_layers=1)


def test_description_and_usage():
    facts = resources.describe()
    assert facts["cores"] >= 1 and facts["memory"] > 2**28
    meter = resources.Meter()
    torch.randn(400, 400) @ torch.randn(400, 400)
    row = meter.read()
    assert row["cpu_seconds"] > 0 and row["memory_bytes"] > 2**26
    assert resources.usage()["memory_bytes"] > 2**26


@pytest.mark.slow
def test_a_larger_batch_is_measured_to_need_more():
    """Whatever this process has held: a child's getrusage begins with its parent's peak."""
    torch.ones(2**29)  # 2 GiB
    one = resources.measure_step(CONFIG, 10, 1, 4.0, torch.device("cpu"), "float32", False)
    many = resources.measure_step(CONFIG, 10, 4, 4.0, torch.device("cpu"), "float32", False)
    assert 2**30 > many.bytes > one.bytes > 2**20


@pytest.mark.parametrize("fits", [1, 2, 3, 7, 16, 29])
def test_largest_batch_is_the_last_that_fits(monkeypatch, fits):
    """With steps of known memory: measured ones depend on what the system reclaims meanwhile."""

    def step(config, clusters, clips, crop_seconds, device, *chosen):
        return resources.Step(clips * crop_seconds, 1.0, 2**20 + clips * 2**24)

    monkeypatch.setattr(resources, "measure_step", step)
    monkeypatch.setattr(resources, "free_memory", lambda device: (2**20 + (fits + 0.5) * 2**24) / 0.8)
    assert resources.largest_batch(CONFIG, 10, 4.0) == 4.0 * fits
    monkeypatch.setattr(resources, "free_memory", lambda device: 2**20)
    with pytest.raises(MemoryError, match="does not fit"):
        resources.largest_batch(CONFIG, 10, 4.0)


@pytest.mark.slow
def test_plan_says_what_a_run_needs():
    plan = resources.plan(CONFIG, clusters=10, batch_seconds=8.0, crop_seconds=4.0, steps=50)
    assert plan.seconds == pytest.approx(50 * plan.step.seconds)
    assert "M parameters on cpu" in str(plan) and "50 steps" in str(plan)
