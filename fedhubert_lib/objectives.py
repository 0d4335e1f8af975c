"""The masked-prediction loss, as sums and counts that recombine exactly over split batches and clients.

fairseq's objective is (Σ cross-entropy + 10 · penalty · N) / N with N masked frames over all workers. Here each clip
gives Σ cross-entropy + 10 · (its mean squared feature) · (its masked frames), and N: sums over clips, accumulation
steps or clients are then the whole batch's. With fairseq's equal number of masked frames per clip both are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedhubert_lib.batching import Batch
from fedhubert_lib.hubert import Head, Hubert


@dataclass(frozen=True)
class Sums:
    """What an objective returns for a batch."""

    loss: Tensor
    """Scalar with gradient: the SUM that is minimised, to be divided by ``count`` after everything has been added."""
    count: int
    """What the sum is divided by: masked frames."""
    measured: dict[str, Tensor]
    """Detached scalar sums and counts for the ledger; they add up over batches and clients."""


def masked_prediction(
    model: Hubert,
    head: Head,
    batch: Batch,
    *,
    unmasked_weight: float = 0.0,
    penalty_weight: float = 10.0,
) -> Sums:
    """HuBERT's loss: cross-entropy of the labels of masked frames, in float32.

    Cross-entropy over normalised matmul / 0.1 equals the reference's stacked (K+1)×S×D logits (to 5e-7) at a fortieth
    of the time. Unmasked frames are scored without gradient, for their accuracy, unless ``unmasked_weight`` is above 0.

    ``measured`` holds loss_sum (nats, masked frames), unmasked_loss_sum, penalty_sum (mean squared feature × masked
    frames), masked_frames, unmasked_frames, correct_masked, correct_unmasked.
    """
    output = model(batch.waveforms, batch.mask, normalised=batch.normalised)
    masked, count = batch.mask, int(batch.mask.sum())
    logits, labels = head(output.last[masked]), batch.labels[masked]
    loss_sum = F.cross_entropy(logits, labels, reduction="sum")
    with torch.set_grad_enabled(unmasked_weight > 0 and torch.is_grad_enabled()):
        other_logits, other_labels = head(output.last[~masked]), batch.labels[~masked]
        other_sum = F.cross_entropy(other_logits, other_labels, reduction="sum")
    loss = loss_sum + unmasked_weight * other_sum if unmasked_weight else loss_sum
    penalty = loss_sum.new_zeros(())
    if output.features is not None:
        penalty = (output.features.to(loss_sum.dtype).square().mean((1, 2)) * masked.sum(1)).sum()
        loss = loss + penalty_weight * penalty
    measured = {
        "loss_sum": loss_sum,
        "unmasked_loss_sum": other_sum,
        "penalty_sum": penalty,
        "masked_frames": masked.sum(),
        "unmasked_frames": (~masked).sum(),
        "correct_masked": (logits.argmax(-1) == labels).sum(),
        "correct_unmasked": (other_logits.argmax(-1) == other_labels).sum(),
    }
    return Sums(loss, count, {name: value.detach() for name, value in measured.items()})


def averages(measured: Mapping[str, float]) -> dict[str, float]:
    """Loss (nats) and accuracies of added-up ``measured`` sums of ``masked_prediction``."""
    masked, unmasked = measured["masked_frames"], measured["unmasked_frames"]
    return {
        "loss": measured["loss_sum"] / max(masked, 1),
        "feature_penalty": measured["penalty_sum"] / max(masked, 1),
        "accuracy_masked": measured["correct_masked"] / max(masked, 1),
        "accuracy_unmasked": measured["correct_unmasked"] / max(unmasked, 1),
    }
