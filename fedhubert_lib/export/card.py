"""A model card: the model, on whose speech it was trained and how, its results, and its limits.

All of it is read from the run's own files; a setting that they do not hold is called unknown.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fedhubert_lib import files, pretrained
from fedhubert_lib.evaluation import cost
from fedhubert_lib.evaluation.systems import parameters
from fedhubert_lib.export.formats import ExportError

STAGES = {"03_pretrain": "teacher", "04_distill": "student"}
"""Stages whose ``checkpoint`` can have a card, and its system's name in report.json."""
TRAINING = ("objectives", "codebook", "head", "rounds", "cohort", "local_steps", "batch_seconds", "crop_seconds")
TRAINING += ("learning_rate", "server", "server_rate", "compression", "seed")
"""Parameters of the training that the card shows."""
MEASURES = ("keyword-accuracy", "moments-accuracy", "s3prl-accuracy", "s3prl-fine-tuned-accuracy")
MEASURES += ("unseen-speaker-accuracy", "nearest-accuracy", "abx-error", "speaker-accuracy")
"""Measures of the report that the card shows."""
LIMITS = """\
Trained on the speech named above alone; other languages, accents, channels and noise are untested. Features of speech
also identify the speaker: see the speaker probe among the results.
"""


def export(checkpoint: Path, path: Path) -> dict[str, float]:
    """Write the card of ``checkpoint``, which lies in a run, to ``path``; returns how many results it has.

    Raises ExportError when ``checkpoint`` is not RUN/03_pretrain/checkpoint or RUN/04_distill/checkpoint.
    """
    stage = checkpoint.resolve().parent
    run = stage.parent
    if stage.name not in STAGES or not (run / "00_corpus" / "manifest.parquet").is_file():
        raise ExportError(
            f"{checkpoint}: not the checkpoint of a run's 03_pretrain or 04_distill; a card needs the run"
        )
    corpus, results = parameters(run / "00_corpus"), _results(run, STAGES[stage.name])
    header = {"license": "cc-by-4.0" if corpus.get("kind") == "librispeech" else "apache-2.0", "language": "en"}
    header["tags"] = ["speech", "hubert", "federated-learning", "self-supervised-learning"]
    table = f"{_markdown(results)}\n\nMean and 95 % interval, beside the baselines of the same run."
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {run.name}: {STAGES[stage.name]}\n",
        "HuBERT, trained by federated learning: clients trained on their own speech and shared model updates only.\n",
        _section("Model", _model(checkpoint)),
        _section("Data", _data(run, corpus)),
        _section("Training", _training(stage)),
        _section("Privacy", _privacy(stage) | _kmeans_privacy(run, parameters(stage).get("codebook", "federated"))),
        f"## Results\n\n{'Not evaluated.' if results.empty else table}\n",
        f"## Limits\n\n{LIMITS}",
    ]
    with files.atomic(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return {"results": float(len(results))}


def _section(title: str, facts: dict[str, Any]) -> str:
    return f"## {title}\n\n" + "".join(f"* {name}: {value}\n" for name, value in facts.items())


def _model(checkpoint: Path) -> dict[str, Any]:
    model, _ = pretrained.load(checkpoint, weights=False)
    config = model.config
    return {
        "layers x width": f"{config.num_hidden_layers} x {config.hidden_size}",
        "front end": config.front_end,
        "parameters": f"{cost.parameters(model):,}",
        "multiply-accumulates for one second": f"{cost.macs(config):,}",
        "input": "16 kHz mono, " + ("zero mean and unit variance" if config.do_normalize else "not normalised"),
        "frames": "50 a second",
    }


def _data(run: Path, corpus: dict[str, Any]) -> dict[str, Any]:
    manifest = pd.read_parquet(run / "00_corpus" / "manifest.parquet")
    train = manifest[manifest.split == "train"]
    hours = float((train.samples / train.sample_rate).sum()) / 3600
    clients = pd.read_parquet(run / "01_partition" / "clients.parquet")
    source = "made by eSpeak NG" if corpus.get("kind") == "synthetic" else "LibriSpeech (CC BY 4.0)"
    return {
        "speech": f"{source}: {', '.join(sorted(train.subset.unique()))}",
        "training part": f"{hours:.2f} h, {len(train)} utterances, {train.speaker.nunique()} speakers",
        "clients": f"{len(clients)}, partition scheme {parameters(run / '01_partition').get('scheme', 'unknown')}",
    }


def _training(stage: Path) -> dict[str, Any]:
    p = parameters(stage)
    rows = [row for row in files.read_rows(stage / "metrics.jsonl") if row["kind"] == "round"]
    losses = [row["loss"] for row in rows if row["loss"] is not None]  # a private round may have none
    facts = {name.replace("_", " "): p[name] for name in TRAINING if name in p}
    return facts | {"rounds done": len(rows), "last loss": f"{losses[-1]:.4f}" if losses else "unknown"}


def _privacy(stage: Path) -> dict[str, Any]:
    p = parameters(stage)
    rows = [row for row in files.read_rows(stage / "metrics.jsonl") if "epsilon" in row]
    facts: dict[str, Any] = {"audio, features and labels": "never left their client"}
    facts["differential privacy of updates"] = rows[-1]["privacy"] if rows else p.get("privacy", "unknown")
    if rows:
        facts["epsilon of updates"] = _epsilon(rows[-1]) + f" at delta {p.get('privacy_delta')}"
    return facts


def _kmeans_privacy(run: Path, codebook: str) -> dict[str, Any]:
    """The noise on cluster statistics that clients sent in 02_kmeans, and its epsilon or why there is none."""
    p = parameters(run / "02_kmeans")
    if not p.get("noise_multiplier"):
        why = "sums and counts of each client's clusters reached the server without noise" if p else "unknown"
        return {"differential privacy of cluster statistics": f"none: {why}" if p else why}
    noise = f"Gaussian noise of {p['noise_multiplier']} x norm {p['noise_clip']} on each client's sums and counts"
    path = run / "02_kmeans" / "quality.json"
    spent = json.loads(path.read_text(encoding="utf-8"))["codebooks"].get(codebook, {}) if path.is_file() else {}
    if "epsilon" not in spent:
        return {"differential privacy of cluster statistics": f"no statistics of codebook {codebook} left a client"}
    facts = {"differential privacy of cluster statistics": f"{spent['privacy']}; {noise}"}
    return facts | {
        "epsilon of cluster statistics": f"{_epsilon(spent)} at delta {spent['delta']}; add it to the other"
    }


def _epsilon(spent: dict[str, Any]) -> str:
    epsilon = "infinite" if spent["epsilon"] is None else f"{spent['epsilon']:.3g}"
    return epsilon + (", had the noise been secret," if spent["privacy"].startswith("not private") else "")


def _results(run: Path, system: str) -> pd.DataFrame:
    """A row per measure; columns: this model, then the baselines. Empty where 05_evaluate has not run."""
    path = run / "05_evaluate" / "report.json"
    if not path.is_file():
        return pd.DataFrame()
    report = json.loads(path.read_text(encoding="utf-8"))
    titles = {row["measure"]: row["title"] for row in report["measures"]}
    columns = {name: {} for name in [system, *(row["system"] for row in report["systems"])]}
    for figure in report["figures"]:
        if figure["measure"] in MEASURES:
            interval = "" if figure["high"] is None else f" ± {figure['high'] - figure['value']:.3f}"
            columns[figure["system"]][titles[figure["measure"]]] = f"{figure['value']:.3f}{interval}"
    return pd.DataFrame(columns, dtype=object).fillna("")


def _markdown(table: pd.DataFrame) -> str:
    rows = [["measure", *table.columns], ["---"] * (len(table.columns) + 1), *map(list, table.itertuples())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
