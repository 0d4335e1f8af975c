"""What a model costs: parameters, multiply-accumulates, speed on this machine, bytes on disk, energy where readable."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedhubert_lib import audio, hubert
from fedhubert_lib.export import twin

FFT_MACS = 5 * 512 * 9 // 4
"""Of a real Fourier transform of 512 points: 5/2 n log2 n operations, two to a multiply-accumulate."""
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
"""Joules of the first processor package, in millionths, where the kernel lets this user read them."""


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def macs(config: hubert.HubertConfig, seconds: float = 1.0) -> int:
    """Multiply-accumulates of one pass over ``seconds`` of audio: torch's flop counter, halved.

    Counted on the network as published, out of torchaudio's parts, so that the figure compares with those of others;
    what this project's own, faster convolutions spend is less. Convolutions, linear layers and attention count, norms
    and activations (about one part in a hundred) do not. HuBERT base takes 6.9 G for 1 s and 74 G for 10 s.

    A log-mel front end counts as it is computed, by fast Fourier transforms; in ONNX it is a matrix, and takes more.
    """
    samples = round(seconds * audio.SAMPLE_RATE)
    with torch.device("meta"):  # shapes are enough
        network = twin.empty(config)
    counter = FlopCounterMode(display=False)
    with counter:
        network(torch.zeros(1, samples, device="meta"))
    counted = counter.get_total_flops() // 2
    if config.front_end == "logmel":
        frames = (samples - audio.RECEPTIVE_FIELD) // (audio.HOP // 2) + 1
        counted += frames * (FFT_MACS - network.feature_extractor.transform.numel())
    return counted


@torch.no_grad()
def speed(encode: Callable[[torch.Tensor], object], *, batch: int = 8, repeats: int = 5) -> dict[str, float | None]:
    """Audio seconds per second over ``batch`` clips of one second: the median of ``repeats`` after one to warm up.

    Also joules per audio second of the whole processor package over the same passes, None where it cannot be read.
    """
    clips = torch.zeros(batch, audio.SAMPLE_RATE)
    encode(clips)
    seconds = []
    before = _joules()
    for _ in range(repeats):
        start = time.perf_counter()
        encode(clips)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    after = _joules()
    joules = None if before is None or after is None or after < before else (after - before) / (repeats * batch)
    return {"real_time_factor": batch / statistics.median(seconds), "joules_per_audio_second": joules}


def size(folder: Path) -> int:
    """Bytes of the model's weights in a checkpoint folder."""
    return (folder / "model.safetensors").stat().st_size


def _joules() -> float | None:
    try:
        return int(RAPL.read_text(encoding="utf-8")) / 1e6
    except OSError:  # no such counter, or kept from ordinary users
        return None
