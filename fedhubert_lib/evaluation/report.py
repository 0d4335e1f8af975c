"""The evaluation of a run: every system on every measure, beside its baselines, as JSON and CSV.

docs/evaluation.md describes the fields of ``report.json``; ``report.csv`` holds its figures alone. Speed differs from
run to run and is in ``speed.json``: equal runs give equal reports.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix

from fedhubert_lib import audio, files, records, resources
from fedhubert_lib.evaluation import cost, keywords, layers, measures, systems, tables
from fedhubert_lib.evaluation.measures import Result, Speech

if TYPE_CHECKING:
    from fedhubert_lib.params import Evaluate

ON_THE_WAY = ("measure", "layer", "value", "low", "high", "values")
"""What ``along`` has of a figure, beside system, round and hours."""

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and of how much."""


def run(run: Path, p: "Evaluate", on_progress: OnProgress = lambda *_: None) -> dict[str, Any]:
    """Evaluate ``run`` and write its report, which is returned.

    Features are extracted once per system and kept under ``05_evaluate/features``. Raises FileNotFoundError without a
    model, KeywordError where clips allow no fair figure, ValueError for more clusters than frames.
    """
    device = torch.device(resources.resolve(p.device))
    compared, absent = systems.of_run(run, p.seed, device, p.checkpoint)
    speech, data, notes = gather(run, p)
    report: dict[str, Any] = {
        "format": "fedhubert-report",
        "version": 2,
        "run": run.name,
        "seed": p.seed,
        "parameters": p.model_dump(mode="json", exclude={"run", "device"}),
        "data": data,
        "systems": [{"system": system.name, "title": system.title, "digest": system.digest} for system in compared],
        "absent": absent,
        "measures": [
            {"measure": name, "title": title, "better": better, "what": what, "headline": name in tables.HEADLINE}
            for name, (title, better, what) in tables.MEASURES.items()
        ],
        "figures": [],
        "along": [],
        "confusion": {},
        "missed": {},
        "notes": notes,
    }
    for system in compared:
        result = measures.of_system(system, speech, p, functools.partial(on_progress, system.title))
        report["figures"] += result.figures
        report["notes"] += [note for note in result.notes if note not in report["notes"]]
        report["confusion"][system.name], report["missed"][system.name] = _mistakes(result, speech)
    if p.along:
        ends = {system.digest: system.name for system in compared}
        for number, hours, system in systems.along(run, device):
            figures = tables.best(report["figures"]).get(ends.get(system.digest, ""))  # the end is measured already
            if figures is None:
                progress = functools.partial(on_progress, f"{system.title}, {hours:.2f} h")
                result = measures.of_system(system, speech, p, progress, essentials=True)
                figures = tables.best(result.figures)[system.name]
            place = {"system": system.name, "round": number, "hours": hours}
            best = [figures[name] for name in tables.ESSENTIALS if name in figures]
            report["along"] += [place | {key: figure[key] for key in ON_THE_WAY} for figure in best]
        if not report["along"]:
            report["notes"].append("along: 03_pretrain has kept no checkpoint on the way whose hours are known")
    files.write_json(run / tables.STAGE / "speed.json", {one.name: cost.speed(one.encoder) for one in compared})
    write(run, report)
    if (events := files.events()) is not None:
        events.figures(run / tables.STAGE, tables.best(report["figures"]), report["along"])
    return report


def gather(run: Path, p: "Evaluate") -> tuple[Speech, dict[str, Any], list[str]]:
    """The speech of ``run`` to measure on, its description in the report, and notes of what it does not allow."""
    clips = keywords.read_clips(run / "00_corpus" / "keywords.parquet")
    if p.task == "superb":
        clips = keywords.superb(clips, p.seed)
    task, voices = keywords.task(clips), clips[clips.word != keywords.SILENCE].groupby("split").speaker.nunique()
    data = {"words": task.words, "clips": clips.groupby("split").size().to_dict(), "speakers": voices.to_dict()}
    cache = run / tables.STAGE / "features"
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


def words(run: Path, seed: int) -> str:
    """What an accuracy of s3prl holds for beside the weights: the corpus of ``run``, and the draw of unknown words."""
    return f"{(records.read_json(run / '00_corpus' / 'done.json') or {}).get('speech')}-{seed}"


def write(run: Path, report: dict[str, Any]) -> None:
    """Write the report of ``run``, as JSON and CSV, with what s3prl has measured until now."""
    _add_s3prl(report, run)
    files.write_json(run / tables.STAGE / "report.json", report)
    with files.atomic(run / tables.STAGE / "report.csv") as temporary:
        tables.figures(report).to_csv(temporary, index=False)


def _mistakes(result: Result, speech: Speech) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Test clips of word i recognised as word j, summed over seeds; and the twelve that most seeds got wrong."""
    words, test = speech.task.words, speech.task.test
    truth, predicted = speech.task.labels[test], np.stack([outcome.predicted for outcome in result.outcomes])
    counts = sum(confusion_matrix(truth, of_seed, labels=range(len(words))) for of_seed in predicted)
    wrong, missed = predicted != truth, []  # [seeds, clips]
    for index in np.argsort(-wrong.sum(0), kind="stable")[:12]:
        clip, seeds = speech.clips.iloc[test[index]], int(wrong[:, index].sum())
        if seeds and clip.word != keywords.SILENCE:  # in which there is nothing to listen to
            taken = words[np.bincount(predicted[wrong[:, index], index]).argmax()]
            missed.append({"clip": clip["clip"], "word": clip.word, "taken_for": taken, "seeds": seeds})
    return counts.tolist(), missed


def _add_s3prl(report: dict[str, Any], run: Path) -> None:
    """Figures from the results that ``fedhubert s3prl`` left, of weights and words that are still the same."""
    report["figures"] = [figure for figure in report["figures"] if not figure["measure"].startswith("s3prl-")]
    report["notes"] = [note for note in report["notes"] if not note.startswith("s3prl")]
    digests = {system["system"]: system["digest"] for system in report["systems"]}
    for folder in sorted((run / "s3prl").glob("*-*")):  # SYSTEM-frozen, SYSTEM-fine-tuned
        results = [records.read_json(path) or {} for path in sorted(folder.glob("seed-*/result.json"))]
        measured = Result(results[0]["system"] if results else "", report["figures"])
        now = digests.get(measured.system), words(run, report["seed"])
        if {(result["digest"], result.get("words")) for result in results} - {now}:
            report["notes"].append(f"s3prl: {measured.system} or its words have changed; run fedhubert s3prl again")
        elif results:
            name = "s3prl-fine-tuned-accuracy" if results[0]["fine_tuned"] else "s3prl-accuracy"
            measured.add(name, [result["test"] for result in results], baseline=1 / results[0]["classes"])
            report["notes"].append(f"{name}: {folder.name}, {results[0]['steps']:,} steps at {results[0]['rate']:g}")
