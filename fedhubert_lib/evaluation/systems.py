"""Compared systems: teacher and student, the same trained centrally, and the baselines: random weights and MFCC.

Trained models, untrained ones and MFCC are one kind of function, so that the same code measures them.
"""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedhubert_lib import features, files, hubert, pretrained, records, seeds

CHECKPOINTS = {
    "teacher": ("federated teacher", "03_pretrain/checkpoint"),
    "centralised": ("centralised teacher", "03_pretrain/centralised/checkpoint"),
    "student": ("federated student", "04_distill/checkpoint"),
    "centralised-student": ("centralised student", "04_distill/centralised/checkpoint"),
}
"""Systems that are checkpoints of the run, in the order of the table: title, and folder under the run."""
GIVEN_TEACHER = "given-teacher"
"""The system that taught the student, where 04_distill was given another teacher than that of 03_pretrain."""

Encoder = Callable[..., tuple[Tensor, ...]]
"""Waveforms [B, S] to the states of each layer, equally shaped [B, T, D]; those of models take ``normalised``."""


def of_model(model: hubert.Hubert, device: torch.device) -> Encoder:
    """All N + 1 hidden states of ``model``, from the input of the first layer to the output of the last; no dropout."""
    model = model.to(device).eval()
    # Threads that read and decode share a GPU, whose memory is for one batch.
    turn = threading.Lock() if device.type != "cpu" else contextlib.nullcontext()

    @torch.no_grad()
    def encode(waveforms: Tensor, normalised: bool = False) -> tuple[Tensor, ...]:
        with turn:
            return model(waveforms.to(device), hidden_states=True, normalised=normalised).hidden

    return encode


def untrained(config: hubert.HubertConfig, seed: int) -> hubert.Hubert:
    """The baseline of training: the architecture of ``config`` with random weights drawn from ``seed``."""
    model = hubert.Hubert(config)
    hubert.initialise(model, seeds.torch_generator(seed, "untrained"))
    return model


def mfcc(waveforms: Tensor) -> tuple[Tensor, ...]:
    """Kaldi's 39 MFCC as a single layer [B, T, 39] at 50 Hz: the frames whose clusters are the first targets."""
    return (torch.stack(features.mfcc(list(waveforms)))[:, ::2],)


def mfcc_moments(waveforms: Tensor) -> tuple[Tensor, ...]:
    """MFCC at 100 Hz as one frame of mean and standard deviation over time, [B, 1, 78]: a stronger baseline."""
    frames = torch.stack(features.mfcc(list(waveforms)))
    return (torch.cat([frames.mean(1), frames.std(1)], dim=1)[:, None],)


@dataclass(frozen=True)
class System:
    """One row of the table."""

    name: str
    """Stable, used in report.json."""
    title: str
    encoder: Encoder
    digest: str
    """Of weights and architecture: features cached under it are this system's."""
    model: hubert.Hubert | None = None
    folder: Path | None = None
    frames: bool = True
    """False: a clip is a single frame, so that measures of frames do not apply."""


def of_run(run: Path, seed: int, device: torch.device, checkpoint: str = "") -> tuple[list[System], dict[str, str]]:
    """The systems of ``run`` and, for each that is absent, why; with the model folder ``checkpoint``, if one is named.

    A stage that is not done, or made from an older stage than is there now, has none. The random weights are of the
    architecture of the first system. Raises FileNotFoundError when there is no model: the baselines alone are no
    evaluation.
    """
    systems: list[System] = []
    absent: dict[str, str] = {}
    for name, (title, place) in CHECKPOINTS.items():
        if reason := unusable(run, place):
            absent[name] = reason
        else:
            systems.append(_of_folder(name, title, run / place, device))
    if not systems and not checkpoint:
        raise FileNotFoundError(
            f"{run / CHECKPOINTS['teacher'][1]}: {absent['teacher']}; run 03_pretrain first, or set evaluate.checkpoint"
        )
    if "student" not in absent and (teacher := records.parameters(run / "04_distill").get("teacher")):
        if Path(teacher, "config.json").is_file():
            systems.append(_of_folder(GIVEN_TEACHER, "the student's teacher", Path(teacher), device))
        else:
            absent[GIVEN_TEACHER] = f"{teacher} is gone"
    if checkpoint:
        folder = Path(checkpoint)
        systems.append(_of_folder("checkpoint", f"checkpoint {short_name(folder)}", folder, device))
    config = systems[0].model.config
    model, digest = untrained(config, seed), hashlib.blake2b(repr((config, seed)).encode(), digest_size=8).hexdigest()
    systems.append(System("random", "random weights", of_model(model, device), digest, model))
    systems.append(System("mfcc", "MFCC", mfcc, "mfcc-39"))
    systems.append(System("mfcc-moments", "MFCC, mean and standard deviation", mfcc_moments, "mfcc-78", frames=False))
    return systems, absent


def unusable(run: Path, place: str) -> str:
    """Why the checkpoint ``place`` of ``run`` cannot be evaluated; empty if it can."""
    stage = run / place.split("/")[0]
    if not (run / place / "config.json").is_file():
        return f"no checkpoint in {place}"
    if (stage / "begun.json").is_file() and not (stage / "done.json").is_file():
        return f"{stage.name} is not done"
    why = records.stale(run).get(stage.name.partition("_")[2])
    return f"{stage.name} is {why}; run it again" if why else ""


def short_name(path: Path) -> str:
    """The last part of a path; of RUN/STAGE/checkpoint, as all checkpoints of runs are called, RUN/STAGE."""
    return path.name if path.name != "checkpoint" else "/".join(path.absolute().parts[-3:-1])


def _of_folder(name: str, title: str, folder: Path, device: torch.device) -> System:
    model, _ = pretrained.load(folder)
    return System(name, title, of_model(model, device), _digest(folder), model, folder)


def along(run: Path, device: torch.device) -> Iterator[tuple[int, float, System]]:
    """The models that 03_pretrain has kept on the way, and the last, in the order of rounds.

    With the round, and the hours of speech heard until then, all clients together; a second heard twice counts twice.
    Each has the name of the system that it became: teacher or centralised.
    """
    for name in ("teacher", "centralised"):
        title, place = CHECKPOINTS[name]
        folder = run / place
        rows = files.rounds(folder.parent / "metrics.jsonl")
        heard = np.cumsum([row["audio_seconds"] for row in rows], dtype=float) / 3600
        kept = () if unusable(run, place) else folder.parent.glob("checkpoints/model-*")
        models = {int(path.name[6:]): path for path in kept if path.name[6:].isdecimal()}
        if models and rows:
            models[rows[-1]["round"]] = folder
        for row, hours in zip(rows, heard, strict=True):
            if row["round"] in models and np.isfinite(hours):  # to a server that is not trusted nobody says them
                yield row["round"], float(hours), _of_folder(name, title, models[row["round"]], device)


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    documents = [folder / f"{name}config.json" for name in ("", "preprocessor_", "processor_")]
    for path in [*filter(Path.is_file, documents), *pretrained.weight_files(folder)]:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
