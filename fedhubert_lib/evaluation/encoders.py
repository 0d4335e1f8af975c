"""What is evaluated, reduced to one function: waveforms in, the frames of every layer out.

Trained models, untrained ones and MFCC are then measured by the same code.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedhubert_lib import features, hubert, seeds

Encoder = Callable[[Tensor], tuple[Tensor, ...]]
"""Waveforms [clips, samples] of one length to the states of each layer, equally shaped [clips, frames, width]."""


def of_model(model: hubert.Hubert, device: torch.device) -> Encoder:
    """All N + 1 hidden states of ``model``, from the input of the first layer to the output of the last; no dropout."""
    model = model.to(device).eval()

    @torch.no_grad()
    def encode(waveforms: Tensor) -> tuple[Tensor, ...]:
        return model(waveforms.to(device), hidden_states=True).hidden

    return encode


def untrained(config: hubert.HubertConfig, seed: int) -> hubert.Hubert:
    """The floor that training must leave: the architecture of ``config`` with random weights."""
    model = hubert.Hubert(config)
    hubert.initialise(model, seeds.torch_generator(seed, "untrained"))
    return model


def mfcc(waveforms: Tensor) -> tuple[Tensor, ...]:
    """Kaldi's 39 MFCC as an encoder of a single layer, at 50 Hz: the frames whose clusters are the first targets."""
    return (torch.stack(features.mfcc(list(waveforms)))[:, ::2],)


def mfcc_moments(waveforms: Tensor) -> tuple[Tensor, ...]:
    """``mfcc`` at 100 Hz as one frame of mean and deviation over time, 78 wide: a stronger floor than models get."""
    frames = torch.stack(features.mfcc(list(waveforms)))
    return (torch.cat([frames.mean(1), frames.std(1)], dim=1)[:, None],)
