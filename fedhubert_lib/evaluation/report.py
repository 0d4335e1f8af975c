"""The evaluation of a run: every system on every measure, beside its baselines, as JSON, CSV and a page.

``report.json`` (format ``fedhubert-report``, version 1) holds

* ``run``, ``seed``, ``parameters``: what was evaluated and how;
* ``data``: clips and speakers per split, words, utterances, minutes and frames of unit quality;
* ``systems``: ``system`` (stable name), ``title``, ``digest`` (of weights and architecture), and ``absent``: system to
  the reason it is not there;
* ``measures``: ``measure`` (stable name), ``title``, ``better`` (higher, lower, or neither) and ``what`` it is;
* ``figures``: one per system, measure and layer (null where the system is measured as a whole): ``value``, ``low`` and
  ``high`` (95 % interval over seeds, null for a single value), ``baseline`` (chance, or shuffled labels; null where
  there is none), ``seeds`` and their ``values``;
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

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fedhubert_lib import audio, files, hubert, params
from fedhubert_lib.evaluation import cost, keywords, layers, page, probes, systems
from fedhubert_lib.evaluation.intervals import Measure, measure
from fedhubert_lib.evaluation.systems import System, teacher_of

STAGE = "05_evaluate"
ABX_CLIPS = 400
ABX_TRIPLETS = 1000

MEASURES = {
    "keyword-accuracy": ("keyword accuracy", "higher", "s3prl's probe on all layers, test speakers unseen; chance"),
    "fine-tuned-accuracy": ("keyword accuracy, fine-tuned", "higher", "the whole model trained on the words; chance"),
    "moments-accuracy": (
        "keyword accuracy, mean and deviation",
        "higher",
        "linear least squares on mean and deviation over time of the best layer; chance",
    ),
    "s3prl-accuracy": ("keyword accuracy, s3prl", "higher", "s3prl's speech_commands on frozen layers; chance"),
    "s3prl-fine-tuned-accuracy": (
        "keyword accuracy, s3prl fine-tuned",
        "higher",
        "s3prl's speech_commands, the whole model trained; chance",
    ),
    "layer-accuracy": ("keyword accuracy, one layer", "higher", "linear least squares on one layer; chance"),
    "layer-weight": ("share of the layer", "neither", "in the keyword probe's weighted sum"),
    "nearest-accuracy": ("10 nearest neighbours", "higher", "keywords by cosine on the best layer; chance"),
    "unseen-speaker-accuracy": (
        "speakers left out",
        "higher",
        "linear probe over folds of speakers, best layer; chance",
    ),
    "abx-error": ("ABX error across speakers", "lower", "words by dynamic time warping on the best layer; chance"),
    "speaker-accuracy": ("speaker identified", "lower", "what a linear probe hears of the voice, best layer; chance"),
    "pnmi": ("PNMI of units", "higher", "phones known from the layer's clusters; shuffled labels"),
    "phone-accuracy": (
        "phone probe",
        "higher",
        "phones named from single frames by linear least squares, speakers left out in 3 folds; the commonest phone",
    ),
    "phone-purity": ("phone purity of units", "higher", "share of frames whose cluster's main phone is theirs"),
    "cluster-purity": ("cluster purity of units", "higher", "share of frames whose phone's main cluster is theirs"),
    "parameters": ("parameters", "lower", "of the encoder"),
    "macs": ("MACs per second of audio", "lower", "multiply-accumulates for one second"),
    "bytes": ("bytes on disk", "lower", "of the encoder's weights"),
}
"""Stable name to title, which way is better, and what it is with its baseline."""

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and of how much."""


def run(run: Path, p: params.Evaluate, on_progress: OnProgress | None = None) -> pd.DataFrame:
    """Evaluate ``run`` and write its report; returns the figures: the table that report.csv holds, with titles.

    Columns: system, measure (titles), layer, value, low, high, baseline, seeds, and system_name, measure_name (stable).
    Features are extracted once per system and kept under ``05_evaluate/features``. Raises FileNotFoundError without a
    teacher, KeywordError where clips allow no fair figure.
    """
    folder = run / STAGE
    device = torch.device(
        "cuda" if p.device == "auto" and torch.cuda.is_available() else p.device.replace("auto", "cpu")
    )
    clips = keywords.read_clips(run / "00_corpus" / "keywords.parquet")
    if p.task == "superb":
        clips = keywords.superb(clips, p.seed)
    words = sorted(clips.word.unique())
    compared, absent = systems.of_run(run, p.seed, device)
    report: dict[str, Any] = {
        "format": "fedhubert-report",
        "version": 1,
        "run": run.name,
        "seed": p.seed,
        "parameters": p.model_dump(mode="json", exclude={"run", "device"}),
        "data": _describe(clips, words),
        "systems": [{"system": each.name, "title": each.title, "digest": each.digest} for each in compared],
        "absent": absent,
        "measures": [{"measure": name, "title": t, "better": b, "what": w} for name, (t, b, w) in MEASURES.items()],
        "figures": [],
        "compared": [],
        "confusion": {},
        "missed": {},
        "notes": [],
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
    speed = {}
    for system in compared:
        figures = _Figures(system.name, report["figures"])
        progress = _progress(on_progress, system.title)
        cache = _cache(folder, system, clips, "moments")
        means, deviations = keywords.pooled(system.encoder, clips, cache, on_progress=progress)
        if p.fine_tune_steps and system.model is not None:
            _fine_tuned(figures, system.model, clips, words, p)
        task = keywords.task(means, clips, words)
        best = _keywords(figures, report, task, clips, words, p)
        if system.name != "mfcc-moments":  # whose mean holds both
            _moments(figures, task, np.concatenate([means[:, best], deviations[:, best]], axis=1), best, p)
        _cheap(figures, report, system, means[:, best], best, clips, p)
        if utterances is not None and system.name != "mfcc-moments":  # which has no frames to cluster
            frames = layers.frames(system.encoder, utterances, _cache(folder, system, utterances, "frames"), progress)
            _units(figures, frames, utterances, phones, p)
            _phones(figures, report, frames, utterances, phones, p)
        speed[system.name] = _cost(figures, system)
    _compared(report, run, clips, utterances, phones, device, p, on_progress)
    _s3prl(report, run)
    return _write(folder, report, speed, clips)


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
    speed = json.loads((run / STAGE / "speed.json").read_text(encoding="utf-8"))
    return _write(run / STAGE, report, speed, pd.read_parquet(run / "00_corpus" / "keywords.parquet"))


def _write(
    folder: Path, report: dict[str, Any], speed: dict[str, dict[str, float | None]], clips: pd.DataFrame
) -> pd.DataFrame:
    files.write_json(folder / "report.json", report)
    table = _table(report)
    with files.atomic(folder / "report.csv") as temporary:
        table.to_csv(temporary, index=False)
    files.write_json(folder / "speed.json", speed)
    with files.atomic(folder / "report.html") as temporary:
        temporary.write_text(page.render(report, table, headline(table), speed, clips), encoding="utf-8")
    return table


class _Figures:
    """Appends figures of one system."""

    def __init__(self, system: str, figures: list[dict[str, Any]]) -> None:
        self.system, self.figures = system, figures

    def add(self, name: str, values: Measure, *, layer: int | None = None, baseline: float | None = None) -> None:
        interval = _interval(values)
        self.figures.append(
            {
                "system": self.system,
                "measure": name,
                "layer": layer,
                **{key: interval[key] for key in ("value", "low", "high")},
                "baseline": baseline,
                "seeds": len(values.values),
                "values": interval["values"],
            }
        )


def _interval(values: Measure) -> dict[str, Any]:
    half = values.interval
    low, high = (None, None) if half is None else (values.mean - half, values.mean + half)
    return {"value": values.mean, "low": low, "high": high, "values": list(values.values)}


def _probes(task: keywords.Task, p: params.Evaluate) -> list[keywords.Outcome]:
    options = {"steps": p.probe_steps, "rate": p.probe_rate, "share": p.train_share, "standardise": p.standardise}
    return [keywords.probe(task, p.seed + seed, **options) for seed in range(p.seeds)]


def _keywords(
    figures: _Figures,
    report: dict[str, Any],
    task: keywords.Task,
    clips: pd.DataFrame,
    words: list[str],
    p: params.Evaluate,
) -> int:
    """The keyword probes of one system; returns the layer that is best on the validation clips."""
    chance = 1 / task.classes
    outcomes = _probes(task, p)
    figures.add("keyword-accuracy", measure([each.accuracy for each in outcomes]), baseline=chance)
    validation = []
    for layer in range(task.rows.shape[1]):
        figures.add("layer-weight", measure([float(each.layer_weights[layer]) for each in outcomes]), layer=layer)
        rows = task.rows[:, layer]
        validation.append(probes.ridge(rows, task.labels, task.train, task.validation))
        accuracy = probes.ridge(rows, task.labels, task.train, task.test)
        figures.add("layer-accuracy", measure([accuracy]), layer=layer, baseline=chance)
    report["confusion"][figures.system] = keywords.confusion(outcomes, task).tolist()
    report["missed"][figures.system] = _missed(outcomes, task, clips, words)
    return int(np.argmax(validation))


def _moments(figures: _Figures, task: keywords.Task, rows: np.ndarray, layer: int, p: params.Evaluate) -> None:
    """What the probe's mean over time leaves out, on the training clips that each seed draws."""
    drawn = [keywords.draws(task, p.seed + seed, p.train_share, 1)[1] for seed in range(p.seeds)]
    found = [probes.ridge(rows, task.labels, train, task.test) for train in drawn]
    figures.add("moments-accuracy", measure(found), layer=layer, baseline=1 / task.classes)


def _fine_tuned(
    figures: _Figures, model: hubert.Hubert, clips: pd.DataFrame, words: list[str], p: params.Evaluate
) -> None:
    found = [
        keywords.fine_tune(model, clips, words, p.seed + seed, steps=p.fine_tune_steps, rate=p.fine_tune_rate)
        for seed in range(p.seeds)
    ]
    figures.add("fine-tuned-accuracy", measure([each.accuracy for each in found]), baseline=1 / len(words))


def _missed(
    outcomes: list[keywords.Outcome], task: keywords.Task, clips: pd.DataFrame, words: list[str], most: int = 12
) -> list[dict[str, Any]]:
    predicted = np.stack([each.predicted for each in outcomes])
    wrong = (predicted != task.labels[task.test]).sum(0)
    missed = []
    for index in np.argsort(-wrong, kind="stable")[:most]:
        clip = clips.iloc[task.test[index]]
        if not wrong[index] or clip.word == "_silence_":  # nothing to listen to
            continue
        taken = np.bincount(predicted[predicted[:, index] != task.labels[task.test[index]], index]).argmax()
        missed.append({"clip": clip["clip"], "word": clip.word, "taken_for": words[taken], "seeds": int(wrong[index])})
    return missed


def _cheap(
    figures: _Figures,
    report: dict[str, Any],
    system: System,
    rows: np.ndarray,
    layer: int,
    clips: pd.DataFrame,
    p: params.Evaluate,
) -> None:
    """Measures without training, on the layer that the validation clips chose; what the clips do not allow is noted."""
    rows = np.ascontiguousarray(rows)
    labels, words = pd.factorize(clips.word, sort=True)
    speakers = clips.speaker.to_numpy(dtype=str)
    train, test = (np.flatnonzero(clips.split == split) for split in ("train", "test"))
    chance = 1 / len(words)
    seeds = _seeds(p)
    nearest = probes.nearest(rows, labels, train, test, neighbours=min(10, len(train)))
    figures.add("nearest-accuracy", measure([nearest]), layer=layer, baseline=chance)

    def unseen() -> None:
        found = [probes.leave_speakers_out(rows, labels, speakers, seed=seed) for seed in seeds]
        figures.add("unseen-speaker-accuracy", measure(found), layer=layer, baseline=chance)

    def voice() -> None:
        found = [probes.speaker_accuracy(rows, speakers, seed=seed) for seed in seeds]
        figures.add("speaker-accuracy", measure([share for share, _ in found]), layer=layer, baseline=found[0][1])

    def abx() -> None:
        # Whole speakers, since a triplet needs two words of one of them.
        order = clips.iloc[test].sort_values(["speaker", "clip"]).iloc[:ABX_CLIPS]
        own_labels, own_speakers = labels[order.index], speakers[order.index]
        drawn = [probes.triplets(own_labels, own_speakers, seed=seed, count=ABX_TRIPLETS) for seed in seeds]
        frames = []
        for start in range(0, len(order), 32):
            frames += list(system.encoder(keywords.waveforms(order.iloc[start : start + 32]))[layer].cpu())
        figures.add("abx-error", measure([probes.abx_error(frames, each) for each in drawn]), layer=layer, baseline=0.5)

    for each in (
        (unseen, voice) if system.name == "mfcc-moments" else (unseen, voice, abx)
    ):  # a single frame: no warping
        try:
            each()
        except probes.TooFewClipsError as error:
            _note(report, f"{each.__name__}: {error}")


def _units(
    figures: _Figures, frames: np.ndarray, utterances: pd.DataFrame, phones: pd.DataFrame, p: params.Evaluate
) -> None:
    for layer in range(frames.shape[1]):
        rows = np.ascontiguousarray(frames[:, layer])
        found = [
            layers.unit_quality(rows, utterances, phones, clusters=p.clusters, seed=p.seed + seed)
            for seed in range(p.seeds)
        ]
        for name in ("pnmi", "phone_purity", "cluster_purity"):
            shuffled = float(np.mean([each["shuffled_pnmi"] for each in found])) if name == "pnmi" else None
            values = measure([each[name] for each in found])
            figures.add(name.replace("_", "-"), values, layer=layer, baseline=shuffled)


def _phones(
    figures: _Figures,
    report: dict[str, Any],
    frames: np.ndarray,
    utterances: pd.DataFrame,
    phones: pd.DataFrame,
    p: params.Evaluate,
) -> None:
    """The phone probe of every layer; noted where there are too few speakers."""
    labels, speakers = layers.phone_labels(utterances, phones)
    try:
        for layer in range(frames.shape[1]):
            rows = np.ascontiguousarray(frames[:, layer])
            accuracies, chances = probes.frame_accuracy(rows, labels, speakers, draws=_seeds(p))
            figures.add("phone-accuracy", measure(accuracies), layer=layer, baseline=float(np.mean(chances)))
    except probes.TooFewClipsError as error:
        _note(report, f"phones: {error}")


def _seeds(p: params.Evaluate) -> range:
    return range(p.seed, p.seed + p.seeds)


def _note(report: dict[str, Any], note: str) -> None:
    if note not in report["notes"]:
        report["notes"].append(note)


def _cost(figures: _Figures, system: System) -> dict[str, float | None]:
    if system.model is not None:
        figures.add("parameters", measure([cost.parameters(system.model)]))
        figures.add("macs", measure([cost.macs(system.model.config)]))
    if system.folder is not None:
        figures.add("bytes", measure([cost.size(system.folder)]))
    return cost.speed(system.encoder)


def _compared(
    report: dict[str, Any],
    run: Path,
    clips: pd.DataFrame,
    utterances: pd.DataFrame | None,
    phones: pd.DataFrame | None,
    device: torch.device,
    p: params.Evaluate,
    on_progress: OnProgress | None,
) -> None:
    """Keyword accuracy (mean over evaluation seeds), PNMI and phone probe (best layer) of each compared student."""
    folder, words = run / STAGE, report["data"]["words"]
    for (objective, training), students in systems.compared(run, device).items():
        accuracies, pnmi, probed = [], [], []
        for system in students:
            progress = _progress(on_progress, system.title)
            cache = _cache(folder, system, clips, "moments")
            means, _ = keywords.pooled(system.encoder, clips, cache, on_progress=progress)
            outcomes = _probes(keywords.task(means, clips, words), p)
            accuracies.append(float(np.mean([each.accuracy for each in outcomes])))
            if utterances is None:
                continue
            frames = layers.frames(system.encoder, utterances, _cache(folder, system, utterances, "frames"), progress)
            blocks = [np.ascontiguousarray(frames[:, layer]) for layer in range(frames.shape[1])]
            found = [layers.unit_quality(each, utterances, phones, clusters=p.clusters, seed=p.seed) for each in blocks]
            pnmi.append(max(each["pnmi"] for each in found))
            if "phone-accuracy" in {each["measure"] for each in report["figures"]}:
                labels = layers.phone_labels(utterances, phones)
                probed.append(max(np.mean(probes.frame_accuracy(each, *labels, draws=_seeds(p))[0]) for each in blocks))
        for name, values in (("keyword-accuracy", accuracies), ("pnmi", pnmi), ("phone-accuracy", probed)):
            if values:
                report["compared"].append(
                    {"objective": objective, "training": training, "measure": name} | _interval(measure(values))
                )


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
        _Figures(system, report["figures"]).add(name, accuracy, baseline=1 / results[0]["classes"])


def _describe(clips: pd.DataFrame, words: list[str]) -> dict[str, Any]:
    splits = clips.groupby("split")
    return {
        "words": words,
        "clips": {split: int(count) for split, count in splits.size().items()},
        "speakers": {split: int(count) for split, count in splits.speaker.nunique().items()},
    }


def _table(report: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(report["figures"]).drop(columns="values")
    table["layer"] = table.layer.astype("Int64")
    titles = {each["system"]: each["title"] for each in report["systems"]}
    table = table.rename(columns={"system": "system_name", "measure": "measure_name"})
    table.insert(0, "system", table.system_name.map(titles))
    table.insert(1, "measure", table.measure_name.map({name: title for name, (title, _, _) in MEASURES.items()}))
    return table


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """One row per system, one column per measure, as text ``mean ± interval``.

    Unit quality is that of each system's best layer by PNMI, the phone probe that of its best; both are named.
    """
    of_best_layer = ("moments-accuracy", "abx-error", "nearest-accuracy", "speaker-accuracy", "unseen-speaker-accuracy")
    chosen = table[table.layer.isna() | table.measure_name.isin(of_best_layer)]
    for by, names in (("pnmi", ("pnmi", "phone-purity", "cluster-purity")), ("phone-accuracy", ("phone-accuracy",))):
        own = table[table.measure_name == by]
        best = own.loc[own.groupby("system_name").value.idxmax(), ["system_name", "layer"]]
        chosen = pd.concat([chosen, table[table.measure_name.isin(names)].merge(best, on=["system_name", "layer"])])
    text = chosen.assign(text=[_text(row) for row in chosen.itertuples()])
    wide = text.pivot(index="system", columns="measure", values="text")
    order = [title for title, _, _ in MEASURES.values() if title in wide.columns]
    return wide.loc[list(dict.fromkeys(table.system)), order].fillna("")


def comparison(report: dict[str, Any]) -> pd.DataFrame:
    """The compared students beside the teacher and the floors, as ``plots.bars`` draws them; empty without any.

    Columns: system and measure (titles), value, low, high, baseline (shuffled labels or chance), seeds.
    """
    rows = []
    teacher = teacher_of({each["system"] for each in report["figures"]})
    for name in ("keyword-accuracy", "pnmi", "phone-accuracy") if report["compared"] else ():
        own = [each for each in report["figures"] if each["measure"] == name and each["system"] in (teacher, "mfcc")]
        best = {each["system"]: each for each in sorted(own, key=lambda each: each["value"])}
        named = [
            (f"{each['objective']}, {each['training']}", each) for each in report["compared"] if each["measure"] == name
        ]
        named = [(title.removesuffix(", none"), each) for title, each in named]
        for system, each in [("teacher", best[teacher]), *named, ("MFCC", best["mfcc"])] if best else ():
            row = {"system": system, "measure": MEASURES[name][0], "baseline": best[teacher]["baseline"]}
            rows.append(row | {key: each[key] for key in ("value", "low", "high")} | {"seeds": len(each["values"])})
    return pd.DataFrame(rows).astype({"low": float, "high": float} if rows else {})


def kept(report: dict[str, Any]) -> pd.DataFrame:
    """For each compared objective: federated student against its teacher, and against the centralised student.

    A row per objective and measure, index (objective, measure); each column a mean over training seeds with its 95 %
    interval, as text.
    """
    rows = {}
    teacher = teacher_of({each["system"] for each in report["figures"]})
    students = {(each["objective"], each["training"], each["measure"]): each["values"] for each in report["compared"]}
    for (objective, training, name), values in students.items():
        if training != "federated":
            continue
        own = [each["value"] for each in report["figures"] if (each["system"], each["measure"]) == (teacher, name)]
        row = {"of the teacher's": str(measure(np.array(values) / max(own)))}
        if pooled := students.get((objective, "centralised", name)):
            row["of the centralised student's"] = str(measure(np.array(values) / np.array(pooled)))
        rows[objective, MEASURES[name][0]] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def _text(row: Any) -> str:
    if row.measure_name in ("parameters", "macs", "bytes"):
        return f"{row.value / 1e6:.2f} M"
    text = f"{row.value:.3f}" if pd.isna(row.high) else f"{row.value:.3f} ± {row.high - row.value:.3f}"
    return f"{text} (layer {row.layer})" if row.measure_name in ("pnmi", "phone-accuracy") else text


def _cache(folder: Path, system: System, table: pd.DataFrame, what: str) -> Path:
    key = hashlib.blake2b(table.drop(columns="word", errors="ignore").to_csv().encode(), digest_size=8).hexdigest()
    return folder / "features" / f"{what}-{system.digest}-{key}.npy"


def _progress(on_progress: OnProgress | None, title: str) -> Callable[[int, int], None] | None:
    return None if on_progress is None else lambda done, total: on_progress(title, done, total)
