"""The comparison that every export has to pass."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedhubert_lib import hubert, seeds

SHAPES = ((1, 400), (2, 8_123), (1, 23_456), (3, 16_001))
"""Clips and samples of the comparison: one frame, odd lengths, several clips; no export was traced with one of them."""
TOLERANCE = 1e-3
"""Largest difference of a hidden state, whose values are of the order of 1; float32 rounding gives about 1e-5."""

Encode = Callable[[Tensor], Sequence[Tensor]]
"""Waveforms [B, S] to hidden states [B, T, D] of other software."""


class ExportError(RuntimeError):
    """A model that cannot be exported this way, or an export that does not give the source's numbers."""


@torch.no_grad()
def compare(model: hubert.Hubert, encode: Encode, *, skip: int = 0, tolerance: float = TOLERANCE) -> float:
    """Largest difference between the hidden states of ``model`` and those that ``encode`` gives, over ``SHAPES``.

    ``skip``: hidden states of the model that the other software does not return (its first ones). Raises ExportError
    where their number or shape differs, or a difference exceeds ``tolerance``.
    """
    model.eval()
    differences: list[float] = []
    for clips, samples in SHAPES:
        waveforms = noise(clips, samples)
        ours, theirs = model(waveforms, hidden_states=True).hidden[skip:], list(encode(waveforms))
        if [list(each.shape) for each in ours] != [list(each.shape) for each in theirs]:
            raise ExportError(
                f"{samples} samples give {len(theirs)} states of {[list(each.shape) for each in theirs[:1]]} where the"
                f" source has {len(ours)} of {[list(each.shape) for each in ours[:1]]}"
            )
        differences += [float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True)]
    worst = float(np.max(differences))  # NaN if one of them is
    if not worst <= tolerance:
        raise ExportError(f"hidden states differ from the source's by {worst:.2g}, which is more than {tolerance:.2g}")
    return worst


def noise(clips: int, samples: int) -> Tensor:
    """Clips to compare on, the same every time: float32 [clips, samples]."""
    return 0.1 * torch.randn(clips, samples, generator=seeds.torch_generator(0, "export", samples))


def require_published(model: hubert.Hubert, where: str) -> None:
    """Raises ExportError unless ``model`` is of the published architecture, which is all that ``where`` knows."""
    config = model.config
    if config.front_end != "waveform" or config.position_embedding != "conv":
        raise ExportError(
            f"{where} knows only HuBERT as published; this model has front_end {config.front_end} and"
            f" position_embedding {config.position_embedding}. Its exports are ONNX and the s3prl entry; train with"
            " front_end: waveform for the others"
        )
