"""Bounded contributions and Gaussian noise that nobody can draw again: the two halves of every private release."""

import math
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedhubert_lib import seeds


def generator(seed: int | None, *keys: int | str) -> Callable[..., Tensor]:
    """A generator of standard normal noise: called with a shape, it returns float64 values, new each time.

    With ``seed`` None its key is 32 bytes of the system's entropy: nobody, this process included, can draw the noise
    again. With a seed it is drawn by (seed, keys), for simulations that must repeat: that protects nobody, since who
    knows the seed can subtract it. The generator is AES-256 in counter mode, then Box and Muller's transform: torch's
    own has 32 bits of seed, few enough to try them all.
    """
    key = os.urandom(32) if seed is None else seeds.derive(seed, *keys, "noise").to_bytes(32, "little")
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def normal(*shape: int) -> Tensor:
        count = math.prod(shape)
        pairs = -(-count // 2)
        bits = np.frombuffer(stream.update(bytes(16 * pairs)), "<u8").reshape(2, pairs) >> 11
        radius, angle = torch.from_numpy((bits + 0.5) * 2.0**-53)  # uniform, of 53 bits and never 0
        radius, angle = radius.log_().mul_(-2).sqrt_(), angle.mul_(2 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].view(shape)

    return normal


def norm(arrays: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all tensors together, in float64 and in sorted order of names."""
    return math.sqrt(sum(float(arrays[name].double().square().sum()) for name in sorted(arrays)))


def clip(arrays: Mapping[str, Tensor], bound: float) -> float:
    """Scale ``arrays`` in place to norm ``bound`` where longer; return the norm before. NaN and infinity are errors."""
    before = norm(arrays)
    if not math.isfinite(before):
        raise ValueError("the update has a NaN or infinite norm; nothing of it can be sent under a privacy bound")
    if before > bound:
        # One part in a million short of the bound: float32 rounding must not carry the result beyond it.
        for value in arrays.values():
            value.mul_(bound / before * (1 - 1e-6))
    return before
