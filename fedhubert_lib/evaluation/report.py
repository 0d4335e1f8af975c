"""The evaluation of a run: every system on every measure, beside its baselines, as JSON and CSV.

``report.json`` (format ``fedhubert-report``, version 1) holds

* ``run``, ``seed``, ``parameters``: what was evaluated and how;
* ``data``: clips and speakers per split, words, utterances, minutes and frames of unit quality;
* ``systems``: ``system`` (stable name), ``title``, ``digest`` (of weights and architecture), and ``absent``: system to
  the reason it is not there;
* ``measures``: ``measure`` (stable name), ``title``, ``better`` (higher, lower, or neither), ``what`` it is, and
  whether it is in the ``headline``;
* ``figures``: one per system, measure and layer (null where the system is measured as a whole): ``value``, ``low`` and
  ``high`` (95 % interval over evaluation seeds, null for a single value), ``baseline`` (chance, or shuffled labels;
  null where there is none), ``seeds`` and their ``values``;
* ``along``: the same of checkpoints on the way, if they were evaluated: ``system``, ``round``, ``hours`` of speech
  heard, ``measure``, the best ``layer``, ``value``, ``low`` and ``high`` over evaluation seeds, and their ``values``;
* ``compared``: the students of 04_distill's comparison, if there was one: ``objective``, ``training`` (federated,
  centralised, none), ``measure``, ``value``, ``low`` and ``high`` over training seeds, and their ``values``;
* ``confusion``: for each system, test clips of word i (row) recognised as word j, summed over seeds;
* ``missed``: for each system, the clips most often mistaken: clip, word, the word it was taken for, how many seeds;
* ``notes``: what could not be measured, and why.

The version rises when a field goes or changes its meaning, not when one comes. ``report.csv`` holds ``figures`` alone.
Speed and energy differ from run to run: they are in ``speed.json``, not in these. Equal runs thus give equal reports.
What ``fedhubert s3prl`` measured is added to the report that is there, and an evaluation that is run again keeps it
as long as the weights are the same.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fedhubert_lib import audio, files, params
from fedhubert_lib.evaluation import keywords, layers, systems, tables
from fedhubert_lib.evaluation.intervals import measure
from fedhubert_lib.evaluation.measures import ESSENTIALS, MEASURES, Result, Speech, essentials, everything, interval

STAGE = "05_evaluate"

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and of how much."""


def run(run: Path, p: params.Evaluate, on_progress: OnProgress | None = None) -> pd.DataFrame:
    """Evaluate ``run`` and write its report; returns the figures: the table that report.csv holds, with titles.

    Columns: system, measure (titles), layer, value, low, high, baseline, seeds, and system_name, measure_name (stable).
    Features are extracted once per system and kept under ``05_evaluate/features``. Raises FileNotFoundError without a
    model, KeywordError where clips allow no fair figure.
    """
    folder = run / STAGE
    device = torch.device(
        "cuda" if p.device == "auto" and torch.cuda.is_available() else p.device.replace("auto", "cpu")
    )
    compared, absent = systems.of_run(run, p.seed, device, p.checkpoint)
    report: dict[str, Any] = {
        "format": "fedhubert-report",
        "version": 1,
        "run": run.name,
        "seed": p.seed,
        "parameters": p.model_dump(mode="json", exclude={"run", "device"}),
        "data": {},
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
        "notes": [],
    }
    speech, speed = _speech(run, p, report), {}
    for system in compared:
        result, speed[system.name] = everything(system, speech, p, _progress(on_progress, system.title))
        report["figures"] += result.figures
        report["notes"] += [note for note in result.notes if note not in report["notes"]]
        report["confusion"][system.name] = keywords.confusion(result.outcomes, result.task).tolist()
        report["missed"][system.name] = _missed(result, speech)
    if p.along:
        _along(report, run, speech, device, p, on_progress)
    _compared(report, run, speech, device, p, on_progress)
    _s3prl(report, run)
    files.write_json(folder / "speed.json", speed)
    return _write(folder, report)


def read(run: Path) -> dict[str, Any]:
    """The report.json of ``run``. Raises FileNotFoundError where it has not been evaluated."""
    path = run / STAGE / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; run 05_evaluate first")
    return json.loads(path.read_text(encoding="utf-8"))


def add_s3prl(run: Path) -> pd.DataFrame:
    """Put what s3prl has measured since into the report of ``run`` and write it anew; returns the table."""
    report = read(run)
    report["figures"] = [each for each in report["figures"] if not each["measure"].startswith("s3prl-")]
    report["notes"] = [note for note in report["notes"] if not note.startswith("s3prl")]
    _s3prl(report, run)
    return _write(run / STAGE, report)


def _write(folder: Path, report: dict[str, Any]) -> pd.DataFrame:
    files.write_json(folder / "report.json", report)
    table = tables.figures(report)
    with files.atomic(folder / "report.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def _speech(run: Path, p: params.Evaluate, report: dict[str, Any]) -> Speech:
    """What to measure on, and its description in the report."""
    clips = keywords.read_clips(run / "00_corpus" / "keywords.parquet")
    if p.task == "superb":
        clips = keywords.superb(clips, p.seed)
    splits = clips.groupby("split")
    report["data"] = {
        "words": sorted(clips.word.unique()),
        "clips": {split: int(count) for split, count in splits.size().items()},
        "speakers": {split: int(count) for split, count in splits.speaker.nunique().items()},
    }
    try:
        utterances, phones = layers.held_out(run, p.unit_minutes, p.seed)
    except layers.NoPhonesError as error:
        utterances = phones = None
        report["notes"].append(f"units: {error}")
    else:
        samples = int(utterances.samples.clip(upper=layers.LONGEST).sum())
        report["data"]["units"] = {
            "utterances": len(utterances),
            "minutes": samples / audio.SAMPLE_RATE / 60,
            "frames": int(layers.frame_counts(utterances).sum()),
            "speakers": int(utterances.speaker.nunique()),
        }
    return Speech(clips, report["data"]["words"], utterances, phones, run / STAGE / "features")


def _missed(result: Result, speech: Speech, most: int = 12) -> list[dict[str, Any]]:
    predicted = np.stack([each.predicted for each in result.outcomes])
    test, truth = result.task.test, result.task.labels[result.task.test]
    wrong = (predicted != truth).sum(0)
    missed = []
    for index in np.argsort(-wrong, kind="stable")[:most]:
        clip = speech.clips.iloc[test[index]]
        if not wrong[index] or clip.word == "_silence_":  # nothing to listen to
            continue
        taken = speech.words[np.bincount(predicted[predicted[:, index] != truth[index], index]).argmax()]
        missed.append({"clip": clip["clip"], "word": clip.word, "taken_for": taken, "seeds": int(wrong[index])})
    return missed


def _along(
    report: dict[str, Any],
    run: Path,
    speech: Speech,
    device: torch.device,
    p: params.Evaluate,
    on_progress: OnProgress | None,
) -> None:
    """The essentials of the checkpoints on the way; those of the end are among the figures already."""
    done = {each["digest"]: each["system"] for each in report["systems"]}
    for checkpoint in systems.along(run, device):
        system = checkpoint.system
        result = Result(done.get(system.digest, ""), [f for f in report["figures"] if f["system"] == checkpoint.of])
        if not result.system:
            result = essentials(system, speech, p, _progress(on_progress, f"{system.title}, {checkpoint.hours:.2f} h"))
        where = {"system": checkpoint.of, "round": checkpoint.round, "hours": checkpoint.hours}
        for name in ESSENTIALS:
            if figure := result.best(name):
                kept = ("measure", "layer", "value", "low", "high", "values")
                report["along"].append(where | {key: figure[key] for key in kept})
    if not report["along"]:
        report["notes"].append("along: 03_pretrain has kept no checkpoint on the way")


def _compared(
    report: dict[str, Any],
    run: Path,
    speech: Speech,
    device: torch.device,
    p: params.Evaluate,
    on_progress: OnProgress | None,
) -> None:
    """Each measure's value (mean over evaluation seeds) of each student that was compared, over training seeds."""
    for (objective, training), students in systems.compared(run, device).items():
        results = [essentials(each, speech, p, _progress(on_progress, each.title)) for each in students]
        for name in tables.COMPARED:
            values = [each.best(name)["value"] for each in results if each.best(name)]
            if values:
                row = {"objective": objective, "training": training, "measure": name}
                report["compared"].append(row | interval(measure(values, "training seeds")))


def _s3prl(report: dict[str, Any], run: Path) -> None:
    """Figures from the results that ``fedhubert s3prl`` left, of weights that are still the same."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((run / "s3prl").glob("*/seed-*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        name = "s3prl-fine-tuned-accuracy" if result["fine_tuned"] else "s3prl-accuracy"
        found.setdefault((result["system"], name), []).append(result)
    digests = {each["system"]: each["digest"] for each in report["systems"]}
    for (system, name), results in found.items():
        if any(each["digest"] != digests.get(system) for each in results):
            report["notes"].append(f"s3prl: {system} has changed since; run fedhubert s3prl again")
            continue
        accuracy = measure([each["test"] for each in results])
        added = Result(system)
        added.add(name, accuracy, baseline=1 / results[0]["classes"])
        report["figures"] += added.figures


def _progress(on_progress: OnProgress | None, title: str) -> Callable[[int, int], None] | None:
    return None if on_progress is None else lambda done, total: on_progress(title, done, total)
