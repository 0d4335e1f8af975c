"""A client's part of a round of training, whatever the task: global weights in, local steps, the difference out.

Tensors of ``arrays`` are the global weights (and SCAFFOLD's control variate c, prefixed). Parameters of the module that
are not among them are personal: they come from the client's disk and stay there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fedhubert_lib import batching, compression, privacy, resources, secure, seeds, threads, training
from fedhubert_lib.batching import Batch
from fedhubert_lib.federated import client_state
from fedhubert_lib.federated.optimisers import CONTROL
from fedhubert_lib.federated.protocol import Arrays, ClientHome
from fedhubert_lib.params import Federation

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps for each parameter."""


def train(
    home: ClientHome,
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    p: Federation,
    module: nn.ModuleDict,
    batches: Iterable[Batch],
    objective: training.Objective,
    steps: int,
) -> tuple[Arrays, dict[str, float]]:
    """Local steps on ``batches``, which are ``steps``, from the global weights; the change of every parameter that
    travels, and what was measured. ``module`` must be filled (``fill``); it is trained in place.

    Where in the schedule of the learning rate a client stands is told by the round, not by how many it had a part in.
    """
    module["model"].gradient_checkpointing(p.gradient_checkpointing)
    names = dict(module.named_parameters())
    chosen = replace(settings(p, p.rounds * steps), proximal=p.proximal)
    optimiser = training.adamw(module, chosen)
    if p.local_state == "keep":
        restore_moments(optimiser, names, client_state.load(home, config, "moments"))
    scaffold = any(name.startswith(CONTROL) for name in arrays)
    own = client_state.load(home, config, "control") if scaffold else None
    gradients: Arrays = {}
    if scaffold:
        optimiser.register_step_pre_hook(lambda *_: _add_gradients(gradients, names))
    with threads.limited(p.threads):
        measured = training.local_update(
            module,
            batches,
            objective,
            chosen,
            first_step=(config["round"] - 1) * steps,
            total_steps=p.rounds * steps,
            seed=seeds.derive(p.seed, config["round"], home.client, "dropout"),
            optimiser=optimiser,
            control=_correction(arrays, own, names) if scaffold else None,
        )
    personal = {name: parameter.detach().cpu() for name, parameter in names.items() if name not in arrays}
    if personal:
        client_state.save(home, config, "personal", personal)
    if p.local_state == "keep":
        client_state.save(home, config, "moments", moments(optimiser, names))
    start = placed(arrays, next(iter(names.values())).device)
    change = to_host({name: names[name].detach() - start[name] for name in names if name in arrays})
    if scaffold:
        change |= _new_control(home, config, arrays, own, gradients, measured["steps"])
    measured["peak_memory_bytes"] = float(resources.peak_memory())
    if p.privacy == "client":  # nothing else is for a server that is not trusted
        measured = {"learning_rate": measured["learning_rate"]}
    if p.privacy != "none":
        measured |= privacy.protect(change, p, config["clip"], home, config["round"])
    elif p.secure_aggregation:
        privacy.clip(change, config["clip"])
    if p.secure_aggregation:
        return secure.mask(change, home, config, p), measured
    return _compressed(home, config, p, change), measured


def steps(home: ClientHome, p: Federation, number: int) -> int:
    """Optimiser steps of this client in round ``number``: ``local_steps``, or ``local_epochs`` passes if those are
    fewer."""
    if not p.local_epochs:
        return p.local_steps
    samples = pd.read_parquet(home.data / "train.parquet", columns=["samples"])["samples"].to_numpy(dtype=np.int64)
    draw = {"seed": p.seed, "round": number, "client": home.client}
    sizes = {"batch_seconds": p.batch_seconds, "crop_seconds": p.crop_seconds}
    return min(p.local_steps, batching.steps_of(samples, p.local_epochs, **draw, **sizes))


def _compressed(home: ClientHome, config: Mapping[str, Any], p: Federation, change: Arrays) -> Arrays:
    """``change`` as it travels; what is lost of it waits on the client's disk for its next part in a round."""
    if p.compression not in compression.WITH_FEEDBACK:
        return compression.encode(change, p.compression)
    lost = client_state.load(home, config, "lost")
    encoded, lost = compression.with_feedback(change, p.compression, lost, share=p.top_k_share)
    client_state.save(home, config, "lost", lost)
    return encoded


def settings(p: Federation, total_steps: int, accumulate: int = 1) -> training.Settings:
    """How training steps, a client's and pooled alike, in a study of ``total_steps`` global steps. FedProx, which is
    the client's alone, is not among it: it holds a client near the others' weights, and pooled training has no others.
    """
    return training.Settings(
        learning_rate=p.learning_rate,
        warmup_steps=round(p.warmup_share * total_steps),
        weight_decay=p.weight_decay,
        clip_norm=p.clip_norm,
        accumulate=accumulate,
        precision=p.precision,
    )


@torch.no_grad()
def fill(module: nn.Module, arrays: Mapping[str, Tensor], personal: Mapping[str, Tensor] | None) -> None:
    """Write the global weights, and what the client kept of its ``personal`` parameters, into ``module``."""
    arrays = placed(arrays, next(module.parameters()).device)
    for name, parameter in module.named_parameters():
        if name in arrays:
            parameter.copy_(arrays[name])
        elif personal is not None:
            parameter.copy_(personal[name])


_placed: dict[str, tuple[list[Tensor], list[int], Arrays]] = {}
"""By device, the last weights that were put on it: themselves, their versions then, their copies there."""


def placed(arrays: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """``arrays`` on ``device``. A GPU keeps the last ones: a cohort's clients in one process are given the same."""
    if device.type == "cpu":
        return arrays
    tensors = list(arrays.values())
    kept, versions, copies = _placed.get(str(device), ([], [], {}))
    same = len(kept) == len(tensors) and all(a is b for a, b in zip(kept, tensors, strict=True))
    if not same or versions != [tensor._version for tensor in tensors]:
        copies = {name: tensor.to(device) for name, tensor in arrays.items()}
        _placed[str(device)] = tensors, [tensor._version for tensor in tensors], copies
    return copies


def to_host(tensors: Mapping[str, Tensor]) -> Arrays:
    """float32 ``tensors`` of one device on the CPU: from a GPU in one copy, into pinned memory, which is used again."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return dict(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    host = torch.empty(flat.shape, pin_memory=True).copy_(flat)
    parts = host.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def restore_moments(
    optimiser: torch.optim.AdamW, names: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor] | None
) -> None:
    """Give AdamW the moments that ``moments`` read from it; None: it starts anew."""
    for name, parameter in names.items() if kept else ():
        optimiser.state[parameter] = {key: kept[f"{name}/{key}"].to(parameter.device) for key in MOMENTS}


def moments(optimiser: torch.optim.AdamW, names: Mapping[str, nn.Parameter]) -> Arrays:
    """What AdamW keeps of each parameter, as tensors that can be saved."""
    kept = {}
    for name, parameter in names.items():
        if not (state := optimiser.state.get(parameter)):  # layerdrop left its layer out of every step so far
            state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            state["step"] = torch.zeros((), device=parameter.device)
        kept |= {f"{name}/{key}": state[key].detach() for key in MOMENTS}
    return to_host(kept)


def _correction(
    arrays: Mapping[str, Tensor], own: Mapping[str, Tensor] | None, names: Mapping[str, nn.Parameter]
) -> Arrays:
    """What SCAFFOLD adds to each gradient: c - c_i; nothing for personal parameters."""
    correction = {}
    for name, parameter in names.items():
        if CONTROL + name in arrays:
            common = arrays[CONTROL + name]
            correction[name] = common - own[name] if own else common
        else:
            correction[name] = torch.zeros_like(parameter)
    return correction


def _add_gradients(total: Arrays, names: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in names.items():
        gradient = parameter.grad.detach()
        total[name] = total[name].add_(gradient) if name in total else gradient.clone()


def _new_control(
    home: ClientHome,
    config: Mapping[str, Any],
    arrays: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None,
    gradients: Mapping[str, Tensor],
    steps: float,
) -> Arrays:
    """Keep the new c_i; return its change.

    Karimireddy et al. 2020, option II: c_i+ = c_i - c + (x - y) / (K eta). For plain SGD (x - y) / (K eta) is the mean
    of the gradients stepped along; under AdamW that mean is taken itself.
    """
    new, change = {}, {}
    for name, total in gradients.items():
        if CONTROL + name not in arrays:
            continue
        change[CONTROL + name] = (total / steps).cpu() - arrays[CONTROL + name]
        new[name] = change[CONTROL + name] + own[name] if own else change[CONTROL + name].clone()
    client_state.save(home, config, "control", new)
    return change
