"""Reading 16 kHz mono speech. Whatever is not that is an error which names the file and the remedy.

torchaudio 2.11 needs torchcodec and FFmpeg to load a file; libsndfile, through ``soundfile``, reads FLAC and WAV alone.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_RATE = 16_000
HOP = 320
"""Samples from one 50 Hz frame to the next."""
RECEPTIVE_FIELD = 400
"""Samples that one frame sees: frame i covers samples [320 i, 320 i + 400)."""

SHORTEST = SAMPLE_RATE
"""Samples of the shortest utterance that is trained on: shorter ones would crop a whole batch (fairseq: below 2 s)."""


class AudioError(ValueError):
    """A file that is not readable 16 kHz mono speech."""


def frame_count(samples: int) -> int:
    """Number of 50 Hz frames of a waveform of ``samples`` samples: floor((n - 400) / 320) + 1, and 0 below 400.

    HuBERT's convolutions give this many, and it equals ceil(MFCC frames / 2) with kaldi's ``snip_edges``.
    """
    return 0 if samples < RECEPTIVE_FIELD else (samples - RECEPTIVE_FIELD) // HOP + 1


def normalise(waveforms: "Tensor") -> "Tensor":
    """Zero mean and unit variance over the last dimension, as transformers' feature extractor computes them."""
    variance = waveforms.var(-1, correction=0, keepdim=True)
    return (waveforms - waveforms.mean(-1, keepdim=True)) / (variance + 1e-7).sqrt()


def read(path: str | Path, start: int = 0, stop: int | None = None, samples: int | None = None) -> "Tensor":
    """Samples ``[start, stop)`` of a 16 kHz mono FLAC or WAV file as float32 in [-1, 1], shape [stop - start].

    ``samples`` is the length of the whole file, where a table says it. Raises AudioError when the file is missing, no
    plain file, truncated, at another rate, not mono, shorter than asked for, of another length than ``samples``, or
    holds a NaN or an infinity.
    """
    try:
        # By descriptor: a pipe is not waited at, and the system's errors have words other than libsndfile's 'error'.
        with soundfile.SoundFile(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as file:
            if file.samplerate != SAMPLE_RATE:
                raise AudioError(f"{path}: {file.samplerate} Hz; resample it to {SAMPLE_RATE} Hz first")
            if file.channels != 1:
                raise AudioError(f"{path}: {file.channels} channels; mix it down to mono first")
            if samples not in (None, file.frames):
                raise AudioError(f"{path}: {file.frames} samples, {samples} when scanned; run 00_corpus again")
            stop = file.frames if stop is None else stop
            if not 0 <= start <= stop <= file.frames:
                raise AudioError(f"{path}: samples [{start}, {stop}) asked of {file.frames}; scan the corpus again")
            file.seek(start)
            waveform = file.read(stop - start, dtype="float32")
    except (soundfile.LibsndfileError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.error_string
        raise AudioError(f"{path}: cannot be read ({reason}); fetch it again, or remove it") from error
    if len(waveform) != stop - start:
        raise AudioError(f"{path}: {len(waveform)} samples where its header promises {stop - start}; fetch it again")
    if not np.isfinite(waveform).all():
        raise AudioError(f"{path}: holds NaN or infinite samples; remove the file or fetch it again")
    import torch  # here: a table of utterances needs no half gigabyte of it

    return torch.from_numpy(waveform)
