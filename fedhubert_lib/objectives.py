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
from fedhubert_lib.hubert import Head, Hubert, HubertOutput


@dataclass(frozen=True)
class Sums:
    """An objective's values for a batch."""

    loss: Tensor
    """Scalar with gradient: the SUM that is minimised, to be divided by ``count`` after everything has been added."""
    count: int
    """Divisor of the sum: masked frames."""
    measured: dict[str, Tensor]
    """Detached scalar sums and counts for the ledger; they add up over batches and clients."""


PENALTY = 10.0
"""Weight of the mean squared feature in the loss, as published."""


def masked_prediction(model: Hubert, head: Head, batch: Batch, *, unmasked_weight: float = 0.0) -> Sums:
    """HuBERT's loss: cross-entropy of the labels of masked frames, in float32, plus ``unmasked_weight`` times that of
    the others: fairseq's ``pred_nomask_weight``, but the divisor stays the masked frames, where fairseq then divides by
    all, and scales its penalty by all. Cross-entropy over normalised matmul / 0.1 equals the reference's stacked
    (K+1)×S×D logits (to 5e-7) at a fortieth of the time. All frames are scored at once, since picking frames by a mask
    makes a GPU wait for their number.

    ``measured`` holds objective (the loss), penalty_sum (mean squared feature × masked frames) and ``label_sums``.
    >>> masked_prediction(module["model"], module["head"], batch).count == int(batch.mask.sum())
    True
    """
    output = model(batch.waveforms, batch.mask, normalised=batch.normalised)
    logits = head(output.last)
    sums = label_sums(logits, frame_losses(logits, batch.labels), batch)
    penalty = feature_penalty(output, batch)
    loss = sums["loss_sum"] + unmasked_weight * sums["unmasked_loss_sum"] + PENALTY * penalty
    measured = {"objective": loss, "penalty_sum": penalty, **sums}
    return Sums(loss, batch.masked, {name: value.detach() for name, value in measured.items()})


def label_sums(logits: Tensor, losses: Tensor, batch: Batch) -> dict[str, Tensor]:
    """loss_sum and unmasked_loss_sum (nats) of frames' ``losses`` [B, T], masked_frames, unmasked_frames, and of these
    the frames whose best logit is their label's: correct_masked, correct_unmasked."""
    masked, correct = batch.mask, logits.detach().argmax(-1) == batch.labels
    return {
        "loss_sum": (losses * masked).sum(),
        "unmasked_loss_sum": (losses * ~masked).sum(),
        "masked_frames": masked.sum(),
        "unmasked_frames": (~masked).sum(),
        "correct_masked": (correct & masked).sum(),
        "correct_unmasked": (correct & ~masked).sum(),
    }


def feature_penalty(output: HubertOutput, batch: Batch) -> Tensor:
    """Mean squared feature of the convolutions × masked frames, summed over clips; 0 for a log-mel front end."""
    if output.features is None:
        return torch.zeros((), device=batch.mask.device)
    return (output.features.float().square().mean((1, 2)) * batch.mask.sum(1)).sum()


def frame_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each frame, [B, T, K] and [B, T] to [B, T]. Frames in a row: for [B, K, T] no CUDA kernel gives
    the same sum twice."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def unmasked_weight(start: float, decay: float, progress: float) -> float:
    """Weight of the frames that are not masked, after the fraction ``progress`` of all steps of a study.

    It falls linearly from ``start`` to 0 over the first ``decay`` of the steps; with ``decay`` 0 it stays. Scoring
    frames that the model can hear takes it off the plateau at the commonest label, on which small models stay for
    hundreds of steps with the published loss; what it learns there carries over to the masked frames.

    >>> unmasked_weight(1.0, 0.6, 0.3), unmasked_weight(1.0, 0.6, 0.8), unmasked_weight(1.0, 0.0, 0.8)
    (0.5, 0.0, 1.0)
    """
    return start * max(0.0, 1 - progress / decay) if decay else start


def averages(measured: Mapping[str, float]) -> dict[str, float]:
    """Loss (nats) and accuracies of added-up ``measured`` sums of ``masked_prediction``."""
    masked, unmasked = measured["masked_frames"], measured["unmasked_frames"]
    return {
        "loss": measured["loss_sum"] / max(masked, 1),
        "feature_penalty": measured["penalty_sum"] / max(masked, 1),
        "accuracy_masked": measured["correct_masked"] / max(masked, 1),
        "accuracy_unmasked": measured["correct_unmasked"] / max(unmasked, 1),
    }
