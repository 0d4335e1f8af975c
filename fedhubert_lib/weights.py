"""Weights and optimiser moments by name, into a module and out of it, to a device and back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Arrays = dict[str, Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""The tensors that AdamW keeps for each parameter."""


@torch.no_grad()
def fill(module: nn.Module, arrays: Mapping[str, Tensor], personal: Mapping[str, Tensor] | None = None) -> None:
    """Write the global weights, and the client's ``personal`` parameters where it kept some, into ``module``."""
    names = dict(module.named_parameters())
    arrays = placed({name: arrays[name] for name in names if name in arrays}, next(module.parameters()).device)
    for name, parameter in names.items():
        if name in arrays:
            parameter.copy_(arrays[name])
        elif personal is not None:
            parameter.copy_(personal[name])


_placed: dict[str, tuple[list[tuple[int, int]], Arrays, Arrays]] = {}
"""By device, the last weights that were put on it: identities and versions then, themselves, their copies there."""


def placed(arrays: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """``arrays`` on ``device``. A GPU keeps the last ones: a cohort's clients in one process get the same."""
    if device.type == "cpu":
        return arrays
    versions = [(id(tensor), tensor._version) for tensor in arrays.values()]
    if str(device) not in _placed or _placed[str(device)][0] != versions:
        _placed[str(device)] = versions, dict(arrays), {name: tensor.to(device) for name, tensor in arrays.items()}
    return _placed[str(device)][2]


def to_host(tensors: Mapping[str, Tensor]) -> Arrays:
    """float32 ``tensors`` of one device on the CPU: from a GPU in one copy, into pinned memory, which is used again."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return dict(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    host = torch.empty(flat.shape, pin_memory=True).copy_(flat)
    parts = host.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def restore_moments(optimiser: torch.optim.AdamW, names: Mapping[str, nn.Parameter], kept: Arrays) -> None:
    """Give AdamW a copy of the moments that ``moments`` read from it."""
    for name, parameter in names.items():
        optimiser.state[parameter] = {key: kept[f"{name}/{key}"].to(parameter.device, copy=True) for key in MOMENTS}


def moments(optimiser: torch.optim.AdamW, names: Mapping[str, nn.Parameter]) -> Arrays:
    """AdamW's moments of each parameter, NAME/MOMENT, as tensors that can be saved."""
    kept: Arrays = {}
    for name, parameter in names.items():
        if not (state := optimiser.state.get(parameter)):  # layerdrop left its layer out of every step so far
            state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            state["step"] = torch.zeros((), device=parameter.device)
        kept |= {f"{name}/{key}": state[key].detach() for key in MOMENTS}
    return to_host(kept)
