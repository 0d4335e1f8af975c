"""What is compared: teacher and student, the centralised yardsticks, and the floors: random weights and MFCC."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from fedhubert_lib import checkpoints, files, hubert, pretrained
from fedhubert_lib.evaluation import encoders
from fedhubert_lib.evaluation.encoders import Encoder

CHECKPOINTS = {
    "teacher": ("federated teacher", "03_pretrain/checkpoint"),
    "centralised": ("centralised teacher", "03_pretrain/centralised/checkpoint"),
    "student": ("federated student", "04_distill/checkpoint"),
    "centralised-student": ("centralised student", "04_distill/centralised/checkpoint"),
}
"""Systems that are checkpoints of the run, in the order of the table: title, and folder under the run."""


CHECKPOINT = "checkpoint"
"""A model folder that the parameters of 05_evaluate name."""
GIVEN = "given-teacher"
"""The system that taught the student, where 04_distill was given another teacher than that of 03_pretrain."""


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
    """False: a single frame stands for a clip, which nothing can be made of that needs frames."""


def of_run(run: Path, seed: int, device: torch.device, checkpoint: str = "") -> tuple[list[System], dict[str, str]]:
    """The systems of ``run`` and, for each that is absent, why; with the model folder ``checkpoint``, if one is named.

    The random weights are of the architecture of the first. Raises FileNotFoundError when there is neither a teacher
    nor a ``checkpoint``: the floors alone are no evaluation.
    """
    systems: list[System] = []
    absent: dict[str, str] = {}
    for name, (title, place) in CHECKPOINTS.items():
        folder, stage = run / place, run / place.split("/")[0]
        if not (folder / "config.json").is_file():
            absent[name] = f"no checkpoint in {place}"
        elif (stage / "begun.json").is_file() and not (stage / "done.json").is_file():
            absent[name] = f"{stage.name} is not done"
        else:
            systems.append(_of_folder(name, title, folder, device))
    if "teacher" in absent and not checkpoint:
        raise FileNotFoundError(
            f"{run / CHECKPOINTS['teacher'][1]}: {absent['teacher']}; run 03_pretrain first, or set evaluate.checkpoint"
        )
    if "student" not in absent and (given := _given_teacher(run)):
        systems.append(_of_folder(GIVEN, "the student's teacher", given, device))
    if checkpoint:
        systems.append(_of_folder(CHECKPOINT, f"checkpoint {Path(checkpoint).name}", Path(checkpoint), device))
    config = systems[0].model.config
    untrained = encoders.untrained(config, seed)
    digest = hashlib.blake2b(repr((config, seed)).encode(), digest_size=8).hexdigest()
    systems.append(System("random", "random weights", encoders.of_model(untrained, device), digest, untrained))
    systems.append(System("mfcc", "MFCC", encoders.mfcc, "mfcc-39"))
    systems.append(System("mfcc-moments", "MFCC, mean and deviation", encoders.mfcc_moments, "mfcc-78", frames=False))
    return systems, absent


def _of_folder(name: str, title: str, folder: Path, device: torch.device) -> System:
    model, _ = pretrained.load(folder)
    return System(name, title, encoders.of_model(model, device), _digest(folder), model, folder)


@dataclass(frozen=True)
class OnTheWay:
    """A model as it was after some rounds of 03_pretrain."""

    of: str
    """The system that it became: teacher or centralised."""
    round: int
    hours: float
    """Of speech heard until then, all clients together; a second heard twice counts twice."""
    system: System


def along(run: Path, device: torch.device) -> Iterator[OnTheWay]:
    """The models that 03_pretrain has kept on the way, and the last, in the order of rounds."""
    for name in ("teacher", "centralised"):
        title, place = CHECKPOINTS[name]
        folder = run / place
        rows = [row for row in files.read_rows(folder.parent / "metrics.jsonl") if row["kind"] == "round"]
        heard = np.cumsum([row["audio_seconds"] for row in rows]) / 3600
        hours = {row["round"]: float(sum_) for row, sum_ in zip(rows, heard, strict=True)}
        kept = checkpoints.on_the_way(folder.parent)
        if kept and (folder / "config.json").is_file():
            kept[max(hours)] = folder
        for number, place in sorted(kept.items()):
            yield OnTheWay(name, number, hours[number], _of_folder(name, title, place, device))


def compared(run: Path, device: torch.device) -> dict[tuple[str, str], list[System]]:
    """The students that 04_distill trained to compare objectives, one per training seed, in the order of the seeds.

    Keys are objective and training: federated, centralised, or none: the ``untrained`` students, as all began.
    """
    found: dict[tuple[str, str], list[System]] = {}
    folders = sorted((run / "04_distill" / "compared").glob("*/*"), key=lambda each: (each.parent.name, int(each.name)))
    for folder in folders:
        for training, place in (("federated", folder), ("centralised", folder / "centralised")):
            if not (place / "checkpoint" / "config.json").is_file():
                continue
            objective, checkpoint = folder.parent.name, place / "checkpoint"
            name = f"{objective}, {training}, seed {folder.name}"
            system = _of_folder(name, name, checkpoint, device)
            found.setdefault((objective, "none" if objective == "untrained" else training), []).append(system)
    return found


def teacher_of(systems: Collection[str]) -> str:
    """The name of the student's teacher among the names of ``systems``."""
    return GIVEN if GIVEN in systems else "teacher"


def _given_teacher(run: Path) -> Path | None:
    parameters = run / "04_distill" / "params.yaml"
    if not parameters.is_file():
        return None
    values = yaml.safe_load(parameters.read_text(encoding="utf-8"))
    return Path(values["teacher"]) if values.get("teacher") else None


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    documents = [folder / f"{name}config.json" for name in ("", "preprocessor_", "processor_")]
    for path in [*filter(Path.is_file, documents), *sorted(folder.glob("model*.safetensors"))]:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
