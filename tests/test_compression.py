"""Encoded updates: size, error, error feedback, and what the server refuses to decode."""

import math

import pytest
import torch

from fedhubert_lib import seeds
from fedhubert_lib.federated import compression
from fedhubert_lib.federated.optimisers import UpdateError, checked_norm

SHAPES = {"layer.weight": (64, 257), "layer.bias": (257,), "conv.weight": (16, 8, 3), "scale": ()}
LOSSY = ["float16", "int8", "top-k"]


def update(round: int = 0, scale: float = 1e-3) -> dict[str, torch.Tensor]:
    generator = seeds.torch_generator(0, round, "compression-test")
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def size(arrays: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in arrays.values())


def test_int8_is_within_half_a_quantum_and_26_percent_of_the_bytes():
    sent = {"weight": update()["layer.weight"].repeat(8, 4)}
    encoded = compression.encode(sent, "int8")
    assert size(encoded) <= 0.26 * size(sent)
    decoded = compression.decode(encoded, "int8", sent)
    blocks, wrong = (
        sent["weight"].view(-1, compression.BLOCK),
        (decoded["weight"] - sent["weight"]).view(-1, compression.BLOCK),
    )
    quantum = blocks.abs().amax(1, keepdim=True) / 127
    assert (wrong.abs() <= quantum * 0.5001).all()
    assert wrong.abs().max() > 0


def test_top_k_sends_the_largest_values_exactly():
    sent = update()
    encoded = compression.encode(sent, "top-k", fraction=0.05)
    total = sum(value.numel() for value in sent.values())
    count = round(0.05 * total)
    assert size(encoded) == 8 * count
    decoded = compression.decode(encoded, "top-k", sent)
    flat, kept = (torch.cat([arrays[name].reshape(-1) for name in sorted(arrays)]) for arrays in (sent, decoded))
    assert int((kept != 0).sum()) == count
    assert torch.equal(kept[kept != 0], flat[kept != 0])
    assert flat[kept == 0].abs().max() <= kept[kept != 0].abs().min()


@pytest.mark.parametrize("kind", LOSSY)
def test_error_feedback_loses_nothing_for_good(kind):
    lost, true_sum, decoded_sum = None, 0, 0
    for round in range(30):
        sent = update(round)
        encoded, lost = compression.with_feedback(sent, kind, lost, fraction=0.1)
        decoded = compression.decode(encoded, kind, sent)
        true_sum = true_sum + sent["layer.weight"].double()
        decoded_sum = decoded_sum + decoded["layer.weight"].double()
    # What has not arrived is exactly what the client still holds (up to float32 rounding), and is no growing sum.
    assert torch.allclose(true_sum - decoded_sum, lost["layer.weight"].double(), atol=1e-8)
    assert lost["layer.weight"].abs().max() > 0
    if kind == "int8":
        assert (true_sum - decoded_sum).abs().max() < 1.1 * 0.5 * 5e-3 / 127


def test_without_feedback_top_k_never_delivers_small_values():
    """The test above could not fail if the feedback were not needed."""
    constant = {"weight": torch.tensor([1.0, 0.1])}
    plain = sum(
        compression.decode(compression.encode(constant, "top-k", fraction=0.5), "top-k", constant)["weight"]
        for _ in range(40)
    )
    lost, fed = None, torch.zeros(2)
    for _ in range(40):
        encoded, lost = compression.with_feedback(constant, "top-k", lost, fraction=0.5)
        fed += compression.decode(encoded, "top-k", constant)["weight"]
    assert plain[1] == 0
    assert torch.allclose(fed, torch.tensor([40.0, 4.0]), atol=1.2)


def test_zero_and_subnormal_updates_stay_finite():
    for value in (0.0, 1e-44):
        sent = {"weight": torch.full((5,), value)}
        for kind in LOSSY:
            decoded = compression.decode(compression.encode(sent, kind, fraction=0.5), kind, sent)
            assert torch.allclose(decoded["weight"], sent["weight"], atol=1e-40)


@pytest.mark.parametrize("kind", LOSSY)
def test_a_diverged_update_is_not_sent(kind):
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="weight has NaN or infinite"):
            compression.encode({"weight": torch.tensor([1.0, value])}, kind)


def spoil(encoded: dict[str, torch.Tensor], **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: value for name, value in (encoded | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("float16", {"bias": None}, "lacks"),
        ("float16", {"more": torch.zeros(1)}, "has"),
        ("float16", {"bias": torch.zeros(4, dtype=torch.float16)}, "bias"),
        ("float16", {"bias": torch.zeros(3)}, "float32"),
        ("float16", {"bias": torch.full((3,), math.inf, dtype=torch.float16)}, "infinity"),
        ("int8", {"bias/scales": torch.tensor([math.nan])}, "NaN"),
        ("int8", {"bias/scales": torch.tensor([3e38]), "bias": torch.full((3,), 127, dtype=torch.int8)}, "infinity"),
        ("int8", {"bias/scales": torch.ones(2)}, "scales"),
        ("int8", {"bias": torch.zeros(3)}, "int8"),
        ("top-k", {"indices": torch.tensor([0, 5], dtype=torch.int32)}, "positions"),
        ("top-k", {"indices": torch.tensor([-1, 1], dtype=torch.int32)}, "positions"),
        ("top-k", {"indices": torch.tensor([1, 1], dtype=torch.int32)}, "positions"),
        ("top-k", {"indices": torch.tensor([1], dtype=torch.int32)}, "indices"),
        ("top-k", {"values": torch.tensor([math.inf, 0.0])}, "infinity"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(kind, changes, message):
    like = {"bias": torch.zeros(3), "scale": torch.zeros(())}
    sent = {"bias": torch.tensor([1.0, -2.0, 0.5]), "scale": torch.tensor(3.0)}
    encoded = compression.encode(sent, kind, fraction=0.5)
    checked_norm(compression.decode(encoded, kind, like), like)
    with pytest.raises(UpdateError, match=message):
        checked_norm(compression.decode(spoil(encoded, **changes), kind, like), like)
