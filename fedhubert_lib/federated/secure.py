"""Secure aggregation: the server learns the sum of a cohort's updates and no single one.

Each pair of clients shares a secret and derives from it a stream of random integers, which one adds to its update and
the other subtracts: the sum is that of the updates, exactly, since all arithmetic is on integers modulo 2^32 (Bonawitz
et al. 2017, the protocol without dropout recovery). Two messages per round: a public key from each client, then the
masked update to all keys.

What it does not do. It is made for a server that is curious but honest: one that forges keys of peers can unmask a
client, and Flower gives clients no way to learn each other's keys but through the server. If one client is lost between
the two messages, the masks do not cancel and the round is repeated; recovering them takes two more messages, and Flower
has that only in its older workflow API, which its Message API cannot call. Two sums of one round, with and without a
client, reveal its update. Metrics travel in the clear, except under ``privacy: client``, which sends none.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from fedhubert_lib.federated import client_state, handlers, noise, privacy
from fedhubert_lib.federated.hooks import Hook, Update
from fedhubert_lib.federated.optimisers import Collector, UpdateError, check
from fedhubert_lib.federated.privacy import SMALLEST_SUM
from fedhubert_lib.federated.protocol import Arrays, ClientHome, Failure
from fedhubert_lib.params import Federation

NOISE_ROOM = 10
"""Room in a sum's range for a client's noise, in its standard deviations."""
_KEY = "secure-key"


# ---------------------------------------------------------------------------------------------------------- at a client


def keys(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Arrays, dict[str, float]]:
    """Handler: make a key pair for this round; keep the private one, send the public one (uint8 [32])."""
    private = X25519PrivateKey.generate()
    client_state.save(home, config, _KEY, {"private": _tensor(private.private_bytes_raw())})
    return {"public": _tensor(private.public_key().public_bytes_raw())}, {}


handlers.HANDLERS |= {"pretrain.keys": keys, "distill.keys": keys}


def masked(update: Update) -> Iterator[None]:
    """Bound the update, if privacy has not done so, and mask it."""
    yield
    if update.p.privacy == "none":
        update.measured["update_norm"] = noise.clip(update.change, update.config["clip"])
    update.change = mask(update.change, update.home, update.config, update.p)


def mask(update: Mapping[str, Tensor], home: ClientHome, config: Mapping[str, Any], p: Federation) -> Arrays:
    """``update`` (norm at most ``config["clip"]``) in fixed point, int32 modulo 2^32, under the masks shared with
    ``config["peers"]`` (public keys in hex by client, this one among them).

    Raises ValueError when the peers are too few, or the key was used before: two sums that differ in one client reveal
    that client's update.
    """
    peers = dict(config["peers"])
    if len(peers) < SMALLEST_SUM:
        raise ValueError(f"asked for a sum with {len(peers) - 1} others; fewer than {SMALLEST_SUM} clients hide nobody")
    if (saved := client_state.take(home, config, _KEY)) is None:
        raise ValueError("no unused key of this round; ask for keys first")
    private = X25519PrivateKey.from_private_bytes(saved["private"].numpy().tobytes())
    if peers.pop(home.client, None) != private.public_key().public_bytes_raw().hex():
        raise ValueError("the peers hold another key in this client's name")
    count = len(peers) + 1
    factor = scale(p, config["clip"], count)
    masked = {name: _fixed(name, update[name], factor, 2**31 / count) for name in sorted(update)}
    for peer, public in sorted(peers.items()):
        stream = _stream(private, public)
        for values in masked.values():
            pad = np.frombuffer(stream.update(bytes(values.nbytes)), np.uint32).reshape(values.shape)
            np.add(values, pad, out=values) if home.client < peer else np.subtract(values, pad, out=values)
    return {name: torch.from_numpy(values.view(np.int32)) for name, values in masked.items()}


def _fixed(name: str, values: Tensor, factor: float, limit: float) -> np.ndarray:
    """``values`` times ``factor`` as integers modulo 2^32."""
    scaled = np.asarray(np.rint(values.double().numpy() * factor))
    if not (np.abs(scaled) < limit).all():
        raise ValueError(f"{name} has values beyond the range that the clipping norm allows")
    return scaled.astype(np.int64).astype(np.uint32)


def _stream(private: X25519PrivateKey, public: str) -> Any:
    """AES-256 in counter mode under the secret that the two keys share: the same bytes for both ends of a pair."""
    secret = private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    key = HKDF(hashes.SHA256(), 32, salt=None, info=b"fedhubert secure aggregation").derive(secret)
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def _tensor(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


# -------------------------------------------------------------------------------------------------------- at the server


class Summing(Hook):
    """Exchange the cohort's keys, then add up masked updates of all who sent one."""

    def __init__(self, server) -> None:
        super().__init__(server)
        server.bounded = True

    def message(self, round) -> None:
        """Ask for public keys, and only those for updates who sent one: a sum is of all of them or of nobody.

        With too few keys nobody is asked. In a private study that is a round like any other.
        """
        round.message["clip"] = round.row["clip"] = self.p.privacy_clip  # unless privacy has another one
        peers = {}
        for reply in self.server.ask("keys", round.message, round.cohort):
            try:
                if isinstance(reply, Failure):
                    raise UpdateError(reply.reason)
                peers[reply.client] = public_key(reply.arrays)
            except UpdateError as error:
                self.server.fail(round.number, reply.client, str(error))
        if self.p.privacy != "server":
            round.quorum = max(round.quorum, SMALLEST_SUM)
        round.asked = sorted(peers) if len(peers) >= max(round.quorum, SMALLEST_SUM) else []
        if len(peers) >= round.quorum:
            round.quorum = len(round.asked)
        round.message["peers"] = peers

    def collector(self, round) -> "Sum | None":
        if not round.asked:
            return None
        return Sum(self.server.weights, scale(self.p, round.message["clip"], len(round.asked)))


def scale(p: Federation, clip: float, clients: int) -> float:
    """Fixed-point steps per unit: as fine as lets a sum of ``clients`` values of the largest size fit 32 bits."""
    room = 1 + NOISE_ROOM * privacy.update_multiplier(p) / math.sqrt(p.cohort) if p.privacy == "client" else 1
    return (2**31 - clients) / (clip * room * clients)


class Sum(Collector):
    """Adds up masked updates, whatever their order. The result is the mean, float32."""

    def __init__(self, like: Mapping[str, Tensor], factor: float) -> None:
        self._sums = {name: np.zeros(tuple(tensor.shape), np.uint32) for name, tensor in like.items()}
        self._factor, self._count = factor, 0

    def norm(self, update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> float:
        """NaN: the values of a masked update say nothing. Raises UpdateError as ``optimisers.check``, for int32."""
        check(update, like, torch.int32)
        return math.nan

    def add(self, update: Arrays, weight: float) -> None:
        """Add one client's; ``weight`` must be 1."""
        for name, total in self._sums.items():
            np.add(total, update[name].numpy().view(np.uint32), out=total)
        self._count += 1

    def result(self) -> Arrays:
        """The mean, once every client that had the same peers has been added: before that it is noise."""
        steps = self._factor * self._count
        means = {name: np.asarray(total.view(np.int32) / steps) for name, total in self._sums.items()}
        return {name: torch.from_numpy(mean).float() for name, mean in means.items()}


def public_key(arrays: Mapping[str, Tensor]) -> str:
    """The public key in a client's answer to ``keys``, in hex. Raises UpdateError when it is none."""
    key = arrays.get("public")
    if key is None or key.dtype != torch.uint8 or key.shape != (32,):
        raise UpdateError("its answer holds no public key")
    content = key.numpy().tobytes()
    try:  # a point of low order would make the exchange of each of its peers fail
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(content))
    except ValueError:
        raise UpdateError("no secret can be agreed on with its public key") from None
    return content.hex()
