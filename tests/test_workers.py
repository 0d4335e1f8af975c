"""The worker engines' hand-over: tensors in shared memory."""

import pytest
import torch

from fedhubert_lib.federated import pool


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
def test_a_parcel_arrives_as_it_was(content):
    parcel = pool.Parcel(content)
    received = pool.read(parcel.address)
    assert list(received) == list(content)
    for name, tensor in content.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)


def test_readers_cannot_change_each_others_tensors_and_outlive_the_parcel():
    parcel = pool.Parcel({"weight": torch.ones(1000)})
    first, second = pool.read(parcel.address), pool.read(parcel.address)
    first["weight"].zero_()
    assert second["weight"].sum() == 1000
    del parcel
    assert second["weight"].sum() == 1000


def test_one_worker_per_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert pool.devices("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert pool.devices("cuda:1") == ["cuda:1"]
    assert pool.devices("cpu") == ["cpu"] * 4
