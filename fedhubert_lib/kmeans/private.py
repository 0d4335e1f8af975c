"""Differentially private Lloyd rounds (``noise_multiplier``): what a client releases, where they start, their cost."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedhubert_lib import params, seeds
from fedhubert_lib.federated import accounting, noise
from fedhubert_lib.federated.protocol import ClientHome

DELTA = 1e-5


def released(home: ClientHome, config: Mapping[str, Any], sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """A client's sums [K, D] and counts [K], scaled down to norm ``noise_clip`` together, with Gaussian noise on top.

    Its standard deviation is ``noise_multiplier`` x ``noise_clip``, and it is of the system's entropy. Raises
    ValueError when a real server asks for noise from its seed.
    """
    if config["noise_seeded"] and not home.simulated:
        raise ValueError("the server asks for noise from a seed that it knows; refused outside of a simulation")
    seed = config["seed"] if config["noise_seeded"] else None
    normal, unit = noise.generator(seed, config["round"], home.client, "kmeans"), sums.shape[1] ** 0.5
    # Sums are bounded in units of sqrt(D), the length of a frame whose dimensions have variance 1.
    bounded = {"sums": sums / unit, "counts": counts}
    noise.clip(bounded, config["noise_clip"])
    std = config["noise_multiplier"] * config["noise_clip"]
    noised = bounded["sums"] + std * normal(*sums.shape)
    return noised * unit, bounded["counts"] + std * normal(*counts.shape)


def random_start(config: Mapping[str, Any]) -> Tensor:
    """Centroids that no client had a part in: standard normal draws, for features of about unit variance."""
    generator = seeds.torch_generator(config["seed"], "kmeans-random-start")
    return torch.randn(config["clusters"], config["width"], generator=generator)


def cost(p: params.Kmeans, rounds: int) -> dict[str, Any]:
    """What ``rounds`` noised Lloyd rounds have spent, for all speech of one client against everybody else."""
    protected = "not private: noise drawn from the seed" if p.noise_seeded else "client"
    epsilon = accounting.epsilon([(1.0, p.noise_multiplier, rounds)], DELTA)
    return {"epsilon": epsilon, "delta": DELTA, "privacy": protected}
