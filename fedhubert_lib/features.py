"""What k-means clusters: kaldi MFCCs of the waveform, or a hidden layer of a checkpoint.

The MFCCs are those of ``torchaudio.compliance.kaldi.mfcc(sample_frequency=16000, use_energy=False)`` with delta and
delta-delta, as fairseq's ``simple_kmeans`` computes them, but for many utterances at once: laid end to end they become
one long signal, whose 25 ms windows pass through one FFT and two matrix products in chunks that fit the cache.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchaudio.compliance import kaldi
from torchaudio.functional import create_dct

from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, frame_count
from fedhubert_lib.hubert import Hubert

MFCC_HOP = 160
MFCC_DIMENSION = 39
WINDOW = 400
FFT = 512
MEL_BINS = 23
CEPSTRA = 13
LIFTER = 22.0
PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps
CHUNK = 1024
"""MFCC frames computed at once on a CPU: 2 MiB of padded windows, which fit the cache."""
FORWARD_SAMPLES = 5000 * HOP
"""Longest stretch that one forward pass of a checkpoint sees: 100 s, as in fairseq's feature dump."""


def mfcc(waveforms: Sequence[Tensor]) -> list[Tensor]:
    """Kaldi MFCCs with delta and delta-delta of each waveform: [frames, 39] float32 at 100 Hz, one per waveform.

    ``waveforms`` are float32 [samples] in [-1, 1] at 16 kHz, on one device. Frame j sees samples [160 j, 160 j + 400)
    (``snip_edges``), so that a waveform of n samples has floor((n - 400) / 160) + 1 frames, and none below 400 samples.
    Frame 2 i is the one that the model's frame i sees. Equal to ``kaldi.mfcc`` followed twice by
    ``torchaudio.functional.compute_deltas``, to 1e-4.
    """
    if not waveforms:
        return []
    device = waveforms[0].device
    slots = [-(-len(waveform) // MFCC_HOP) for waveform in waveforms]  # where frames may start, the last ones cut off
    counts = [_mfcc_frames(len(waveform)) for waveform in waveforms]
    signal = torch.zeros(sum(slots) * MFCC_HOP + WINDOW, device=device)
    keep = torch.zeros(sum(slots), dtype=torch.bool)
    slot = 0
    for waveform, width, frames in zip(waveforms, slots, counts, strict=True):
        signal[slot * MFCC_HOP : slot * MFCC_HOP + len(waveform)] = waveform
        keep[slot : slot + frames] = True
        slot += width
    static = _cepstra(signal)[: len(keep)][keep.to(device)]
    first, last = _edges(counts, device)
    delta = _delta(static, first, last)
    return list(torch.cat([static, delta, _delta(delta, first, last)], dim=1).split(counts))


def hidden(model: Hubert, waveforms: Sequence[Tensor], layer: int) -> list[Tensor]:
    """Output of transformer layer ``layer`` (1 is the first; 0 is its input) for each waveform: [frames, D] at 50 Hz.

    Utterances pass one by one, without padding, since the statistics of a group-norm front end would include it. One
    longer than 100 s passes in pieces of 5,000 frames; its frames are as many as in one pass.
    """
    outputs = []
    with torch.inference_mode():
        for waveform in waveforms:
            pieces = []
            for start in range(0, frame_count(len(waveform)) * HOP, FORWARD_SAMPLES):
                piece = waveform[start : start + FORWARD_SAMPLES + RECEPTIVE_FIELD - HOP]
                pieces.append(model(piece[None], hidden_states=True).hidden[layer][0].float())
            outputs.append(torch.cat(pieces) if pieces else waveform.new_zeros(0, model.config.hidden_size))
    return outputs


def _mfcc_frames(samples: int) -> int:
    return 0 if samples < WINDOW else (samples - WINDOW) // MFCC_HOP + 1


def _edges(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each frame of the batch, the index of the first and of the last frame of its utterance."""
    lengths = torch.tensor(counts)
    ends = lengths.cumsum(0)
    first = (ends - lengths).repeat_interleave(lengths)
    last = (ends - 1).repeat_interleave(lengths)
    return first.to(device), last.to(device)


def _delta(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Regression over five frames, (v[t+1] - v[t-1] + 2 v[t+2] - 2 v[t-2]) / 10, edges of utterances repeated."""
    time = torch.arange(len(values), device=values.device)
    near = values[torch.minimum(time + 1, last)] - values[torch.maximum(time - 1, first)]
    far = values[torch.minimum(time + 2, last)] - values[torch.maximum(time - 2, first)]
    return (near + 2 * far) / 10


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Povey window [400]; mel filters for interleaved re² and im² [514, 23]; liftered DCT [23, 13]."""
    window = torch.hann_window(WINDOW, periodic=False).pow(0.85)
    mel, _ = kaldi.get_mel_banks(MEL_BINS, FFT, SAMPLE_RATE, 20.0, 0.0, 100.0, -500.0, 1.0)
    filters = torch.zeros(FFT // 2 + 1, MEL_BINS)
    filters[:-1] = mel.T  # the Nyquist bin has no weight
    dct = create_dct(MEL_BINS, MEL_BINS, "ortho")
    dct[:, 0] = math.sqrt(1 / MEL_BINS)
    lifter = 1 + 0.5 * LIFTER * torch.sin(math.pi * torch.arange(CEPSTRA) / LIFTER)
    return window.to(device), filters.repeat_interleave(2, dim=0).to(device), (dct[:, :CEPSTRA] * lifter).to(device)


def _cepstra(signal: Tensor) -> Tensor:
    """MFCCs without deltas of the windows at every multiple of 160 samples: [slots, 13], slots filled up to a chunk."""
    window, filters, dct = _constants(signal.device)
    windows = signal.unfold(0, WINDOW, MFCC_HOP)
    slots = len(windows)
    chunk = min(CHUNK if signal.device.type == "cpu" else slots, slots)
    cepstra = signal.new_empty(slots, CEPSTRA)
    centred = signal.new_empty(chunk, WINDOW)
    padded = signal.new_zeros(chunk, FFT)  # its first column stays 0, as the window's first weight does
    # A quiet mel band next to a loud one is known to 1e-3 only in float32, by kaldi and here alike. To equal kaldi to
    # 1e-4, every operation up to the FFT has to round as kaldi's does: mean, pre-emphasis, window, in this order.
    for start in range(0, slots, chunk):
        rows = min(chunk, slots - start)
        part = windows[start : start + rows]
        torch.sub(part, part.mean(dim=1, keepdim=True), out=centred[:rows])
        torch.mul(centred[:rows, :-1], PREEMPHASIS, out=padded[:rows, 1:WINDOW])
        torch.sub(centred[:rows, 1:], padded[:rows, 1:WINDOW], out=padded[:rows, 1:WINDOW])
        padded[:rows, 1:WINDOW] *= window[1:]
        spectrum = torch.view_as_real(torch.fft.rfft(padded[:rows])).flatten(1)
        energies = spectrum.square_() @ filters
        torch.mm(energies.clamp_(min=FLOOR).log_(), dct, out=cepstra[start : start + rows])
    return cepstra
