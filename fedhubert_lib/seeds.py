"""Every random draw of the project comes from here: (seed, keys) in, a generator out.

The keys say what the draw is for, usually (round, client, purpose). Drawing from a hash of them, instead of from one
stream, makes a draw independent of the order in which others happened: of the engine, of the cohort, of a restart.
The stage is no key: with one seed a student's rounds draw the clients, crops and masks of its teacher's.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *keys: int | str) -> int:
    """A 63-bit seed from ``seed`` and ``keys`` (BLAKE2b; the same on every machine and Python).

    >>> derive(0, 3, "client-001", "mask") == derive(0, 3, "client-001", "mask")
    True
    """
    text = repr((int(seed), *keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, *keys: int | str) -> np.random.Generator:
    """A NumPy generator of its own for ``keys``."""
    return np.random.Generator(np.random.PCG64(derive(seed, *keys)))


def torch_generator(seed: int, *keys: int | str) -> "torch.Generator":
    """A torch CPU generator of its own for ``keys``."""
    import torch  # here: drawing who owns what needs no half gigabyte of it

    return torch.Generator().manual_seed(derive(seed, *keys))
