"""FedProx (Li et al. 2020, arXiv 1812.06127): clients are held near the global weights."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from fedhubert_lib import training
from fedhubert_lib.federated.hooks import Update


def proximal(update: Update) -> Iterator[None]:
    """Add ``proximal`` / 2 times the squared distance to the global weights to the loss; personal ones have none."""
    common = [parameter for name, parameter in update.names.items() if name in update.arrays]
    update.adjust.append(pull(common, update.p.proximal))
    yield


def pull(parameters: Sequence[Tensor], strength: float) -> training.Adjust:
    """The gradient of ``strength`` / 2 times the squared distance to what ``parameters`` are now."""
    start = [parameter.detach().clone() for parameter in parameters]

    def add(factor: float) -> None:
        for parameter, origin in zip(parameters, start, strict=True):
            training.gradient(parameter).add_(parameter.detach() - origin, alpha=strength * factor)

    return add
