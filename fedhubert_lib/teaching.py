"""Objectives of distillation: losses between a student and its frozen teacher, batch by batch.

Three objectives by their published names, alone or summed with weights:

* ``soft-targets``: on masked frames, the k-means labels and, with a weight, the teacher's cluster probabilities
  softened by a temperature (Hinton et al. 2015). The teacher hears the clip unmasked: it knows the hidden frames.
* ``distilhubert`` (Chang et al. 2022: layers 4, 8, 12 as in the paper; s3prl's yaml has 4, 12; the student keeps the
  LayerNorm before its projection): the student's last layer predicts several of the teacher's through heads that are
  dropped afterwards; L1 distance and -log sigmoid of the cosine, nothing masked.
* ``hubert`` (DiceHuBERT): HuBERT's own objective, on clusters of the teacher's features.

The teacher never trains: eval mode, no gradient, the same output, on one processor to the bit. (s3prl's
distiller leaves its teacher in training mode, with dropout.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedhubert_lib.batching import Batch
from fedhubert_lib.hubert import Head, Hubert, HubertConfig
from fedhubert_lib.objectives import PENALTY, Sums, feature_penalty, frame_losses, label_sums
from fedhubert_lib.objectives import averages as averages_of_labels


class TeacherError(ValueError):
    """A teacher that this student cannot learn from."""


@dataclass(frozen=True)
class Teacher:
    """A frozen model and, where the objective needs its predictions, its head."""

    model: Hubert
    head: Head | None

    def __post_init__(self) -> None:
        self.modules.eval().requires_grad_(False)

    @property
    def modules(self) -> nn.ModuleDict:
        """Model and head under these names."""
        return nn.ModuleDict({"model": self.model} | ({"head": self.head} if self.head is not None else {}))

    @torch.no_grad()
    def probabilities(self, batch: Batch, temperature: float) -> Tensor:
        """Softened cluster probabilities of each frame of the unmasked clips, [B, T, K]."""
        last = self.model(batch.waveforms, normalised=batch.normalised).last
        return (self.head(last) / temperature).softmax(-1)

    @torch.no_grad()
    def layers(self, batch: Batch) -> Tensor:
        """The ``target_layers`` of the unmasked clips, [B, layers, T, D]."""
        hidden = self.model(batch.waveforms, hidden_states=True, normalised=batch.normalised).hidden
        return torch.stack([hidden[number] for number in target_layers(len(hidden) - 1)], dim=1)


def target_layers(depth: int) -> tuple[int, ...]:
    """The teacher's layers that ``distilhubert`` predicts: its thirds, 4, 8 and 12 of 12."""
    return tuple(sorted({max(1, round(depth * third / 3)) for third in (1, 2, 3)}))


class Regressors(nn.Module):
    """DistilHuBERT's heads: one hidden layer in common, then a linear map per predicted layer of the teacher."""

    def __init__(self, width: int, teacher_width: int, layers: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, teacher_width * layers)
        self.outputs = nn.ModuleList(nn.Linear(teacher_width, teacher_width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to [B, layers, T, teacher width]."""
        parts = F.gelu(self.hidden(x)).chunk(len(self.outputs), dim=-1)
        return torch.stack([output(part) for output, part in zip(self.outputs, parts, strict=True)], dim=1)


def soft_targets(
    student: Hubert,
    head: Head,
    teacher: Teacher,
    batch: Batch,
    *,
    temperature: float = 4.0,
    soft_weight: float,
    label_weight: float,
    unmasked_weight: float = 0.0,
) -> Sums:
    """alpha T² KL(teacher ‖ student) at temperature T plus beta cross-entropy of the labels: over masked frames, and
    with ``unmasked_weight``, as in ``masked_prediction``, over the others.

    T² keeps the gradient's size as T grows. ``measured`` is that of ``masked_prediction`` and soft_loss_sum (T² times
    the divergence on masked frames, without its weight). With ``soft_weight`` 0 the teacher is not asked; with
    ``label_weight`` 0 neither are the labels, which may be of other clusters: ``label_sums`` are then missing.
    """
    output = student(batch.waveforms, batch.mask, normalised=batch.normalised)
    masked = batch.mask
    frames = torch.where(masked, 1.0, unmasked_weight)
    logits = head(output.last)
    loss, measured = logits.new_zeros(()), dict[str, Tensor]()
    if soft_weight:
        targets = teacher.probabilities(batch, temperature)
        softened = (logits / temperature).log_softmax(-1)
        divergence = F.kl_div(softened, targets, reduction="none").sum(-1) * temperature**2
        loss, measured["soft_loss_sum"] = loss + soft_weight * (divergence * frames).sum(), (divergence * masked).sum()
    if label_weight:  # otherwise the labels may be of other clusters than the teacher's
        losses = frame_losses(logits, batch.labels)
        loss = loss + label_weight * (losses * frames).sum()
        measured |= label_sums(logits, losses, batch)
    penalty = feature_penalty(output, batch)
    loss = loss + PENALTY * penalty
    measured |= {"objective": loss, "penalty_sum": penalty, "masked_frames": masked.sum()}
    return Sums(loss, batch.masked, {name: value.detach() for name, value in measured.items()})


def layer_regression(student: Hubert, regressors: Regressors, teacher: Teacher, batch: Batch) -> Sums:
    """DistilHuBERT's loss per frame: mean absolute error plus -log sigmoid of the cosine, averaged over the layers.

    Nothing is masked, and every frame counts: ``measured`` gives all of them as masked_frames, by which updates are
    weighted, and as frames; it also holds objective (the loss) and cosine_sum (over frames, averaged over layers).
    """
    predicted = regressors(student(batch.waveforms, normalised=batch.normalised).last).float()
    targets = teacher.layers(batch).float()
    if predicted.shape != targets.shape:
        raise TeacherError(f"the student predicts {list(predicted.shape)} and the teacher gives {list(targets.shape)}")
    distance = (predicted - targets).abs().mean(-1)
    cosine = F.cosine_similarity(predicted, targets, dim=-1)
    # Nothing is masked, but every parameter that travels needs a gradient: AdamW's moments, control variates.
    loss = (distance - F.logsigmoid(cosine)).mean(1).sum() + 0 * student.masked_spec_embed.sum()
    count = batch.labels.numel()
    frames = torch.tensor(count)
    measured = {"objective": loss, "cosine_sum": cosine.mean(1).sum(), "frames": frames, "masked_frames": frames}
    return Sums(loss, count, {name: value.detach() for name, value in measured.items()})


def summed(parts: Sequence[tuple[float, Sums]]) -> Sums:
    """The sum of (weight, objective), each divided by its own count within the batch, counted in the first's frames."""
    count = parts[0][1].count
    loss = sum(weight * (part.loss / part.count) for weight, part in parts) * count
    measured = {name: value for _, part in reversed(parts) for name, value in part.measured.items()}
    return Sums(loss, count, {**measured, "objective": loss.detach()})


def averages(measured: Mapping[str, float]) -> dict[str, float]:
    """From added-up ``measured``: loss (the objective), and with objectives that have them accuracies and label_loss,
    divergence (T² times that of the softened predictions) and cosine (between predicted and true layers).
    """
    masked = max(measured["masked_frames"], 1)
    row = averages_of_labels(measured) if "correct_masked" in measured else {}
    row |= {"loss": measured["objective"] / masked}
    sums = {"label_loss": "loss_sum", "divergence": "soft_loss_sum"}
    row |= {name: measured[total] / masked for name, total in sums.items() if total in measured}
    if "cosine_sum" in measured:
        row["cosine"] = measured["cosine_sum"] / max(measured["frames"], 1)
    return row


def student_from(teacher: Hubert, config: HubertConfig) -> Hubert:
    """A student that starts as the teacher's front end, positions and first layers, as DistilHuBERT does.

    Raises TeacherError, naming both, when a shape differs or the student is the deeper one.
    """
    kinds = ("num_attention_heads", "do_stable_layer_norm", "conv_stride", "feat_extract_norm", "do_normalize")
    for name in (*kinds, "conv_bias", "front_end"):
        if getattr(config, name) != getattr(teacher.config, name):  # what shapes do not show
            raise TeacherError(
                f"{name} is {getattr(config, name)} in the student and {getattr(teacher.config, name)} in the teacher;"
                " to start from the teacher, both must be of one kind; else start it at random"
            )
    student = Hubert(config)
    weights, source = student.state_dict(), teacher.state_dict()
    for name, tensor in weights.items():
        if name not in source or source[name].shape != tensor.shape:
            shape = list(source[name].shape) if name in source else "absent"
            raise TeacherError(
                f"{name} is {list(tensor.shape)} in the student and {shape} in the teacher; to start from the teacher,"
                " the student needs its width, heads and front end and at most its layers; else start it at random"
            )
    student.load_state_dict({name: source[name] for name in weights})
    return student
