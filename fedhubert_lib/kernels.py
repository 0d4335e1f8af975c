"""Parts of the model in forms that are faster than PyTorch's kernels on some devices, with the same results.

The model in ``hubert`` reads without this module: each form stands beside the plain one there. ``FASTER_ON`` says where
it takes over; benchmarks/bench_model.py measures that on a CPU, benchmarks/gpu.py on a GPU.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FASTER_ON = {"convolutions": {"cpu"}, "positions": {"cpu"}}
"""Types of devices on which the front end's and the positional convolution are computed here."""


def take_over(part: str, device: torch.device) -> bool:
    """Whether ``part`` is computed here on ``device``."""
    return device.type in FASTER_ON[part]


def compute_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """The type that autocast asks for, else ``default``: autocast does not reach into what is written out here."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else default


class CpuDropout(torch.autograd.Function):
    """Dropout from 16 random bits per element, four times faster on a CPU than PyTorch's Bernoulli draws.

    What is kept is scaled by a number of x's type, and the probability is the one whose inverse that is, to 2^-16: 0.1
    becomes 0.0986 in bfloat16. The expectation stays that of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        scale = torch.tensor(1 / (1 - probability), dtype=x.dtype).item()
        dropped = round((1 - 1 / scale) * 65_536)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        ctx.noise = (bits[: x.numel()] >= dropped - 32_768).view(x.shape).to(x.dtype).mul_(scale)
        return x * ctx.noise

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.noise, None


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Sets elements to 0 with ``probability`` and scales the others up, when ``training``."""
    if x.device.type == "cpu" and training and probability > 0:
        return CpuDropout.apply(x, probability)
    return F.dropout(x, probability, training)


class StridedConv(torch.autograd.Function):
    """A convolution over rows of channels, as matrix products on views: nothing is copied or padded.

    x [R, C], R a multiple of ``stride`` (all clips one after the other), weight [O, C, k] to [R / stride, O], row r
    being the convolution that starts at row r * stride. Read as [R / stride, stride * C], x holds ``stride`` taps side
    by side, and the next ``stride`` taps are the same matrix one row further on. Rows that reach over the end of a clip
    mix it with the next: ``FeatureExtractor`` leaves room for them and drops them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.shapes = x.shape, weight.shape
        x = x.view(len(x) // stride, -1)
        taps = weight.permute(2, 1, 0).reshape(-1, len(weight))
        ctx.save_for_backward(x, taps)
        width = x.shape[1]
        y = x @ taps[:width]
        for shift in range(1, math.ceil(len(taps) / width)):
            part = taps[shift * width : (shift + 1) * width]
            y[:-shift].addmm_(x[shift:, : len(part)], part)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, taps = ctx.saved_tensors
        x_shape, (outputs, channels, kernel) = ctx.shapes
        width = x.shape[1]
        x_gradient, taps_gradient = gradient @ taps[:width].T, torch.empty_like(taps)
        torch.mm(x.T, gradient, out=taps_gradient[:width])
        for shift in range(1, math.ceil(len(taps) / width)):
            part = taps[shift * width : (shift + 1) * width]
            x_gradient[shift:, : len(part)].addmm_(gradient[:-shift], part.T)
            torch.mm(
                x[shift:, : len(part)].T, gradient[:-shift], out=taps_gradient[shift * width : (shift + 1) * width]
            )
        return x_gradient.view(x_shape), taps_gradient.view(kernel, channels, outputs).permute(2, 1, 0), None


def group_normed(conv: nn.Conv1d, norm: nn.GroupNorm, waveforms: Tensor, rows: int) -> Tensor:
    """The first convolution with its GroupNorm, waveforms [B, S] to [B * rows, C].

    A convolution of one channel is linear in windows of k samples, so mean and variance over time of channel c are
    w_c . mean and w_c . covariance . w_c of the windows: normalisation becomes other weights for each clip, and the
    [B, C, T] tensor is written once instead of read and written in three passes, forward and backward.
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    dtype = compute_dtype(waveforms.device, waveforms.dtype)
    with torch.autocast(waveforms.device.type, enabled=False):
        with torch.no_grad():
            windows = waveforms.double().unfold(1, kernel, stride)
            mean = windows.mean(1, keepdim=True)
            covariance = (windows - mean).mT @ (windows - mean) / windows.shape[1]
        weight = conv.weight[:, 0].T  # [k, C]
        covariance, mean = covariance.to(weight.dtype), mean.to(weight.dtype)  # [B, k, k], [B, 1, k]
        variance = (weight * (covariance @ weight)).sum(1, keepdim=True)  # [B, 1, C]
        scale = norm.weight / torch.sqrt(variance + norm.eps)
        # A constant input carries the shift; 16 inputs, since matrix units like such sizes.
        weights = torch.cat([scale * weight, norm.bias - scale * (mean @ weight)], 1)
        inputs = math.ceil((kernel + 1) / 16) * 16
        weights = F.pad(weights, (0, 0, 0, inputs - kernel - 1))
        x = waveforms.new_zeros(len(waveforms), rows, inputs, dtype=dtype)
        padded = F.pad(waveforms, (0, max(0, (rows - 1) * stride + kernel - waveforms.shape[1])))
        x[..., :kernel] = padded.unfold(1, kernel, stride)[:, :rows]
        x[..., kernel] = 1
    return torch.bmm(x, weights).flatten(0, 1)


def transforms(kernel: int) -> tuple[Tensor, Tensor]:
    """Real Fourier transform of 2 k samples as a matrix [2, F = k + 1, 2 k], and its inverse's first k samples."""
    # The turns are whole numbers, taken modulo a full one: large angles would lose digits.
    turns = torch.outer(torch.arange(kernel + 1), torch.arange(2 * kernel)) % (2 * kernel)
    angles = turns.double() * (math.pi / kernel)
    transform = torch.stack([angles.cos(), -angles.sin()])
    # Frequencies other than the first and last stand for themselves and their mirror.
    twice = torch.full((kernel + 1, 1), 2.0).index_fill_(0, torch.tensor([0, kernel]), 1.0)
    inverse = (transform * twice / (2 * kernel))[..., :kernel]
    return transform.to(torch.get_default_dtype()), inverse.to(torch.get_default_dtype(), copy=True)


def grouped_convolution(conv: nn.Conv1d, transform: Tensor, inverse: Tensor, x: Tensor) -> Tensor:
    """``conv``, stride 1, with as many groups as it has and padded by half its kernel, [B, T, D] to [B, T, D].

    Computed in the frequency domain (overlap-save, blocks of twice the kernel), exact to rounding: less than half the
    time of a direct grouped convolution from two clips on. The transforms (``transforms``) are matrix products: their
    sizes are small and the layout comes out right.
    """
    dtype = compute_dtype(x.device, transform.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _convolve(conv, transform.to(dtype), inverse.to(dtype), x.to(dtype))


def _convolve(conv: nn.Conv1d, transform: Tensor, inverse: Tensor, x: Tensor) -> Tensor:
    clips, frames, size = x.shape
    groups, kernel = conv.groups, conv.kernel_size[0]
    blocks = math.ceil(frames / kernel)
    before = conv.padding[0]
    x = F.pad(x, (0, 0, before, (blocks + 1) * kernel - before - frames))
    x = x.unfold(1, 2 * kernel, kernel).reshape(clips * blocks, groups, -1, 2 * kernel)
    # By frequency and group, real parts of all blocks above imaginary ones, [F, G, 2 * B * blocks, D / G]: the
    # kernel's spectrum, the largest tensor here, is then read once for both.
    x = torch.einsum("cfk,bgik->fgcbi", transform, x).flatten(2, 3)
    weight = conv.weight.to(x.dtype).view(groups, size // groups, -1, kernel)
    spectra = (torch.einsum("fk,goik->fgoi", part, weight) for part in transform[..., :kernel])
    by_real, by_imaginary = ((x @ spectrum.mT).unflatten(2, (2, -1)) for spectrum in spectra)
    # A correlation: the spectrum of x times the conjugate of the kernel's.
    real = by_real[:, :, 0] + by_imaginary[:, :, 1]
    imaginary = by_real[:, :, 1] - by_imaginary[:, :, 0]
    y = torch.einsum("cfk,cfgbo->bkgo", inverse, torch.stack([real, imaginary]))
    return y.reshape(clips, blocks * kernel, size)[:, :frames] + conv.bias.to(x.dtype)
