"""Federated against pooled pretraining on real speech, over training seeds; stopped and resumed at will.

    fedhubert run params/mini.yaml --run base --until kmeans       (its speech, clients and codebooks are shared by all)
    python benchmarks/study_federation.py rates  --base outputs/base --seeds 100
    python benchmarks/study_federation.py parity --base outputs/base --seeds 0 1 2
    python benchmarks/study_federation.py report --base outputs/base

``rates``: learning rates of every kind of training, pooled training's first, on a seed that no other figure uses.
``parity``: each at the best of its rates, beside pooled training with as many optimiser steps on as much audio;
clients' moments kept, reset and the cohort's; local steps per round (H) at equal updates. ``long``: 2.5 times as many
updates. ``cohorts``: a part of the clients in each round. ``heads``: kinds of codebook with shared and personal heads
(the base run needs kmeans.codebooks). ``bytes``: compressed updates. ``privacy``: clipped and noisy ones (the base run
needs 16 clients); ``many``: the same with 500 (docs/federation.md, *five hundred clients*, makes their base).
``distill``: students, with and without the teacher (that of the base run, which needs 03_pretrain).
A seed draws weights, cohorts and masks anew. Each arm writes a JSON file below --out when it is done, and is not run
again; ``report`` prints the tables and draws curves.png.
"""

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats

from fedhubert_lib import (
    batching,
    distillation,
    files,
    objectives,
    params,
    pretrained,
    pretraining,
    recipes,
    studies,
    training,
)
from fedhubert_lib import pooled as pooled_training
from fedhubert_lib.evaluation import intervals, measures, systems, tables
from fedhubert_lib.evaluation import report as evaluation
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.kmeans import client, reading
from fedhubert_lib.labels import Labels
from fedhubert_lib.plots import style

STUDY = params.ROOT / "params" / "mini.yaml"
SHORT: dict[str, Any] = {
    "rounds": 40,
    "local_steps": 10,
    "validate_every": 20,
    "local_state": "keep",
    "server_rate": 1.0,
}
"""25,600 s of audio are heard."""
COHORT = {"local_state": "cohort"}
NESTEROV = {"server": "nesterov"}
FEDADAM = {"server": "fedadam", "server_momentum": 0.9, "server_tau": 0.01, "server_schedule": "clients"}
BEST: dict[str, dict[str, Any]] = {
    "pooled": {"learning_rate": 0.004},
    "FedAvg": {"learning_rate": 0.004, "server_rate": 1.5},
    "Nesterov": NESTEROV | {"learning_rate": 0.004, "server_rate": 0.7, "server_momentum": 0.6},
    "FedAdam": COHORT
    | {
        "server": "fedadam",
        "learning_rate": 0.004,
        "server_rate": 0.033,
        "server_momentum": 0.2,
        "server_tau": 0.03,
    },
    "FedAvg, cohort's moments": COHORT | {"learning_rate": 0.004},
}
"""Each at the best of the rates that were tried, FedAdam at H 5."""
KINDS = ("federated", "one-shot", "client", "aligned", "random-projection")


def _steps(arm: dict[str, Any], steps: int, factor: float = 1.0) -> dict[str, Any]:
    """``arm`` with ``steps`` local steps a round and ``factor`` times the updates of SHORT in all."""
    return arm | {"local_steps": steps, "rounds": round(factor * SHORT["rounds"] * 10 / steps)}


def _tried(name: str, arm: dict[str, Any], *rates: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """``arm`` at each of ``rates``: the clients', the server's, the server's momentum."""
    parameters = "learning_rate", "server_rate", "server_momentum"
    return {
        f"{name}, {' / '.join(f'{rate:g}' for rate in tried)}": arm | dict(zip(parameters, tried, strict=False))
        for tried in rates
    }


def _sized(clients: int, pooled: tuple[float, ...], server_rates: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """Rates tried with ``clients`` in each round, in as many rounds as make the audio that of SHORT."""
    size, name = {"cohort": clients, "rounds": SHORT["rounds"] * 8 // clients}, f"{clients} clients"
    return {
        **_tried(f"pooled, {name}", size, *((rate,) for rate in pooled)),
        **_tried(f"FedAvg, {name}", size, *((0.004, rate) for rate in server_rates)),
        **_tried(
            f"FedAvg, cohort's moments, {name}", size | COHORT, (0.003, 1.0), (0.004, 1.0), (0.004, 1.5), (0.006, 1.0)
        ),
    }


FEDADAM_COHORT = _steps({"server": "fedadam", "server_tau": 0.003} | COHORT, 5)
YOGI = FEDADAM_COHORT | {"server_tau": 0.03}
FEDERATED = {name: arm for name, arm in BEST.items() if name != "pooled"}
FEDADAM_KEEP = BEST["FedAdam"] | {"server_rate": 0.05, "local_state": "keep"}
KEEP = {name: BEST[name] for name in ("FedAvg", "Nesterov")} | {"FedAdam, tau .03": FEDADAM_KEEP}
HALF = BEST["FedAvg"] | {"cohort": 8, "weighting": "clients"}
CLIPPED = {"privacy": "server", "privacy_seeded": True, "privacy_clip": 6.0, "privacy_quantile": 0.5}
PRIVATE = HALF | CLIPPED
MANY = _steps(BEST["FedAvg"], 5) | {"cohort": 32, "weighting": "clients", "batch_seconds": 4.0}
"""Of 500 clients with 15 s of synthetic speech each, 11 s of it for training."""
LAYERS = ["soft-targets", "distilhubert"]
TAUGHT: dict[str, dict[str, Any]] = {
    "teacher and labels": {"soft_weight": 0.7, "label_weight": 0.3},
    "labels alone": {},
    "teacher alone": {"soft_weight": 1.0, "label_weight": 0.0},
    "teacher at temperature 1": {"soft_weight": 1.0, "label_weight": 0.0, "temperature": 1.0},
    "teacher's layers": {"objectives": ["distilhubert"]},
    "teacher's layers and labels": {"objectives": LAYERS},
    "teacher's layers, predictions and labels": {"objectives": LAYERS, "soft_weight": 0.5},
    "teacher's predictions and labels at 1": {"soft_weight": 0.5},
}
"""Beside labels alone."""
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "rates": {
        **_sized(4, (0.002, 0.003, 0.004, 0.006), (1.0, 1.5, 2.0)),
        **_sized(16, (0.003, 0.004, 0.006, 0.008), (1.5, 2.0, 3.0)),
        **_tried("pooled", {}, (0.003,), (0.004,), (0.006,), (0.008,)),
        **_tried("FedAvg", {}, (0.004, 1.5), (0.004, 2.0), (0.006, 1.5), (0.008, 1.0), (0.008, 1.5)),
        **_tried("Nesterov", NESTEROV, (0.004, 0.7, 0.6), (0.004, 0.5, 0.8), (0.003, 0.7, 0.7)),
        **_tried("FedAdam", FEDADAM, (0.004, 0.015), (0.004, 0.03), (0.004, 0.06)),
        **_tried(
            "FedAdam, constant rate, tau .001",
            {"server": "fedadam", "server_momentum": 0.9},
            (0.004, 0.006),
            (0.004, 0.012),
        ),
        **_tried("FedAdam, cohort's moments, H 5, tau .003", FEDADAM_COHORT, (0.004, 0.004, 0.5), (0.004, 0.006, 0.5)),
        **_tried("FedAdam, cohort's moments, H 5, tau .01", FEDADAM_COHORT | {"server_tau": 0.01}, (0.004, 0.012, 0.5)),
        **_tried("FedAdam, cohort's moments, H 5, tau .1", FEDADAM_COHORT | {"server_tau": 0.1}, (0.004, 0.103, 0.2)),
        **_tried("FedAdam, tau .03", {"server": "fedadam", "server_tau": 0.03}, (0.004, 0.05, 0.2)),
        **_tried(
            "FedYogi, cohort's moments, H 5, tau .03",
            YOGI | {"server": "fedyogi"},
            (0.004, 0.033, 0.2),
            (0.004, 0.066, 0.2),
        ),
        **_tried("FedAdagrad, cohort's moments, H 5, tau .03", YOGI | {"server": "fedadagrad"}, (0.004, 0.066, 0.2)),
        **{f"FedAdam, tau .03, H {n}": _steps(FEDADAM_KEEP, n) for n in (40, 100)},
        **_tried("FedAvg, cohort's moments", COHORT, (0.004, 1.0), (0.006, 1.0), (0.004, 1.25)),
        **{f"{name}, H {n}": _steps(arm, n) for name, arm in FEDERATED.items() for n in (2, 5, 40, 100)},
        **{f"{name}, reset": arm | {"local_state": "reset"} for name, arm in KEEP.items()},
        **{
            f"{name}, reset, H {n}": _steps(arm | {"local_state": "reset"}, n)
            for name, arm in KEEP.items()
            for n in (40, 100)
        },
    },
    "parity": {
        **BEST,
        **{f"{name}, H {n}": _steps(FEDERATED[name], n) for n in (5, 40, 100) for name in FEDERATED},
        **{
            f"{name}, reset": arm | {"local_state": "reset"}
            for name, arm in FEDERATED.items()
            if arm.get("local_state") is None
        },
    },
    "long": {
        **{name: _steps(BEST[name], 10, 2.5) for name in ("pooled", "FedAvg")},  # mini.yaml of 707a942
        **{f"FedAvg, cohort's moments, H {n}": _steps(BEST["FedAvg, cohort's moments"], n, 2.5) for n in (5, 10)},
        "pooled, 4 clients": _steps(BEST["pooled"] | {"cohort": 4}, 10, 5),
        **{
            f"FedAvg, cohort's moments, 4 clients, H {n}": _steps(
                BEST["FedAvg, cohort's moments"] | {"cohort": 4}, n, 5
            )
            for n in (10, 50)
        },
    },
    "cohorts": {
        f"{name}, {cohort} clients": arm | {"cohort": cohort, "rounds": 40 * 8 // cohort}
        for cohort in (16, 4, 2)
        for name, arm in BEST.items()
    }
    | {
        f"FedAvg, cohort's moments, {n} clients, H {steps}": _steps(
            BEST["FedAvg, cohort's moments"] | {"cohort": n}, steps, 8 / n
        )
        for n, steps in ((16, 2), (16, 5), (4, 40))
    },
    "heads": {
        f"{kind}, {head}": BEST["FedAvg"] | {"codebook": kind, "head": head}
        for kind in KINDS
        for head in ("shared", "personal")
    },
    "bytes": {kind: BEST["FedAvg"] | {"compression": kind} for kind in ("float16", "int8", "top-k")},
    "privacy": {
        "not private": HALF,
        **{f"noise {noise:g}": PRIVATE | {"privacy_noise": noise} for noise in (0.0, 0.001, 0.003, 0.01, 0.03)},
    },
    "many": {
        "not private": MANY,
        **{f"noise {noise:g}": MANY | CLIPPED | {"privacy_noise": noise} for noise in (0.0, 0.04, 0.12)},
    },
    "distill": {
        f"{name}, {taught}{size}": _steps(BEST[name], steps) | {"objectives": ["soft-targets"]} | TAUGHT[taught] | shape
        for size, shape, students in (
            ("", {}, TAUGHT),
            (", 2 layers", {"layers": 2}, ("labels alone", "teacher's layers and labels")),
        )
        for taught in students
        for name, steps in (("pooled", 10), ("FedAvg, cohort's moments", 5))
    },
}
"""Arms of each study, with their parameters of the stage beyond those of mini.yaml and SHORT."""
EVALUATED = ("parity", "cohorts", "heads", "bytes", "privacy", "many", "distill")
"""Studies whose arms are measured on words and phones, too: it takes half as long as a short training."""


def trained(base: Path, name: str, p: params.Pretrain | params.Distill, out: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Train one arm in a folder beside links to the stages of ``base``; the model folder and its ledger's rows."""
    out.mkdir(parents=True, exist_ok=True)
    stages = list(params.FOLDERS.values())
    module: Any = pretraining if isinstance(p, params.Pretrain) else distillation
    for stage in stages[: stages.index(module.STAGE)]:
        if not (out / stage).exists():
            (out / stage).symlink_to((base / stage).resolve())
    if name.startswith("pooled"):
        return pooled_training.train(out, p), files.read_rows(out / module.STAGE / "centralised/metrics.jsonl")
    return module.run(out, p), files.read_rows(out / module.STAGE / "metrics.jsonl")


def on_new_voices(base: Path, checkpoint: Path, p: params.Pretrain | params.Distill, out: Path) -> dict[str, float]:
    """Masked loss and accuracy on all speech of the held-out speakers, who are labelled by the shared codebook."""
    heldout = pd.read_parquet(base / "01_partition" / "heldout.parquet")
    home = ClientHome("heldout", out / "heldout", out / "heldout/labels", out / "heldout/state")
    book = base / "02_kmeans" / "codebooks" / p.codebook
    if not (home.data / "train.parquet").exists():
        home.data.mkdir(exist_ok=True, parents=True)
        heldout.iloc[:0].to_parquet(home.data / "validation.parquet")
        heldout.to_parquet(home.data / "train.parquet")
    settings = {**json.loads((book / "codebook.json").read_text(encoding="utf-8"))["settings"], "kind": p.codebook}
    reading.compute(home, {}, settings)
    kept = [book / f"{name}.npy" for name in ("centroids", "projection")]
    client.label(home, {path.stem: torch.from_numpy(np.load(path)) for path in kept if path.exists()}, settings)
    labels = Labels(home.labels / p.codebook)
    model, head = pretrained.load(checkpoint)
    module = torch.nn.ModuleList([model, head])
    steps = int(heldout.samples.sum() / 16_000 / p.batch_seconds)
    sums = training.evaluate(
        module,
        batching.batches(heldout, labels, p, (p.seed, 0, "heldout"), steps),
        lambda batch, _: objectives.masked_prediction(model, head, batch),
        p.precision,
    )
    counts = np.bincount(np.concatenate([labels[name] for name in heldout.utterance]))
    return {**objectives.averages(sums), "unigram_loss": float(stats.entropy(counts))}


def arm(study: str, name: str, seed: int, base: Path, out: Path) -> dict[str, Any]:
    """Everything that the report needs of one arm and seed."""
    settings = studies.load(STUDY)
    changes = SHORT | ARMS[study][name] | {"seed": seed}
    stage = "distill" if study == "distill" else "pretrain"
    p = params.SECTIONS[stage].model_validate(getattr(settings, stage).model_dump() | changes)
    assert isinstance(p, params.Pretrain | params.Distill)
    run = out / f"{study}-{name.replace(', ', '-').replace(' / ', '-').replace(' ', '-')}-{seed}"
    checkpoint, rows = trained(base, name, p, run)
    ledger = pd.DataFrame([row for row in rows if row["kind"] == "round"])
    result: dict[str, Any] = {"study": study, "arm": name, "seed": seed, "changes": changes}
    kept = ["round", "loss", "validation_loss", "accuracy_masked", "accuracy_unmasked", "audio_seconds"]
    kept = [name for name in [*kept, "bytes_up", "update_norm", "clip", "epsilon"] if name in ledger]
    result |= {"rounds": ledger[kept].astype(object).where(ledger[kept].notna(), None).to_dict("list")}
    result |= {"seconds": float(ledger.seconds.sum()), "failures": sum(row["kind"] == "failure" for row in rows)}
    labelled = p.head == "shared" if isinstance(p, params.Pretrain) else "soft-targets" in p.objectives
    if labelled and (base / "02_kmeans" / "codebooks" / p.codebook / "centroids.npy").exists():
        result["new_voices"] = on_new_voices(base, checkpoint, p, out)
    if study in EVALUATED:
        model, _ = pretrained.load(checkpoint)
        result["figures"] = figures(systems.of_model(model, torch.device("cpu")), base, run)
    return result


def figures(encoder: systems.Encoder, base: Path, out: Path) -> list[dict[str, Any]]:
    """Words, phones, PNMI and ABX of ``encoder``, as in report.json."""
    study, cache = studies.load(STUDY), out / "features"
    gathered, _, _ = evaluation.gather(base, study.evaluate)
    system, speech = systems.System("system", "system", encoder, "system"), replace(gathered, cache=cache)
    shutil.rmtree(cache, ignore_errors=True)  # of an arm that was interrupted
    measured = measures.of_system(system, speech, study.evaluate, essentials=True)
    shutil.rmtree(cache)
    return measured.figures


def baselines(base: Path, out: Path) -> None:
    """Figures of random weights and of MFCC, which no arm changes."""
    model = systems.untrained(recipes.model_config(studies.load(STUDY).pretrain), 0)
    encoders = {"random weights": systems.of_model(model, torch.device("cpu")), "MFCC": systems.mfcc}
    results = [{"arm": name, "seed": 0, "figures": figures(encoder, base, out)} for name, encoder in encoders.items()]
    files.write_json(out / "baselines.json", {"baselines": results})


def report(out: Path) -> None:
    """Print the tables of all results there are, as mean and 95 % interval over seeds, and draw the curves."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*-*.json"))]
    path = out / "baselines.json"
    floors = json.loads(path.read_text(encoding="utf-8"))["baselines"] if path.exists() else []
    of_parity = {_draw(r): r["new_voices"] for r in results if (r["study"], r["arm"]) == ("parity", "pooled")}
    for study, arms in ARMS.items():
        rows = {name: [r for r in results if (r["study"], r["arm"]) == (study, name)] for name in arms}
        rows = {name: of_arm for name, of_arm in rows.items() if of_arm}
        if not rows:
            continue
        print(f"\n{study}\n")
        pooled = dict(of_parity if study in ("rates", "bytes") else {})  # the best rate for a seed and cohort
        for result in (r for name, of_arm in rows.items() if name.startswith("pooled") for r in of_arm):
            if study == "distill":  # whose pooled arms learn different things
                continue
            best = pooled.setdefault(_draw(result), result["new_voices"])
            pooled[_draw(result)] = min(best, result["new_voices"], key=lambda voices: voices["loss"])
        if study in EVALUATED:
            rows |= {floor["arm"]: [floor] for floor in floors}
        table = pd.DataFrame.from_dict({name: _row(of_arm, pooled) for name, of_arm in rows.items()}, orient="index")
        print("| " + " | ".join(["", *table.columns]) + " |\n" + "|---" * (1 + table.shape[1]) + "|")
        for name, row in zip(table.index, table.fillna("").to_numpy(), strict=True):
            print("| " + " | ".join([name, *row]) + " |")
    drawn = ("pooled", "FedAvg", "Nesterov, H 5", "FedAvg, cohort's moments, H 5")
    of_arms = {name: [r["rounds"] for r in results if (r["study"], r["arm"]) == ("parity", name)] for name in drawn}
    if any(of_arms.values()):
        style.save(curves({name: rounds for name, rounds in of_arms.items() if rounds}), out, "curves")
    of_first = {(r["study"], r["arm"]): r for r in results if r["seed"] == 0}
    for study, plain, label, place in (  # eight clients a round in both
        ("bytes", ("parity", "FedAvg"), "megabytes of an update", lambda r: r["rounds"]["bytes_up"][0] / 8e6),
        (
            "privacy",
            ("privacy", "not private"),
            "noise on the mean (clipping norms)",
            lambda r: r["changes"]["privacy_noise"] / 8,
        ),
    ):
        points = {place(r): r for (kind, name), r in of_first.items() if kind == study and (kind, name) != plain}
        if points and plain in of_first and floors:
            points = {x: points[x] for x in sorted(points)}
            style.save(cost(points, of_first[plain], floors[0], label), out, study)


def _draw(result: dict[str, Any]) -> tuple[Any, ...]:
    """Seed and cohort, which an arm shares with the pooled training that it is compared with."""
    return result["seed"], result["changes"].get("cohort")


def _row(results: list[dict[str, Any]], pooled: dict[tuple[Any, ...], dict[str, float]]) -> dict[str, str]:
    """A line of the table: what ``results``, an arm's, have measured, and the fraction of what ``pooled`` gains."""
    values: dict[str, list[float]] = {"loss on new voices": [], "fraction of the pooled gain": []}
    for result in results:
        if (heard := result.get("new_voices")) is not None:
            values["loss on new voices"].append(heard["loss"])
            if (best := pooled.get(_draw(result))) is not None:
                gained, whole = heard["unigram_loss"] - heard["loss"], best["unigram_loss"] - best["loss"]
                values["fraction of the pooled gain"].append(gained / whole)
        for measure in tables.ESSENTIALS:
            if (figure := _best(result, measure)) is not None:
                values.setdefault(tables.MEASURES[measure][0], []).append(figure)
    row = {"seeds": str(len(results))}
    for name, of_seeds in values.items():  # a seed without pooled training of its own has no fraction
        fewer = f" ({len(of_seeds)} seeds)" if 0 < len(of_seeds) < len(results) else ""
        row[name] = f"{intervals.measure(of_seeds)}{fewer}" if of_seeds else ""
    return row


def _best(result: dict[str, Any], measure: str) -> float | None:
    """The figure of the best layer, None where it was not measured."""
    chosen = tables.best(result.get("figures", [])).get("system", {})
    return chosen[measure]["value"] if measure in chosen else None


@style.styled
def cost(points: dict[float, dict[str, Any]], plain: dict[str, Any], floor: dict[str, Any], label: str) -> Figure:
    """What results, by their place on the x axis, keep of the gain of ``plain``: over guessing in loss, and over random
    weights, ``floor``, in phones and words."""
    figure, (axes,) = style.panels(1, 1, width=6, height=3.6)
    guessing = plain["new_voices"]["unigram_loss"]
    kept = [(guessing - r["new_voices"]["loss"]) / (guessing - plain["new_voices"]["loss"]) for r in points.values()]
    lines = {"loss on new voices": kept}
    for measure in ("phone-accuracy", "keyword-accuracy"):
        low, high, *values = (_best(result, measure) for result in (floor, plain, *points.values()))
        if low is not None and high is not None:
            lines[tables.MEASURES[measure][0]] = [(v - low) / (high - low) for v in values if v is not None]
    for name, fractions in lines.items():
        axes.plot(list(points), fractions, marker="o", label=name)
    axes.set_xscale("symlog", linthresh=min((x for x in points if x > 0), default=1))
    axes.set_xticks(list(points), [f"{x:.2g}" for x in points])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=label, ylabel="fraction of the gain", ylim=(min(0, *map(min, lines.values())) - 0.05, None))
    axes.axhline(1, color=style.GREY, linestyle=":")
    axes.legend()
    return figure


@style.styled
def curves(arms: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss over hours heard, a line per arm: the mean of its seeds, which are the thin lines."""
    figure, (axes,) = style.panels(1, 1, width=7, height=4)
    for (name, seeds), colour in zip(arms.items(), style.PALETTE, strict=False):
        hours = np.cumsum([seed["audio_seconds"] for seed in seeds], axis=1).mean(0) / 3600
        losses = np.array([seed["loss"] for seed in seeds])
        axes.plot(hours, losses.T, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(hours, losses.mean(0), color=colour, linewidth=2, label=name)
    axes.set(xlabel="hours of speech heard", ylabel="loss in training (nats per masked frame)")
    axes.legend()
    return figure


def main() -> None:
    """Run what is asked for and not yet there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*ARMS, "report"])
    parser.add_argument("--base", type=Path, default=params.ROOT / "outputs" / "base", help="run of mini.yaml to 02")
    parser.add_argument("--out", type=Path, default=params.ROOT / "outputs" / "study-federation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[], help="of the study (default: all)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further arm after so long")
    options = parser.parse_args()
    if options.study == "report":
        report(options.out)
        return
    began = time.monotonic()
    if options.study in EVALUATED and not (options.out / "baselines.json").exists():
        baselines(options.base, options.out)
    for seed in options.seeds:
        for name in options.arms or ARMS[options.study]:
            path = options.out / f"{options.study}-{name.replace(' / ', '-')}-{seed}.json"
            if not path.exists() and time.monotonic() - began < 60 * options.minutes:
                done = arm(options.study, name, seed, options.base, options.out)
                files.write_json(path, done)
                print(f"{path}: done", flush=True)


if __name__ == "__main__":
    main()
