"""A model card: what the model is, on whose speech it was trained and how, what it is worth, and its limits.

All of it is read from the run's own files; what the run does not say is said to be unknown.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fedhubert_lib import files, hubert
from fedhubert_lib.evaluation import cost
from fedhubert_lib.export.checks import ExportError

STAGES = {"03_pretrain": "teacher", "04_distill": "student"}
"""Folders of a run whose ``checkpoint`` can have a card, and the system it is in report.json."""


def export(checkpoint: Path, path: Path) -> dict[str, float]:
    """Write the card of ``checkpoint``, which lies in a run, to ``path`` (README.md); returns how many results it has.

    Raises ExportError when ``checkpoint`` is not RUN/03_pretrain/checkpoint or RUN/04_distill/checkpoint.
    """
    stage = checkpoint.resolve().parent
    run = stage.parent
    if stage.name not in STAGES or not (run / "00_corpus" / "manifest.parquet").is_file():
        raise ExportError(
            f"{checkpoint}: not the checkpoint of a run's 03_pretrain or 04_distill, of which a card tells"
        )
    results = _results(run, STAGES[stage.name])
    parts = [
        _header(run),
        f"# {run.name}: {STAGES[stage.name]}\n",
        "HuBERT, trained by federated learning: clients trained on their own speech and shared model updates only.\n",
        _section("Model", _model(checkpoint)),
        _section("Data", _data(run)),
        _section("Training", _training(stage)),
        _section("Privacy", _privacy(stage)),
        f"## Results\n\n{_markdown(results) if len(results) else 'Not evaluated.'}\n",
        "Mean and 95 % interval over evaluation seeds, beside the baselines of the same run.\n" if len(results) else "",
        "## Limits\n\nTrained on the speech named above alone; other languages, accents, channels and noise are"
        " untested. Features of speech tell who speaks, too: see the speaker probe among the results.\n",
    ]
    with files.atomic(path) as temporary:
        temporary.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return {"results": float(len(results))}


def _section(title: str, facts: dict[str, Any]) -> str:
    return f"## {title}\n\n" + "".join(f"* {name}: {value}\n" for name, value in facts.items())


def _header(run: Path) -> str:
    licence = "cc-by-4.0" if _params(run / "00_corpus").get("kind") == "librispeech" else "apache-2.0"
    tags = ["speech", "hubert", "federated-learning", "self-supervised-learning"]
    return f"---\n{yaml.safe_dump({'license': licence, 'language': 'en', 'tags': tags}, sort_keys=False)}---\n"


def _model(checkpoint: Path) -> dict[str, Any]:
    model, _ = hubert.load(checkpoint)
    config = model.config
    return {
        "layers x width": f"{config.num_hidden_layers} x {config.hidden_size}",
        "front end": config.front_end,
        "parameters": f"{cost.parameters(model):,}",
        "multiply-accumulates for one second": f"{cost.macs(config):,}",
        "input": "16 kHz mono, " + ("zero mean and unit variance" if config.do_normalize else "not normalised"),
        "frames": "50 a second",
    }


def _data(run: Path) -> dict[str, Any]:
    manifest = pd.read_parquet(run / "00_corpus" / "manifest.parquet")
    train = manifest[manifest.split == "train"]
    seconds = float((train.samples / train.sample_rate).sum())
    corpus, partition = _params(run / "00_corpus"), _params(run / "01_partition")
    clients = pd.read_parquet(run / "01_partition" / "clients.parquet")
    made = "made by eSpeak NG" if corpus.get("kind") == "synthetic" else "LibriSpeech (CC BY 4.0)"
    return {
        "speech": f"{made}: {', '.join(sorted(train.subset.unique()))}",
        "training part": f"{seconds / 3600:.2f} h, {len(train)} utterances, {train.speaker.nunique()} speakers",
        "clients": f"{len(clients)}, partition scheme {partition.get('scheme', 'unknown')}",
    }


def _training(stage: Path) -> dict[str, Any]:
    names = ("objectives", "codebook", "head", "rounds", "cohort", "local_steps", "batch_seconds", "crop_seconds")
    names += ("learning_rate", "server", "server_rate", "compression", "seed")
    known = _params(stage)
    rows = [row for row in files.read_rows(stage / "metrics.jsonl") if row["kind"] == "round"]
    facts = {name.replace("_", " "): known[name] for name in names if name in known}
    losses = [row["loss"] for row in rows if row["loss"] is not None]  # a private round may tell none
    return facts | {"rounds done": len(rows), "last loss": f"{losses[-1]:.4f}" if losses else "unknown"}


def _privacy(stage: Path) -> dict[str, Any]:
    known = _params(stage)
    facts: dict[str, Any] = {"differential privacy": known.get("privacy", "unknown")}
    rows = [row for row in files.read_rows(stage / "metrics.jsonl") if "epsilon" in row]
    if rows:
        spent, kind = rows[-1]["epsilon"], rows[-1]["privacy"]
        facts["differential privacy"] = kind
        simulated = ", had the noise been secret" if kind.startswith("not private") else ""
        facts["epsilon"] = ("infinite" if spent is None else f"{spent:.3g}") + simulated
        facts |= {"delta": known.get("privacy_delta"), "epsilon covers": "updates of this stage; no cluster statistics"}
    return facts | {"audio, features and labels": "never left their client"}


def _results(run: Path, system: str) -> pd.DataFrame:
    """A row per measure; columns: this model, then the baselines. Empty where 05_evaluate has not run."""
    path = run / "05_evaluate" / "report.json"
    if not path.is_file():
        return pd.DataFrame()
    report = json.loads(path.read_text(encoding="utf-8"))
    titles = {each["measure"]: each["title"] for each in report["measures"]}
    wanted = {"keyword-accuracy", "moments-accuracy", "s3prl-accuracy", "s3prl-fine-tuned-accuracy"}
    wanted |= {"unseen-speaker-accuracy", "nearest-accuracy", "abx-error", "speaker-accuracy"}
    columns: dict[str, dict[str, str]] = {}
    others = [each["system"] for each in report["systems"] if each["system"] != system]
    for name in [system, *others]:
        own = [figure for figure in report["figures"] if figure["system"] == name and figure["measure"] in wanted]
        columns[name] = {titles[figure["measure"]]: _text(figure) for figure in own}
    return pd.DataFrame(columns, dtype=object).fillna("")


def _markdown(table: pd.DataFrame) -> str:
    lines = [
        ["measure", *table.columns],
        ["---"] * (len(table.columns) + 1),
        *(list(row) for row in table.itertuples()),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(figure: dict[str, Any]) -> str:
    if figure["high"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} ± {figure['high'] - figure['value']:.3f}"


def _params(folder: Path) -> dict[str, Any]:
    path = folder / "params.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
