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
def test_largest_batch_is_found_by_measuring(monkeypatch):
    one = resources.measure_step(CONFIG, 10, 1, 4.0, torch.device("cpu"), "float32")
    many = resources.measure_step(CONFIG, 10, 16, 4.0, torch.device("cpu"), "float32")
    assert many.bytes > one.bytes > 2**20
    monkeypatch.setattr(resources, "free_memory", lambda device: (one.bytes + many.bytes) / 2 / 0.8)
    assert 4.0 <= resources.largest_batch(CONFIG, 10, 4.0) < 64.0
    monkeypatch.setattr(resources, "free_memory", lambda device: 2**20)
    with pytest.raises(MemoryError, match="does not fit"):
        resources.largest_batch(CONFIG, 10, 4.0)


@pytest.mark.slow
def test_plan_says_what_a_run_needs():
    plan = resources.plan(CONFIG, clusters=10, batch_seconds=8.0, crop_seconds=4.0, steps=50)
    assert plan.seconds == pytest.approx(50 * plan.step.seconds)
    assert "M parameters on cpu" in str(plan) and "50 steps" in str(plan)
