"""Measured facts about this machine."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from fedhubert_lib import resources


def test_description_and_meter():
    facts = resources.describe()
    assert facts["cores"] >= 1 and facts["memory"] > 2**28
    row = resources.Meter("cpu").used()
    assert row["peak_memory_bytes"] > 2**26
    assert "gpu_joules" not in row


@pytest.mark.parametrize(
    ("answer", "joules"),
    [("300.50\n", True), ("[N/A]\n", False), ("[Not Supported]\n", False), ("nan", False), (None, False)],
)
def test_no_gpu_meter_stops_a_training(monkeypatch, answer, joules):
    """The device is named by its UUID: under CUDA_VISIBLE_DEVICES nvidia-smi counts otherwise."""
    asked = []

    def nvidia_smi(command, **_):
        asked.append(command)
        if answer is None:
            raise subprocess.TimeoutExpired(command, 5)
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    meter = resources.Meter("cuda")
    rows = [meter.used(), meter.used()]
    assert all(("gpu_joules" in row) == joules for row in rows)
    assert "--id=GPU-1234" in asked[0]
    assert len(asked) == (3 if joules else 1)  # who does not know is not asked again
    for error in (FileNotFoundError("nvidia-smi"), subprocess.CalledProcessError(6, "nvidia-smi")):
        monkeypatch.setattr(subprocess, "run", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        assert "gpu_joules" not in resources.Meter("cuda:0").used()


def test_a_server_without_a_gpu_meters_a_study_on_gpus():
    assert "gpu_memory_bytes" not in resources.Meter("cuda:3").used()
