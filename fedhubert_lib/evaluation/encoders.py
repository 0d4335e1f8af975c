"""Encoders: trained models, untrained ones and MFCC as one kind of function, so that the same code measures them."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedhubert_lib import features, hubert, seeds

Encoder = Callable[[Tensor], tuple[Tensor, ...]]
"""Waveforms [B, S] to the states of each layer, equally shaped [B, T, D]."""


def of_model(model: hubert.Hubert, device: torch.device) -> Encoder:
    """All N + 1 hidden states of ``model``, from the input of the first layer to the output of the last; no dropout."""
    model = model.to(device).eval()

    @torch.no_grad()
    def encode(waveforms: Tensor) -> tuple[Tensor, ...]:
        return model(waveforms.to(device), hidden_states=True).hidden

    return encode


def untrained(config: hubert.HubertConfig, seed: int) -> hubert.Hubert:
    """The baseline of training: the architecture of ``config`` with random weights drawn from ``seed``."""
    model = hubert.Hubert(config)
    hubert.initialise(model, seeds.torch_generator(seed, "untrained"))
    return model


def mfcc(waveforms: Tensor) -> tuple[Tensor, ...]:
    """Kaldi's 39 MFCC as a single layer [B, T, 39] at 50 Hz: the frames whose clusters are the first targets."""
    return (torch.stack(features.mfcc(list(waveforms)))[:, ::2],)


def mfcc_moments(waveforms: Tensor) -> tuple[Tensor, ...]:
    """MFCC at 100 Hz as one frame of mean and standard deviation over time, [B, 1, 78]: a stronger baseline."""
    frames = torch.stack(features.mfcc(list(waveforms)))
    return (torch.cat([frames.mean(1), frames.std(1)], dim=1)[:, None],)
