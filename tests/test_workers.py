"""The worker engines' hand-over, and how many workers a machine has."""

import resource

import pytest
import torch

from fedhubert_lib.federated import pool, wire
from fedhubert_lib.federated.protocol import Failure, Reply


def arrays() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(33, 7, generator=generator),
        "transposed": torch.randn(5, 3, generator=generator).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "labels": torch.arange(9, dtype=torch.int8),
        "half": torch.randn(3, generator=generator).half(),
        "bfloat": torch.randn(3, generator=generator).bfloat16(),
    }


@pytest.mark.parametrize("content", [{}, arrays()], ids=["empty", "all dtypes"])
def test_a_message_arrives_as_it_was(content, tmp_path):
    wire.write(tmp_path / "message", {"action": "identify", "config": {"a": [1, None]}}, content)
    header, received = wire.read(tmp_path / "message")
    assert header == {"action": "identify", "config": {"a": [1, None]}}
    assert list(received) == list(content)
    for name, tensor in content.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)


def test_a_message_that_cannot_be_written_is_named(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: '.*/message'"):
            wire.write(tmp_path / "message", {}, {"weight": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_readers_cannot_change_each_others_tensors_which_outlive_the_file(tmp_path):
    path = tmp_path / "message"
    wire.write(path, {}, {"weight": torch.ones(1000)})
    (_, first), (_, second) = wire.read(path), wire.read(path)
    path.unlink()
    first["weight"].zero_()
    assert second["weight"].sum() == 1000


@pytest.mark.parametrize("answer", [Failure("a", "gone"), Reply("a", {}, {"seconds": 1.0})])
def test_an_answer_is_read_once(answer, tmp_path):
    wire.write_answer(tmp_path / "answer", answer)
    assert wire.read_answer(tmp_path / "answer") == answer
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reason", ["AcceleratorError: CUDA error: device-side assert", "ValueError: no label"])
def test_a_worker_ends_when_its_gpu_is_lost_and_only_then(monkeypatch, reason):
    codes = []
    monkeypatch.setattr(pool.os, "_exit", codes.append)
    pool.leave_lost_gpu(Failure("client-001", reason))
    assert codes == ([1] if "CUDA" in reason else [])


def test_one_worker_per_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert pool.devices("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert pool.devices("cuda:1") == ["cuda:1"]
    assert pool.devices("cpu") == ["cpu"] * 4
