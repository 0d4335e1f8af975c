"""Is my curve normal? Reference curves of studies over hours of speech heard, and a run's verdict against them.

A reference is a JSON file of ``params/reference/``, made by ``fedhubert reference`` from runs that differ in their
training seeds: the commit, the seeds, the parameters, and per measure the mean over seeds with a band around it. It
belongs to every run that learns the same, whatever its study is called.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy

from fedhubert_lib import files, params, records
from fedhubert_lib.evaluation import tables, training_seeds

FOLDER = params.ROOT / "params" / "reference"
MEASURES = {
    "loss": "loss",
    "validation_loss": "validation loss",
    "accuracy_masked": "masked accuracy",
    "accuracy_unmasked": "unmasked accuracy",
    "validation_accuracy_masked": "validation masked accuracy",
    "phone-accuracy": "phone probe",
    "pnmi": "PNMI",
}
"""The measures that are compared, with their names in words: columns of metrics.jsonl, measures of report.json."""

_SHAPE = params.Model.model_fields.keys() - params.Section.model_fields.keys()
_LEARNED = {f"corpus.{name}" for name in ("kind", "train_subsets", "speakers", "minutes", "speech")}
_LEARNED |= {f"kmeans.{name}" for name in ("features", "layer", "clusters", "normalisation")}
_LEARNED |= {f"pretrain.{name}" for name in _SHAPE}
_IMITATED = {"teacher", "objectives", "temperature", "teacher_layer", "teacher_clusters"}
_IMITATED |= {f"{name}_weight" for name in ("soft", "label", "regression", "hubert")}
_HEARD = {f"corpus.{name}" for name in ("phones", "test_subsets", "test_speakers", "test_minutes")}
TASK = {
    "pretrain": _LEARNED,
    "distill": _LEARNED | {f"distill.{name}" for name in _SHAPE | _IMITATED},
    "evaluate": _LEARNED | _HEARD | {"evaluate.clusters", "evaluate.unit_minutes", "partition.heldout_speakers"},
}
"""By stage, the parameters in which a run must equal its reference: speech, targets, the model's shape; a student's
objectives, an evaluation's clusters and speech. All others are what studies change; the verdict names them."""
_ASIDE = training_seeds.IRRELEVANT - {"seed"} | {"validate_every", "decode_check"}
"""Parameters that move no curve."""

Curves = dict[str, pd.DataFrame]
"""By measure a table: hours, value; of a reference: hours, mean, band (half its width)."""


@dataclass(frozen=True)
class Reference:
    """Curves of a study, by stage, and what they were made from."""

    study: str
    commit: str
    seeds: list[int]
    parameters: dict[str, Any]
    """As ``stage.name``."""
    curves: dict[str, Curves]


def curves(run: Path, stage: str) -> Curves:
    """The curves of a run over hours of speech heard, as far as they were measured; empty where clients do not say how
    much they heard.

    Of ``evaluate`` they are those of the federated teacher: on the way with ``along``, else at the end.
    """
    if stage == "evaluate":
        return _quality(run)
    rows = files.rounds(run / params.FOLDERS[stage] / "metrics.jsonl")
    table = pd.DataFrame(rows).reindex(columns=["audio_seconds", *MEASURES]).astype(float)
    hours = table.audio_seconds.cumsum() / 3600
    # The loss that a student minimises holds unmasked frames at a weight that falls, whatever it learns.
    names = [name for name in MEASURES if (stage, name) != ("distill", "loss")]
    whole = {name: pd.DataFrame({"hours": hours, "value": table[name]}).dropna() for name in names}
    return {name: curve for name, curve in whole.items() if len(curve) and hours.notna().all()}


def _quality(run: Path) -> Curves:
    evaluated, heard = tables.read(run), curves(run, "pretrain").get("loss")
    chosen = tables.best(evaluated["figures"]).get("teacher", {})
    result = {}
    for name in MEASURES.keys() & chosen.keys():
        if on_the_way := [row for row in evaluated["along"] if (row["system"], row["measure"]) == ("teacher", name)]:
            result[name] = pd.DataFrame(on_the_way)[["hours", "value"]]
        elif heard is not None:
            result[name] = pd.DataFrame({"hours": [heard.hours.iloc[-1]], "value": [chosen[name]["value"]]})
    return result


def make(runs: Sequence[Path]) -> Reference:
    """The reference of runs of one study with different training seeds. Raises RunError where they are something else.

    The band is where the running median of another seed lies 19 times in 20: mean ± t(n-1) s sqrt(1 + 1/n) by Student's
    t, with s² averaged over a tenth of the points, three at least, since of few seeds at one point it is hardly known.
    """
    for run in runs:
        if not (run / "03_pretrain" / "done.json").exists():
            raise records.RunError(f"{run}: 03_pretrain is not done; a reference is made from runs that have trained")
        for stage in sorted(records.stale(run).keys() & {"pretrain", "distill"}, reverse=True):
            raise records.RunError(f"{run}: {stage} is {records.stale(run)[stage]}; run it again")
    training_seeds.check_one_study(runs)
    recorded = [_parameters(run) for run in runs]
    trained = [values["pretrain.seed"] for values in recorded]
    if len(set(trained)) < max(2, len(runs)):
        raise records.RunError(f"training seeds {trained}: a band needs two runs or more, all of another pretrain.seed")
    study = (records.read_json(runs[0] / "run.json") or {}).get("study", runs[0].name)
    git = (records.read_json(runs[0] / "03_pretrain" / "done.json") or {}).get("git") or {}
    chosen = {}
    for stage in TASK:
        if all((run / params.FOLDERS[stage] / "done.json").exists() for run in runs):
            measured = [curves(run, stage) for run in runs]
            shared = [name for name in MEASURES if all(name in of_run for of_run in measured)]
            chosen[stage] = {name: _band([of_run[name] for of_run in measured]) for name in shared}
    kept = {name: value for name, value in recorded[0].items() if name.split(".")[1] not in _ASIDE}
    return Reference(study, (git.get("commit") or "unknown")[:7], trained, kept, chosen)


def _band(of_seeds: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Hours, mean and band of curves of seeds as far as the shortest goes; the ends, where one was not ``along``."""
    count, points = len(of_seeds), min(map(len, of_seeds))
    of_seeds = [curve[-1:] if points == 1 else curve[:points] for curve in of_seeds]
    hours = np.array([curve.hours for curve in of_seeds])
    values = np.array([_median(curve, hours.max()) for curve in of_seeds])
    variance = pd.Series(values.var(0, ddof=1)).rolling(max(3, points // 10), center=True, min_periods=1).mean()
    factor = scipy.stats.t.ppf(0.975, count - 1) * np.sqrt(1 + 1 / count)
    return pd.DataFrame({"hours": hours.mean(0), "mean": values.mean(0), "band": factor * np.sqrt(variance)})


def _median(curve: pd.DataFrame, hours: float) -> np.ndarray:
    """The running median of a curve, over a tenth of ``hours``: rounds scatter more than seeds do."""
    over_time = curve.value.set_axis(pd.to_timedelta(curve.hours, unit="h"))
    return over_time.rolling(pd.Timedelta(hours=hours / 10), center=True, closed="both").median().to_numpy()


def _parameters(run: Path) -> dict[str, Any]:
    """The parameters of a run; in place of a path a name for what lay there."""
    values = records.all_parameters(run)
    for key in [key for key, value in values.items() if str(value).startswith("/")]:
        stage, _, name = key.partition(".")
        begun = records.read_json(run / params.FOLDERS[stage] / "begun.json") or {"identity": {"inputs": {}}}
        values[key] = begun["identity"]["inputs"].get(name, "a folder")[:16]
    return values


def write(reference: Reference, path: Path) -> None:
    """Write a reference as JSON, a column of numbers on a line."""
    curves = {
        stage: {name: table.map(lambda x: float(f"{x:.4g}")).to_dict("list") for name, table in of_stage.items()}
        for stage, of_stage in reference.curves.items()
    }
    values = vars(reference) | {"curves": curves}
    text = re.sub(r",\n +(?=[-\d])", ", ", json.dumps(values, indent=1))  # the numbers of a column on a line
    files.write_text(path, text + "\n")


def read(path: Path) -> Reference:
    """A reference that ``write`` wrote. Raises RunError where it cannot be read."""
    values = records.read_json(path) or {}
    try:
        columns = ["hours", "mean", "band"]
        curves = {
            stage: {name: pd.DataFrame(table)[columns].astype(float) for name, table in of_stage.items()}
            for stage, of_stage in values.pop("curves").items()
        }
        return Reference(**values, curves=curves)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise records.RunError(f"{path}: no reference ({error!r}); make it again with fedhubert reference") from error


def of(run: Path, stage: str, folder: Path = FOLDER) -> tuple[Reference | None, str]:
    """The reference that belongs to ``stage`` of a run, and in words which it is, or why there is none."""
    values = _parameters(run)
    references = [reference for path in sorted(folder.glob("*.json")) if stage in (reference := read(path)).curves]
    if not references:
        return None, "no reference curves: none was made of this stage yet (fedhubert reference)"
    differing = [(_differing(values, reference.parameters), reference) for reference in references]
    differs, nearest = min(differing, key=lambda pair: (len(pair[0].keys() & TASK[stage]), len(pair[0])))
    if forbidding := [key for key in differs if key in TASK[stage]]:
        words = ", ".join(differs[key] for key in forbidding[:4])
        return None, f"no reference curves: the nearest, of {nearest.study}, has learned something else: {words}"
    begun = ("corpus", "partition", "kmeans", "pretrain", stage)
    others = [text for key, text in differs.items() if key.split(".")[0] in begun and not _irrelevant(key)]
    rest = f" and {len(others) - 6} more" if len(others) > 6 else ""
    words = f"reference: {nearest.study}, {len(nearest.seeds)} training seeds at {nearest.commit}"
    return nearest, words + (f"; this run differs in {', '.join(others[:6])}{rest}" if others else "")


def _irrelevant(key: str) -> bool:
    name = key.split(".")[1]
    seed = key in ("pretrain.seed", "distill.seed")  # what the band is over
    return seed or name in _ASIDE or name == "codebooks" or name.startswith(("keyword", "test_", "phones"))


def _differing(run: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, str]:
    """Parameters that both have, with another value, and in words with which."""
    differing = {name: (v, reference[name]) for name, v in run.items() if v != reference.get(name, v)}
    shown = {name: ["nothing" if v == "" else v for v in values] for name, values in differing.items()}
    return {name: f"{name} ({here}, there {there})" for name, (here, there) in shown.items()}


@dataclass(frozen=True)
class Position:
    """A measure of a run against the band of its reference."""

    measure: str
    place: str
    """inside, above or below."""
    since: float
    """Hours heard from which on it was there until the end."""
    value: float
    """At the last hour that both have heard, as are ``mean`` and ``band``."""
    mean: float
    band: float

    def __str__(self) -> str:
        words = f"{MEASURES[self.measure]}: {self.place} the band"
        words += f" from {self.since:.2g} h on" if self.place != "inside" else ""
        return f"{words} ({self.value:.3f}; reference {self.mean:.3f} ± {self.band:.3f})"

    @property
    def worse(self) -> bool:
        return self.place == ("above" if "loss" in self.measure else "below")


def positions(run: Curves, reference: Curves) -> Iterator[Position]:
    """Where the running median of each measure of a run ends, and since when. Hours that one of both has not heard are
    left out."""
    for name, band in reference.items():
        if name not in run:
            continue
        curve = run[name]
        curve = curve[curve.hours.between(band.hours.iloc[0] * 0.95, band.hours.iloc[-1] * 1.05)]
        if curve.empty:
            continue
        curve = curve.assign(value=_median(curve, band.hours.iloc[-1]))
        mean, half = (np.interp(curve.hours, band.hours, band[column]) for column in ("mean", "band"))
        side = np.sign(curve.value - mean) * (abs(curve.value - mean) > half)
        before = np.flatnonzero(side != side.iloc[-1])
        since = curve.hours.iloc[before[-1] + 1 if len(before) else 0]
        place = {0: "inside", 1: "above", -1: "below"}[int(side.iloc[-1])]
        yield Position(name, place, float(since), float(curve.value.iloc[-1]), float(mean[-1]), float(half[-1]))


def verdict(run: Path, stage: str, folder: Path = FOLDER) -> str:
    """Whether the curves of ``stage`` are normal, in words: where each measure is, and, where one is worse than the
    band or there is none, which of the usual causes the run's records show."""
    reference, words = of(run, stage, folder)
    places = [] if reference is None else list(positions(curves(run, stage), reference.curves[stage]))
    worse = [MEASURES[place.measure] for place in places if place.worse]
    better = [MEASURES[place.measure] for place in places if place.place != "inside" and not place.worse]
    lines = [words]
    if places:
        outside = f"worse than normal: {', '.join(worse)}" if worse else f"better than normal: {', '.join(better)}"
        lines += [outside if worse or better else "the curves are normal", *map(str, places)]
    elif reference is not None:
        lines.append("nothing was measured in both: no verdict")
    if worse or reference is None:
        from fedhubert_lib import diagnosis  # here: it needs k-means, and every notebook imports this module

        causes = diagnosis.causes(run)
        lines += [f"{number}. {cause}" for number, cause in enumerate(causes, 1)]
        if worse and not causes:
            lines.append("none of the usual causes shows in the records of 02_kmeans and 03_pretrain")
        lines.append("docs/curves.md shows the usual causes, each with its curve")
    return "\n".join(lines)
