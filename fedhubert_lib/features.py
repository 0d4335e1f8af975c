"""Kaldi's MFCCs of waveforms: what k-means clusters first, and a baseline of every evaluation.

The MFCCs are those of ``torchaudio.compliance.kaldi.mfcc(sample_frequency=16000, use_energy=False)`` with delta and
delta-delta, as fairseq's ``simple_kmeans`` computes them, but for many utterances at once.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.compliance import kaldi
from torchaudio.functional import create_dct

from fedhubert_lib.audio import SAMPLE_RATE

MFCC_HOP = 160
MFCC_DIMENSION = 39
WINDOW = 400
FFT = 512
MEL_BINS = 23
CEPSTRA = 13
LIFTER = 22.0
PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps
CHUNK, GPU_CHUNK = 512, 2**15
"""Windows that are transformed at once: 1 MiB, which fits a CPU's cache; on a GPU five minutes of speech."""


def mfcc(waveforms: Sequence[Tensor]) -> list[Tensor]:
    """Kaldi MFCCs with delta and delta-delta of each waveform: [frames, 39] float32 at 100 Hz, one per waveform.

    ``waveforms`` are float32 [samples] in [-1, 1] at 16 kHz, on one device. Frame j sees samples [160 j, 160 j + 400)
    (``snip_edges``), so that a waveform of n samples has floor((n - 400) / 160) + 1 frames, and none below 400 samples.
    Frame 2 i is the one that the model's frame i sees. Equal to ``kaldi.mfcc`` followed twice by
    ``torchaudio.functional.compute_deltas``, to 1e-4; the same bits whatever else is in the batch.
    """
    windows = [w.unfold(0, WINDOW, MFCC_HOP) if len(w) >= WINDOW else w.new_empty(0, WINDOW) for w in waveforms]
    if not any(map(len, windows)):
        return [w.new_empty(0, MFCC_DIMENSION) for w in waveforms]
    together = torch.cat(windows)
    size = CHUNK if together.device.type == "cpu" else GPU_CHUNK
    chunks = list(together.split(size))
    # The last chunk is filled up: by its number of rows a matrix product may round a row differently.
    chunks[-1] = F.pad(chunks[-1], (0, 0, 0, size - len(chunks[-1])))
    static = torch.cat([_cepstra(chunk) for chunk in chunks])[: len(together)]
    return [_with_deltas(frames) for frames in static.split([len(w) for w in windows])]


def _cepstra(windows: Tensor) -> Tensor:
    """MFCCs of ``windows`` [N, 400], without deltas: [N, 13]."""
    window, filters, dct = _constants(windows.device)
    # A quiet mel band beside a loud one has an error of 1e-3 in float32. To equal kaldi to 1e-4, mean, pre-emphasis and
    # window have to round as kaldi's do. The window's first weight is 0, so that the first sample drops out.
    centred = windows - windows.mean(1, keepdim=True)
    padded = windows.new_zeros(len(windows), FFT)
    emphasised = torch.mul(centred[:, :-1], PREEMPHASIS, out=padded[:, 1:WINDOW])
    torch.sub(centred[:, 1:], emphasised, out=emphasised).mul_(window[1:])
    spectrum = torch.view_as_real(torch.fft.rfft(padded)).flatten(1)
    return (spectrum.square_() @ filters).clamp_(min=FLOOR).log_() @ dct


def _with_deltas(static: Tensor) -> Tensor:
    """``static`` [frames, 13] with its delta and the delta of that: [frames, 39]."""
    delta = _delta(static)
    return torch.cat([static, delta, _delta(delta)], dim=1)


def _delta(values: Tensor) -> Tensor:
    """Regression over five frames, (v[t+1] - v[t-1] + 2 v[t+2] - 2 v[t-2]) / 10, edges repeated."""
    if not len(values):
        return values
    time = torch.arange(-2, len(values) + 2, device=values.device).clamp(0, len(values) - 1)
    v = values[time]
    return (v[3:-1] - v[1:-3] + 2 * (v[4:] - v[:-4])) / 10


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Povey window [400]; mel filters for interleaved re² and im² [514, 24]; liftered DCT [24, 13].

    The 24th mel band has no weight: on CPUs a product of 24 columns takes half as long as one of 23.
    """
    window = torch.hann_window(WINDOW, periodic=False).pow(0.85)
    mel, _ = kaldi.get_mel_banks(MEL_BINS, FFT, SAMPLE_RATE, 20.0, 0.0, 100.0, -500.0, 1.0)
    filters = torch.zeros(FFT // 2 + 1, MEL_BINS + 1)
    filters[:-1, :-1] = mel.T  # the Nyquist bin has no weight
    dct = create_dct(MEL_BINS, MEL_BINS, "ortho")
    dct[:, 0] = math.sqrt(1 / MEL_BINS)
    lifter = 1 + 0.5 * LIFTER * torch.sin(math.pi * torch.arange(CEPSTRA) / LIFTER)
    liftered = torch.zeros(MEL_BINS + 1, CEPSTRA)
    liftered[:-1] = dct[:, :CEPSTRA] * lifter
    return window.to(device), filters.repeat_interleave(2, dim=0).to(device), liftered.to(device)
