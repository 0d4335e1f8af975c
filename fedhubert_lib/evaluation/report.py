"""The evaluation of a run: every system on every measure, beside its baselines, as JSON and CSV.

docs/evaluation.md describes the fields of ``report.json``; ``report.csv`` holds its figures alone. Speed differs from
run to run and is in ``speed.json``: equal runs give equal reports. The results of ``fedhubert s3prl`` are added to the
report that is there, and an evaluation that is run again keeps them as long as the weights are the same.
"""

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix

from fedhubert_lib import audio, files, params, resources
from fedhubert_lib.evaluation import cost, keywords, layers, measures, systems, tables
from fedhubert_lib.evaluation.intervals import measure
from fedhubert_lib.evaluation.measures import MEASURES, Result, Speech
from fedhubert_lib.evaluation.systems import System

STAGE = "05_evaluate"

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and of how much."""
Essentials = Callable[[System, str], Result]
"""The essential measures of a system; its progress is shown under a title."""


def run(run: Path, p: params.Evaluate, on_progress: OnProgress = lambda *_: None) -> dict[str, Any]:
    """Evaluate ``run`` and write its report, which is returned.

    Features are extracted once per system and kept under ``05_evaluate/features``. Raises FileNotFoundError without a
    model, KeywordError where clips allow no fair figure, ValueError for more clusters than frames.
    """
    device = torch.device(resources.resolve(p.device))
    compared, absent = systems.of_run(run, p.seed, device, p.checkpoint)
    speech, data, notes = gather(run, p)
    report: dict[str, Any] = {
        "format": "fedhubert-report",
        "version": 1,
        "run": run.name,
        "seed": p.seed,
        "parameters": p.model_dump(mode="json", exclude={"run", "device"}),
        "data": data,
        "systems": [{"system": each.name, "title": each.title, "digest": each.digest} for each in compared],
        "absent": absent,
        "measures": [
            {"measure": name, "title": title, "better": better, "what": what, "headline": name in tables.HEADLINE}
            for name, (title, better, what) in MEASURES.items()
        ],
        "figures": [],
        "along": [],
        "compared": [],
        "confusion": {},
        "missed": {},
        "notes": notes,
    }
    for system in compared:
        result = measures.of_system(system, speech, p, functools.partial(on_progress, system.title))
        report["figures"] += result.figures
        report["notes"] += [note for note in result.notes if note not in report["notes"]]
        report["confusion"][system.name], report["missed"][system.name] = _mistakes(result, speech)

    def essentials(system: System, title: str) -> Result:
        return measures.of_system(system, speech, p, functools.partial(on_progress, title), essentials=True)

    if p.along:
        _along(report, systems.along(run, device), essentials)
    _compared(report, systems.compared(run, device), essentials)
    _add_s3prl(report, run)
    files.write_json(run / STAGE / "speed.json", {system.name: cost.speed(system.encoder) for system in compared})
    _write(run, report)
    return report


def gather(run: Path, p: params.Evaluate) -> tuple[Speech, dict[str, Any], list[str]]:
    """The speech of ``run`` to measure on, its description in the report, and notes of what it does not allow."""
    clips = keywords.read_clips(run / "00_corpus" / "keywords.parquet")
    if p.task == "superb":
        clips = keywords.superb(clips, p.seed)
    task, splits = keywords.task(clips), clips.groupby("split")
    data = {
        "words": task.words,
        "clips": {split: int(count) for split, count in splits.size().items()},
        "speakers": {split: int(count) for split, count in splits.speaker.nunique().items()},
    }
    cache = run / STAGE / "features"
    try:
        utterances, phones = layers.held_out(run, p.unit_minutes, p.seed, p.clusters)
    except layers.NoPhonesError as error:
        return Speech(clips, task, cache), data, [f"units: {error}"]
    labels, speakers = layers.phone_labels(utterances, phones)
    data["units"] = {
        "utterances": len(utterances),
        "minutes": int(utterances.samples.clip(upper=layers.LONGEST).sum()) / audio.SAMPLE_RATE / 60,
        "frames": len(labels),
        "speakers": int(utterances.speaker.nunique()),
    }
    return Speech(clips, task, cache, utterances, labels, speakers), data, []


def read(run: Path) -> dict[str, Any]:
    """The report.json of ``run``. Raises FileNotFoundError where it has not been evaluated."""
    path = run / STAGE / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; run 05_evaluate first")
    return json.loads(path.read_text(encoding="utf-8"))


def add_s3prl(run: Path) -> None:
    """Put what s3prl has measured since into the report of ``run`` and write it anew."""
    report = read(run)
    report["figures"] = [each for each in report["figures"] if not each["measure"].startswith("s3prl-")]
    report["notes"] = [note for note in report["notes"] if not note.startswith("s3prl")]
    _add_s3prl(report, run)
    _write(run, report)


def _write(run: Path, report: dict[str, Any]) -> None:
    files.write_json(run / STAGE / "report.json", report)
    with files.atomic(run / STAGE / "report.csv") as temporary:
        tables.figures(report).to_csv(temporary, index=False)


def _mistakes(result: Result, speech: Speech, most: int = 12) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Test clips of word i recognised as word j, summed over seeds; and the ``most`` that most seeds got wrong."""
    words, test = speech.task.words, speech.task.test
    truth, predicted = speech.task.labels[test], np.stack([outcome.predicted for outcome in result.outcomes])
    counts = sum(confusion_matrix(truth, of_seed, labels=range(len(words))) for of_seed in predicted)
    wrong, missed = predicted != truth, []  # [seeds, clips]
    for index in np.argsort(-wrong.sum(0), kind="stable")[:most]:
        clip, seeds = speech.clips.iloc[test[index]], int(wrong[:, index].sum())
        if seeds and clip.word != "_silence_":  # in which there is nothing to listen to
            taken = words[np.bincount(predicted[wrong[:, index], index]).argmax()]
            missed.append({"clip": clip["clip"], "word": clip.word, "taken_for": taken, "seeds": seeds})
    return counts.tolist(), missed


def _along(report: dict[str, Any], checkpoints: Iterable[tuple[int, float, System]], essentials: Essentials) -> None:
    """The essentials of the checkpoints on the way; those of the end are among the figures already."""
    done = {each["digest"]: each["system"] for each in report["systems"]}
    chosen = tables.best(report["figures"])
    for number, hours, system in checkpoints:
        figures = chosen.get(done.get(system.digest, ""))
        if figures is None:
            result = essentials(system, f"{system.title}, {hours:.2f} h")
            figures = tables.best(result.figures)[system.name]
        for name in measures.ESSENTIALS:
            if name in figures:
                kept = {key: figures[name][key] for key in ("measure", "layer", "value", "low", "high", "values")}
                report["along"].append({"system": system.name, "round": number, "hours": hours} | kept)
    if not report["along"]:
        report["notes"].append("along: 03_pretrain has kept no checkpoint on the way")


def _compared(report: dict[str, Any], students: dict[tuple[str, str], list[System]], essentials: Essentials) -> None:
    """Each measure's value (mean over evaluation seeds) of each student that was compared, over training seeds."""
    for (objective, training), of_seeds in students.items():
        results = [tables.best(essentials(student, student.title).figures)[student.name] for student in of_seeds]
        for name in tables.COMPARED:
            if values := [figures[name]["value"] for figures in results if name in figures]:
                row = {"objective": objective, "training": training, "measure": name}
                report["compared"].append(row | measure(values)._asdict())


def _add_s3prl(report: dict[str, Any], run: Path) -> None:
    """Figures from the results that ``fedhubert s3prl`` left, of weights that are still the same."""
    by_figure: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((run / "s3prl").glob("*/seed-*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        name = "s3prl-fine-tuned-accuracy" if result["fine_tuned"] else "s3prl-accuracy"
        by_figure.setdefault((result["system"], name), []).append(result)
    digests = {each["system"]: each["digest"] for each in report["systems"]}
    for (system, name), results in by_figure.items():
        if any(result["digest"] != digests.get(system) for result in results):
            report["notes"].append(f"s3prl: {system} has changed since; run fedhubert s3prl again")
            continue
        added = Result(system)
        added.add(name, [result["test"] for result in results], baseline=1 / results[0]["classes"])
        report["figures"] += added.figures
