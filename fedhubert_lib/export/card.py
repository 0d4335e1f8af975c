"""A model card: the model, on whose speech it was trained and how, its results, and its limits.

All of it is read from the run's own files; a setting that they do not hold is called unknown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedhubert_lib import files, params, pretrained, reference
from fedhubert_lib.corpora import archives
from fedhubert_lib.evaluation import cost, systems, tables
from fedhubert_lib.export.formats import ExportError
from fedhubert_lib.federated import accounting, client_ids, privacy
from fedhubert_lib.records import parameters, read_json, stale

STAGES = {"03_pretrain": "teacher", "04_distill": "student"}
"""Stages whose ``checkpoint`` can have a card, and the model's name in the report."""
SPEECH = {
    "librispeech": ("cc-by-4.0", "LibriSpeech (CC BY 4.0)"),
    "synthetic": ("apache-2.0", "made by eSpeak NG"),
    "folder": ("other", "a plain folder of speakers"),
    "layout": ("other", "folders in the layout of LibriSpeech"),
}
"""Licence of the model and name of its speech, by the corpus's kind; ``layout``: not the published one."""
CARD = """\
---
license: {license}
tags: [speech, hubert, federated-learning, self-supervised-learning]
---

# {run}: {name}

HuBERT, trained by federated learning: clients trained on their own speech and shared model updates only.

## Model

* layers x width: {config.num_hidden_layers} x {config.hidden_size}
* front end: {config.front_end}
* parameters: {parameters:,}
* multiply-accumulates for one second: {macs:,}
* input: 16 kHz mono, zero mean and unit variance: {config.do_normalize}
* frames: 50 a second

## Data

* speech: {source}: {subsets}
* at clients, for training and validation: {hours:.2f} h, {utterances} utterances, {speakers} speakers
* clients: {clients} with {shares} h of it each, partition scheme {scheme}

## Training

* rounds done: {rounds}
* last loss: {loss}
* parameters: {training}

## Privacy

* audio, features and labels: {speech}
* differential privacy of updates: {updates}
* differential privacy of cluster statistics: {statistics}

## Results

{results}

## Curves beside the reference of the study

{verdict}

## Limits

Trained on the speech named above{others}; other languages, accents, channels and noise are untested. Features of speech
also identify the speaker: see the speaker probe among the results.
"""


def export(checkpoint: Path, path: Path) -> dict[str, float]:
    """Write the card of ``checkpoint``, which lies in a run, to ``path``; returns its number of tables of results.

    Raises ExportError when ``checkpoint`` is not RUN/03_pretrain/checkpoint or RUN/04_distill/checkpoint, or is stale.
    """
    stage = checkpoint.resolve().parent
    run = stage.parent
    if stage.name not in STAGES or not (run / "00_corpus" / "manifest.parquet").is_file():
        raise ExportError(
            f"{checkpoint}: not the checkpoint of a run's 03_pretrain or 04_distill; a card needs the run"
        )
    if why := systems.unusable(run, f"{stage.name}/checkpoint"):
        raise ExportError(f"{checkpoint}: {why}")
    model, _ = pretrained.load(checkpoint, weights=False)
    train = pd.read_parquet(run / "00_corpus" / "manifest.parquet").query("split == 'train'")
    train = train[~train.utterance.isin(pd.read_parquet(run / "01_partition" / "heldout.parquet").utterance)]
    kind, p = parameters(run / "00_corpus").get("kind"), parameters(stage)
    trained = [stage] if p.get("teacher") else [run / name for name in STAGES if name <= stage.name]
    begun = [parameters(one).get(name) for one in trained for name in ("initial", "teacher")]
    begun.append(parameters(run / "02_kmeans").get("features"))  # whose units are the targets
    begun = list(dict.fromkeys(_shown(model) for model in begun if _outside(model)))
    report = None if "evaluate" in stale(run) else read_json(run / "05_evaluate" / "report.json")
    results = [tables.headline(report), *tables.below(report)] if report else []
    span = "mean and 95 % interval over evaluation seeds"
    published = kind != "librispeech" or set(train.subset) <= archives.PUBLISHED.keys()
    licence, source = SPEECH.get(str(kind) if published else "layout", ("unknown", "unknown"))
    clients = pd.read_parquet(run / "01_partition" / "clients.parquet")
    clients = clients[clients.client.isin(client_ids(run, p.get("codebook", "")))]  # less those that 02 let go
    rounds = files.rounds(stage / "metrics.jsonl")
    private = any("epsilon" in row for row in rounds)  # which covers no loss, and a card is for others
    losses = [row["loss"] for row in rounds if not private and row["loss"] is not None]
    text = CARD.format(
        license="other" if begun else licence,  # those models have licences of their own
        run=run.name,
        name=STAGES[stage.name],
        config=model.config,
        parameters=cost.parameters(model),
        macs=cost.macs(model.config),
        source=source,
        subsets=", ".join(sorted(train.subset.unique())),
        hours=clients.hours.sum(),
        utterances=clients.filter(like="utterances").to_numpy().sum(),
        speakers=min(train.speaker.nunique(), clients.speakers.sum()),
        clients=len(clients),
        shares=f"{clients.hours.min():.2g} to {clients.hours.max():.2g}",
        scheme=parameters(run / "01_partition").get("scheme", "unknown"),
        rounds=len(rounds) or "unknown",
        loss=f"{losses[-1]:.4f}" if losses else "not told: no noise covers it" if private else "unknown",
        # Neither how this machine ran it, nor folders on its disk.
        training=", ".join(f"{n} {_shown(v)}" for n, v in p.items() if n not in params.HOW and str(v)),
        speech=_whereabouts([run / "02_kmeans", *trained]),
        updates="; ".join(f"{STAGES[one.name]}: {_updates(one)}" for one in trained) + _together(trained, begun),
        statistics="; ".join(dict.fromkeys(_statistics(run, parameters(one)) for one in trained)),
        others="".join(f", and what {model} had heard" for model in begun),
        results="\n\n".join(tables.markdown(table, span) for table in results) or "Not evaluated.",
        verdict=_verdict(run, stage.name[3:], bool(results), private),
    )
    files.write_text(path, text)
    return {"tables of results": len(results)}


def _outside(value: Any) -> bool:
    return str(value).startswith("/")


def _whereabouts(stages: Sequence[Path]) -> str:
    """Where audio, features and labels were, in words."""
    recorded = [parameters(stage) for stage in stages]
    if any(values.get("codebook") == "central" for values in recorded):
        return "pooled to start the codebook"
    simulated = any(values.get("engine") != "deployment" for values in recorded)
    return "never left their client" + simulated * " (a simulation: all clients lay on one machine)"


def _shown(value: Any) -> Any:
    """The value of a parameter, without the folders of this disk."""
    return systems.short_name(Path(value)) if _outside(value) else value


def _updates(stage: Path) -> str:
    """The differential privacy of a stage's updates."""
    rounds, p = files.rounds(stage / "metrics.jsonl"), parameters(stage)
    if not rounds or "epsilon" not in rounds[-1]:
        return p.get("privacy", "unknown")
    return f"{rounds[-1]['privacy']}, {_epsilon(rounds[-1], p.get('privacy_delta'))}"


def _together(trained: list[Path], begun: list[str]) -> str:
    """What all stages have spent together, and what is not known of models from elsewhere."""
    accounts = [path for one in trained if (path := one / privacy.ACCOUNT).is_file()]
    words = [f"; what {model} has spent on the same clients is not in this" for model in begun if accounts]
    if len(accounts) > 1 and len(deltas := {parameters(one.parent).get("privacy_delta") for one in accounts}) == 1:
        labels = [files.rounds(account.with_name("metrics.jsonl"))[-1]["privacy"] for account in accounts]
        label = max(labels, key=lambda label: label.startswith("not private"))
        spent = {"epsilon": accounting.spent(accounts, delta := deltas.pop()), "privacy": label}
        words.insert(0, f"; together: {_epsilon(spent, delta)}")
    return "".join(words)


def _statistics(run: Path, trained: dict[str, Any]) -> str:
    """The differential privacy of the cluster statistics that clients sent, or why there is none."""
    p, quality = parameters(run / "02_kmeans"), read_json(run / "02_kmeans" / "quality.json")
    codebook = trained.get("codebook", "federated")
    if "hubert" in trained.get("objectives", ()):
        return "none: those of the teacher's features reached the server without noise"
    if not p.get("noise_multiplier"):
        return "none: sums and counts of each client's clusters reached the server without noise" if p else "unknown"
    spent = quality["codebooks"].get(codebook, {}) if quality else {}
    if "epsilon" not in spent:
        return f"no statistics of codebook {codebook} left a client"
    noise = f"Gaussian noise of {p['noise_multiplier']} x norm {p['noise_clip']} on each client's sums and counts"
    return f"{spent['privacy']}; {noise}; {_epsilon(spent, spent['delta'])}; add it to the other"


def _epsilon(spent: dict[str, Any], delta: float | None) -> str:
    epsilon = "infinite" if spent["epsilon"] is None else f"{spent['epsilon']:.3g}"
    condition = ", had the noise been secret," if spent["privacy"].startswith("not private") else ""
    return f"epsilon {epsilon}{condition} at delta {delta}"


def _verdict(run: Path, trained: str, evaluated: bool, private: bool) -> str:
    """Whether the curves of the stage ``trained`` are normal, in words, and those of quality, which are of teachers."""
    stages = [trained] * (not private) + ["evaluate"] * (evaluated and trained == "pretrain")
    lines = [f"* {stage}: {line}" for stage in stages for line in reference.verdict(run, stage).splitlines()]
    return "\n".join(lines) or "Not compared."
