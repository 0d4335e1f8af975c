"""Quicker forms of the model's operations for the CPU, forward and backward, with the same results.

``hubert`` reads without this module: each form stands beside the plain one there. benchmarks/bench_model.py measures
what they gain on a CPU, benchmarks/gpu.py whether the products of matrices would pay on a GPU, too.

Shapes: B clips, S samples, T frames, D hidden size, O and C channels, R rows: all clips one after the other.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedhubert_lib.audio import HOP, frame_count

DEVICES = {"cpu"}
"""Types of devices on which these forms are measured to be faster."""


def pay_on(device: torch.device) -> bool:
    """Whether these forms are used on ``device``; exporters and compilers see the plain ones."""
    return device.type in DEVICES and not torch.compiler.is_compiling()


class Dropout(nn.Dropout):
    """Dropout of x in any shape, on a CPU from 16 random bits per element: a quarter of the time of Bernoulli draws."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.p > 0 and x.device.type == "cpu" and pay_on(x.device):
            return bit_dropout(x, self.p)
        return super().forward(x)


def bit_dropout(x: Tensor, probability: float) -> Tensor:
    """Dropout whose probability is a multiple of 2^-16, and fits a scale in x's type: 0.1 becomes 0.0986 in bfloat16.

    The expectation stays that of x.
    """
    scale = torch.tensor(1 / (1 - probability), dtype=x.dtype).item()
    dropped = round((1 - 1 / scale) * 65_536)
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    noise = (bits[: x.numel()] >= dropped - 32_768).view(x.shape).to(x.dtype).mul_(scale)
    return x * noise


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Scaled dot-product attention in training, [B, heads, T, D / heads] each, to the same.

    PyTorch's fused kernel for CPUs has no dropout, and in bfloat16 takes longer than two matrix products and a softmax.
    """
    if q.device.type != "cpu" or not (dropout or q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    scores = (q * (q.shape[-1] ** -0.5)) @ k.mT
    with torch.autocast("cpu", enabled=False):  # computes in float32 anyway; autocast would copy in and out
        weights = scores.softmax(-1)
    return (bit_dropout(weights, dropout) if dropout else weights) @ v


def front_end(layers: nn.Sequential, waveforms: Tensor) -> Tensor:
    """``hubert.ConvLayer`` s as products of matrices, waveforms [B, S] to [B, T, C].

    Computed on the rows of all clips one after the other, with one frame more than a clip has: what reaches over its
    end ends up in a frame of its own, which is dropped.
    """
    frames = frame_count(waveforms.shape[1]) + 1
    first, *others = layers
    if isinstance(first.layer_norm, nn.GroupNorm):
        x = F.gelu(_group_normed(first.conv, first.layer_norm, waveforms, frames * HOP // first.conv.stride[0]))
    else:
        x = _layer(first, F.pad(waveforms, (0, frames * HOP - waveforms.shape[1])).reshape(-1, 1))  # cuts if negative
    for layer in others:
        x = _layer(layer, x)
    return x.view(len(waveforms), frames, -1)[:, :-1]


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A ``hubert.ConvLayer`` without GroupNorm on rows, [R, C] to [R / stride, O]."""
    dtype = _dtype(x)
    x = StridedConv.apply(x.to(dtype), layer.conv.weight.to(dtype), layer.conv.stride[0])
    if layer.conv.bias is not None:
        x = x + layer.conv.bias.to(x.dtype)
    return F.gelu(layer.layer_norm(x))


def _dtype(x: Tensor) -> torch.dtype:
    """The type that autocast asks for, otherwise x's own: autocast does not reach into what is written out here."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class StridedConv(torch.autograd.Function):
    """A convolution over rows of channels, as matrix products on views: nothing is copied or padded.

    x [R, C], R a multiple of ``stride``, weight [O, C, k] to [R / stride, O], row r being the convolution that starts
    at row r * stride. Read as [R / stride, stride * C], x holds ``stride`` taps side by side, and the next ``stride``
    taps are the same matrix one row further on. Rows that reach over the end of a clip mix it with the next.
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
            rows = slice(shift * width, (shift + 1) * width)
            part = taps[rows]
            x_gradient[shift:, : len(part)].addmm_(gradient[:-shift], part.T)
            torch.mm(x[shift:, : len(part)].T, gradient[:-shift], out=taps_gradient[rows])
        return x_gradient.view(x_shape), taps_gradient.view(kernel, channels, outputs).permute(2, 1, 0), None


def _group_normed(conv: nn.Conv1d, norm: nn.GroupNorm, waveforms: Tensor, rows: int) -> Tensor:
    """The first convolution with its GroupNorm, waveforms [B, S] to [B * rows, O].

    A convolution of one channel is linear in windows of k samples, so mean and variance over time of channel c are
    w_c . mean and w_c . covariance . w_c of the windows: normalisation becomes other weights for each clip, and the
    [B, O, T] tensor is written once instead of read and written in three passes, forward and backward.
    """
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    dtype = _dtype(waveforms)
    with torch.autocast(waveforms.device.type, enabled=False):
        with torch.no_grad():
            windows = waveforms.double().unfold(1, kernel, stride)
            mean = windows.mean(1, keepdim=True)
            covariance = (windows - mean).mT @ (windows - mean) / windows.shape[1]
        weight = conv.weight[:, 0].T  # [k, O]
        covariance, mean = covariance.to(weight), mean.to(weight)  # [B, k, k], [B, 1, k]
        variance = (weight * (covariance @ weight)).sum(1, keepdim=True)  # [B, 1, O]
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


def grouped_convolution(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """``conv`` of stride 1, padded by half its kernel, on [B, T, D]; its first T frames, [B, T, D].

    Computed in the frequency domain (overlap-save, blocks of twice the kernel), exact to rounding: less than half the
    time of a direct grouped convolution from two clips on. The transforms are matrix products: their sizes are small.
    """
    (clips, frames, size), groups, kernel, before = x.shape, conv.groups, conv.kernel_size[0], conv.padding[0]
    blocks, dtype = math.ceil(frames / kernel), _dtype(x)
    transform = torch.from_numpy(_fourier(kernel)).to(conv.bias).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        x = F.pad(x.to(dtype), (0, 0, before, (blocks + 1) * kernel - before - frames))
        x = x.unfold(1, 2 * kernel, kernel).reshape(clips * blocks, groups, -1, 2 * kernel)
        # By frequency and group, real parts of all blocks above imaginary ones, [F, G, 2 * B * blocks, D / G]: the
        # kernel's spectrum, the largest tensor here, is then read once for both.
        x = torch.einsum("cfk,bgik->fgcbi", transform, x).flatten(2, 3)
        weight = conv.weight.to(dtype).view(groups, size // groups, -1, kernel)
        spectra = (torch.einsum("fk,goik->fgoi", part, weight) for part in transform[..., :kernel])
        by_real, by_imaginary = ((x @ spectrum.mT).unflatten(2, (2, -1)) for spectrum in spectra)
        # A correlation: the spectrum of x times the conjugate of the kernel's.
        real = by_real[:, :, 0] + by_imaginary[:, :, 1]
        imaginary = by_real[:, :, 1] - by_imaginary[:, :, 0]
        # Frequencies other than the first and last stand for themselves and their mirror.
        twice = torch.tensor([1.0, *[2.0] * (kernel - 1), 1.0], dtype=dtype, device=x.device)
        inverse = (transform * twice[:, None] / (2 * kernel))[..., :kernel]
        y = torch.einsum("cfk,cfgbo->bkgo", inverse, torch.stack([real, imaginary]))
        return y.reshape(clips, blocks * kernel, size)[:, :frames] + conv.bias.to(dtype)


@functools.cache
def _fourier(kernel: int) -> np.ndarray:
    """Real Fourier transform of 2 k samples as a matrix, float64 [2, F = k + 1, 2 k]."""
    # The turns are whole numbers, taken modulo a full one: large angles would lose digits.
    angles = np.outer(np.arange(kernel + 1), np.arange(2 * kernel)) % (2 * kernel) * (math.pi / kernel)
    return np.stack([np.cos(angles), -np.sin(angles)])
