"""What is compared: teacher and student, the centralised yardsticks, and the floors: random weights and MFCC."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from fedhubert_lib import hubert, yaml12
from fedhubert_lib.evaluation import encoders
from fedhubert_lib.evaluation.encoders import Encoder

CHECKPOINTS = {
    "teacher": ("federated teacher", "03_pretrain/checkpoint"),
    "centralised": ("centralised teacher", "03_pretrain/centralised/checkpoint"),
    "student": ("federated student", "04_distill/checkpoint"),
    "centralised-student": ("centralised student", "04_distill/centralised/checkpoint"),
}
"""Systems that are checkpoints of the run, in the order of the table: title, and folder under the run."""


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


def of_run(run: Path, seed: int, device: torch.device) -> tuple[list[System], dict[str, str]]:
    """The systems of ``run`` and, for each that is absent, where it was looked for.

    Raises FileNotFoundError when there is no teacher: the floors alone are no evaluation.
    """
    systems: list[System] = []
    absent: dict[str, str] = {}
    for name, (title, place) in CHECKPOINTS.items():
        folder = run / place
        if not (folder / "config.json").is_file():
            absent[name] = f"no checkpoint in {place}"
            continue
        model, _ = hubert.load(folder)
        systems.append(System(name, title, encoders.of_model(model, device), _digest(folder), model, folder))
    if "teacher" in absent:
        raise FileNotFoundError(f"{run / CHECKPOINTS['teacher'][1]}: no checkpoint; run 03_pretrain first")
    if given := _given_teacher(run):
        model, _ = hubert.load(given)
        title = "the student's teacher"
        systems.append(System(GIVEN, title, encoders.of_model(model, device), _digest(given), model, given))
    config = systems[0].model.config
    untrained = encoders.untrained(config, seed)
    digest = hashlib.blake2b(repr((config, seed)).encode(), digest_size=8).hexdigest()
    systems.append(System("random", "random weights", encoders.of_model(untrained, device), digest, untrained))
    systems.append(System("mfcc", "MFCC", encoders.mfcc, "mfcc-39"))
    systems.append(System("mfcc-moments", "MFCC, mean and deviation", encoders.mfcc_moments, "mfcc-78"))
    return systems, absent


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
            model, _ = hubert.load(checkpoint)
            name = f"{objective}, {training}, seed {folder.name}"
            system = System(name, name, encoders.of_model(model, device), _digest(checkpoint), model, checkpoint)
            found.setdefault((objective, "none" if objective == "untrained" else training), []).append(system)
    return found


def teacher_of(systems: Collection[str]) -> str:
    """The name of the student's teacher among the names of ``systems``."""
    return GIVEN if GIVEN in systems else "teacher"


def _given_teacher(run: Path) -> Path | None:
    parameters = run / "04_distill" / "params.yaml"
    if not parameters.is_file():
        return None
    values, _, wrong = yaml12.read(parameters)
    if wrong:
        raise ValueError("\n".join(wrong))
    return Path(values["teacher"]) if values.get("teacher") else None


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    documents = [folder / f"{name}config.json" for name in ("", "preprocessor_", "processor_")]
    for path in [*filter(Path.is_file, documents), *sorted(folder.glob("model*.safetensors"))]:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
