"""Cost of a model: parameters, multiply-accumulates, speed on this machine."""

import statistics
import timeit
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedhubert_lib import audio, hubert

SPECTRUM_MACS = 5 * 512 * 9 // 4 + 257 * hubert.MELS
"""Multiply-accumulates of mel bins and of a real Fourier transform of 512 points (5/2 n log2 n operations, halved)."""


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def macs(config: hubert.HubertConfig, seconds: float = 1.0) -> int:
    """Multiply-accumulates of one pass over ``seconds`` of audio: torch's flop counter, halved.

    Counted on the plain network, so that the figure compares with those of others; on a CPU ``kernels`` needs fewer.
    Convolutions, linear layers, attention and the Fourier transforms of a log-mel front end count, norms and
    activations (about one part in a hundred) do not. HuBERT base takes 6.9 G for 1 s and 74 G for 10 s.
    """
    samples = round(seconds * audio.SAMPLE_RATE)
    with torch.device("meta"):  # shapes are enough
        model = hubert.Hubert(config).eval()
        waveforms, features = torch.zeros(1, samples), torch.zeros(1, audio.frame_count(samples), config.feature_size)
    spectra = 0 if config.front_end == "waveform" else (samples - audio.RECEPTIVE_FIELD) // (audio.HOP // 2) + 1
    with FlopCounterMode(display=False) as counter:
        model.encoder(model.feature_projection(features if spectra else model.feature_extractor(waveforms)))
    return counter.get_total_flops() // 2 + spectra * SPECTRUM_MACS


def speed(encode: Callable[[Tensor], Sequence[Tensor]]) -> dict[str, float]:
    """Audio seconds per second over eight clips of one second: the median of five passes after one to warm up."""
    clips = torch.zeros(8, audio.SAMPLE_RATE)
    encode(clips)
    seconds = timeit.repeat(lambda: encode(clips)[-1].cpu(), repeat=5, number=1)  # .cpu() waits for a GPU
    return {"real_time_factor": len(clips) / statistics.median(seconds)}
