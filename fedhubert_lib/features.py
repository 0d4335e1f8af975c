"""Kaldi's MFCCs of waveforms: what k-means clusters first, and a baseline of every evaluation.

The MFCCs are those of ``torchaudio.compliance.kaldi.mfcc(sample_frequency=16000, use_energy=False)`` with delta and
delta-delta, as fairseq's ``simple_kmeans`` computes them, but for many utterances at once: their 25 ms windows, end to
end, pass through one FFT and two matrix products in chunks that fit the cache and reuse its memory.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
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
CHUNK = 512
"""MFCC frames computed at once on a CPU: 1 MiB of padded windows, which fit the cache."""
GPU_CHUNK = 2**15
"""On a GPU: five minutes of speech, and 190 MB."""


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
    counts = [_mfcc_frames(len(waveform)) for waveform in waveforms]
    static = _cepstra([w.unfold(0, WINDOW, MFCC_HOP) for w in waveforms if len(w) >= WINDOW], device)
    first, last = _edges(counts, device)
    delta = _delta(static, first, last)
    return list(torch.cat([static, delta, _delta(delta, first, last)], dim=1).split(counts))


def _mfcc_frames(samples: int) -> int:
    return 0 if samples < WINDOW else (samples - WINDOW) // MFCC_HOP + 1


def _edges(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each frame of the batch, the index of the first and of the last frame of its utterance."""
    lengths = torch.tensor(counts, device=device)
    ends = lengths.cumsum(0)
    first = (ends - lengths).repeat_interleave(lengths, output_size=sum(counts))
    last = (ends - 1).repeat_interleave(lengths, output_size=sum(counts))
    return first, last


def _delta(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Regression over five frames, (v[t+1] - v[t-1] + 2 v[t+2] - 2 v[t-2]) / 10, edges of utterances repeated."""
    time = torch.arange(len(values), device=values.device)
    near = values[torch.minimum(time + 1, last)] - values[torch.maximum(time - 1, first)]
    far = values[torch.minimum(time + 2, last)] - values[torch.maximum(time - 2, first)]
    return (near + 2 * far) / 10


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


def _cepstra(windows: Sequence[Tensor], device: torch.device) -> Tensor:
    """MFCCs without deltas of windows [frames, 400], which utterances follow one another: [all frames, 13]."""
    window, filters, dct = _constants(device)
    frames = sum(map(len, windows))
    on_cpu = device.type == "cpu"
    chunk = CHUNK if on_cpu else GPU_CHUNK
    cepstra = torch.empty(frames, CEPSTRA, device=device)
    centred = torch.empty(chunk, WINDOW, device=device)
    padded = torch.zeros(chunk, FFT, device=device)  # its first column stays 0, as the window's first weight does
    spectrum = torch.empty(chunk, FFT // 2 + 1, dtype=torch.complex64, device=device)
    parts = torch.view_as_real(spectrum).flatten(1)
    energies = torch.empty(chunk, MEL_BINS + 1, device=device)
    coefficients = torch.empty(chunk, CEPSTRA, device=device)
    # A quiet mel band next to a loud one is known to 1e-3 only in float32, by kaldi and here alike. To equal kaldi to
    # 1e-4, every operation up to the FFT has to round as kaldi's does: mean, pre-emphasis, window, in this order.
    start = 0
    for pieces in _chunks(windows, chunk):
        rows = 0
        for piece in pieces if on_cpu else [torch.cat(pieces)]:
            torch.sub(piece, piece.mean(dim=1, keepdim=True), out=centred[rows : rows + len(piece)])
            rows += len(piece)
        torch.mul(centred[:rows, :-1], PREEMPHASIS, out=padded[:rows, 1:WINDOW])
        torch.sub(centred[:rows, 1:], padded[:rows, 1:WINDOW], out=padded[:rows, 1:WINDOW])
        padded[:rows, 1:WINDOW] *= window[1:]
        # The whole chunk, even where it is not full: by its number of rows a product may round a row differently, and
        # then the features of an utterance would depend on what else is in the batch.
        torch.fft.rfft(padded, out=spectrum)
        torch.mm(parts.square_(), filters, out=energies)
        torch.mm(energies.clamp_(min=FLOOR).log_(), dct, out=coefficients)
        cepstra[start : start + rows] = coefficients[:rows]
        start += rows
    return cepstra


def _chunks(windows: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """``windows`` of utterances in their order, cut up so that each list holds ``size`` of them, the last one fewer."""
    pieces, room = [], size
    for own in windows:
        while len(own):
            pieces.append(own[:room])
            own = own[room:]
            room -= len(pieces[-1])
            if not room:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces
