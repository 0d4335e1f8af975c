"""Updates made smaller for the way up: float16, int8 or top-k, with what was lost kept by the client for next time.

Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847): the client adds what earlier rounds lost
before it encodes, so that the sum of what the server decodes stays within one round's loss of the sum of the true
updates. An answer that is lost (late, an outlier) takes what it carried with it, but with SCAFFOLD, which forgets it.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedhubert_lib.federated import client_state
from fedhubert_lib.federated.hooks import Hook, Update
from fedhubert_lib.federated.optimisers import UpdateError, check
from fedhubert_lib.federated.protocol import Arrays
from fedhubert_lib.params import Compression

BLOCK = 1024
"""Weights that share one int8 scale: 4 bytes of scale on 1024 of weights."""

_SCALES = "/scales"
_INDICES, _VALUES = "indices", "values"


def encoded(update: Update) -> Iterator[None]:
    """The client: encode its update; what is lost of it waits on its disk for its next part in a round."""
    yield
    p = update.p
    if p.compression == "float16":  # it loses too little to be worth a file of the model's size on the client's disk
        update.change = encode(update.change, p.compression)
        return
    lost = client_state.load(update.home, update.config, "lost")
    update.change, lost = with_feedback(update.change, p.compression, lost, fraction=p.top_k_fraction)
    client_state.save(update.home, update.config, "lost", lost)


class Decoding(Hook):
    """The server: decode what arrives."""

    def received(self, round, update: Arrays) -> Arrays:
        return decode(update, self.p.compression, round.payload)


def encode(update: Mapping[str, Tensor], kind: Compression, *, fraction: float = 0.01) -> Arrays:
    """The tensors that travel for ``update`` (float32, CPU).

    float16: each value rounded. int8: blocks of ``BLOCK`` values of a tensor share a float32 scale, the largest of
    them over 127, values rounded to the nearest. top-k: the ``fraction`` of all values that is largest in
    magnitude, as int32 positions in the tensors laid end to end in sorted order of names, and float32 values.
    Non-finite values are errors: the client would keep them as lost. What else cannot travel ``decode`` refuses.
    """
    for name, value in update.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} has NaN or infinite values; the local training diverged, nothing is sent")
    if kind == "float16":
        return {name: value.half() for name, value in update.items()}
    if kind == "int8":
        quantised = {}
        for name, value in update.items():
            quantised[name], quantised[name + _SCALES] = _quantise(value)
        return quantised
    flat = torch.cat([update[name].reshape(-1) for name in sorted(update)])
    count = max(1, round(fraction * flat.numel()))
    indices = flat.abs().topk(count, sorted=False).indices.sort().values
    return {_INDICES: indices.to(torch.int32), _VALUES: flat[indices]}


def decode(encoded: Mapping[str, Tensor], kind: Compression, like: Mapping[str, Tensor]) -> Arrays:
    """The float32 update in ``encoded``, of the names and shapes of ``like``.

    Raises UpdateError where names, shapes, dtypes or positions do not fit: the sender may be broken or hostile. Values
    that are not finite pass, and are refused with the decoded update (``optimisers.checked_norm``).
    """
    if kind == "float16":
        check(encoded, like, torch.float16)
        return {name: encoded[name].float() for name in like}
    if kind == "int8":
        scales = {name: value for name, value in encoded.items() if name.endswith(_SCALES)}
        check(scales, {name + _SCALES: torch.empty(-(-value.numel() // BLOCK)) for name, value in like.items()})
        check({name: encoded[name] for name in encoded.keys() - scales.keys()}, like, torch.int8)
        blocks = {name: _blocks(encoded[name].float()) * encoded[name + _SCALES][:, None] for name in like}
        return {name: blocks[name].view(-1)[: value.numel()].view(value.shape) for name, value in like.items()}
    values, total = encoded.get(_VALUES, torch.zeros(0)).flatten(), sum(value.numel() for value in like.values())
    check({name: value for name, value in encoded.items() if name != _INDICES}, {_VALUES: values})
    check({name: value for name, value in encoded.items() if name != _VALUES}, {_INDICES: values}, torch.int32)
    indices = encoded[_INDICES].long()
    if len(indices) and not (indices[0] >= 0 and indices[-1] < total and (indices.diff() > 0).all()):
        raise UpdateError(f"top-k positions are not increasing within 0..{total - 1}")
    flat, names = torch.zeros(total), sorted(like)
    flat[indices] = values
    pieces = flat.split([like[name].numel() for name in names])
    return {name: piece.view(like[name].shape) for name, piece in zip(names, pieces, strict=True)}


def with_feedback(
    update: Mapping[str, Tensor], kind: Compression, lost: Mapping[str, Tensor] | None, *, fraction: float = 0.01
) -> tuple[Arrays, Arrays]:
    """Encode ``update`` plus what earlier rounds ``lost``; return what travels, and what is now lost (float32)."""
    due = {name: value + lost[name] if lost else value for name, value in update.items()}
    sent = encode(due, kind, fraction=fraction)
    arrived = decode(sent, kind, update)
    return sent, {name: due[name] - arrived[name] for name in due}


def _quantise(value: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _blocks(value)
    scales = blocks.abs().amax(1) / 127
    # A block of zeros has scale 0 and stays zero. So does one of subnormal values, whose scale rounds to 0.
    quantised = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0).round().clamp(-127, 127)
    return quantised.to(torch.int8).view(-1)[: value.numel()].view(value.shape), scales


def _blocks(value: Tensor) -> Tensor:
    """``value`` flat, zero-padded to whole blocks: [blocks, BLOCK]."""
    return torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
