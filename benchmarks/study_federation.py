"""Three small studies of federated pretraining over several seeds: an hour on two cores, stopped and resumed at will.

    python benchmarks/study_federation.py rates    --librispeech ROOT --seeds 100
    python benchmarks/study_federation.py speakers --librispeech ROOT --seeds 0 1 2
    python benchmarks/study_federation.py heads --seeds 0 1 2
    python benchmarks/study_federation.py report

``speakers``: one client per speaker of the LibriSpeech subset train-clean-100 below ROOT (the excerpt that is there);
FedAdam and FedAvg beside training on the pooled speech with as many updates on as much audio. ``rates``: the server
rates that this choice of FedAdam's comes from, on a seed of its own. ``heads``: kinds of codebook with shared and with
personal heads, on the synthetic corpus. A seed draws voices, held-out speakers, k-means, weights, cohorts and masks
anew. Each arm writes a JSON file below --out when it is done, and is not run again; ``report`` prints the tables
and draws curves.png.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats

from fedhubert_lib import (
    batching,
    corpora,
    federated,
    files,
    kmeans,
    objectives,
    params,
    partition,
    pooled,
    pretrained,
    pretraining,
    training,
)
from fedhubert_lib.evaluation import extraction, intervals, layers, probes, systems
from fedhubert_lib.federated import handlers
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.labels import Labels
from fedhubert_lib.plots import style

CLUSTERS = 50
KINDS = ("federated", "client", "aligned", "random-projection")
COMMON = {
    "model": "tiny", "front_end": "logmel", "device": "cpu", "learning_rate": 2e-3, "batch_seconds": 8.0,
    "mask_length": 5, "mask_probability": 0.5, "unmasked_weight": 1.0, "server_tau": 0.01, "server_rate": 0.03,
}  # fmt: skip
"""Short spans, and a loss on what can be heard: a hundred steps of the published recipe teach next to nothing."""
SPEAKERS = COMMON | {"rounds": 10, "cohort": 4, "local_steps": 10}
HEADS = COMMON | {"rounds": 6, "cohort": 6, "local_steps": 8}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "rates": {f"FedAdam, rate {rate:g}": SPEAKERS | {"server_rate": rate} for rate in (0.01, 0.03, 0.1)},
    "speakers": {
        "FedAdam": SPEAKERS,
        "FedAvg": SPEAKERS | {"server": "fedavg", "server_rate": 1.0},
        "centralised": SPEAKERS,
    },
    "heads": {
        f"{kind}, {head}": HEADS | {"codebook": kind, "head": head} for kind in KINDS for head in ("shared", "personal")
    },
}
"""Arms of each study, with their parameters of 03_pretrain."""


def prepared(study: str, seed: int, out: Path, librispeech: str) -> Path:
    """The run folder of a seed, which the study's arms share: corpus, clients, codebooks, labels."""
    run = out / f"{'synthetic' if study == 'heads' else 'librispeech'}-{seed}"
    done = run / "02_kmeans" / "quality.json"
    if done.exists():
        return run
    words = {"keyword_voices": 3, "seed": seed}
    if study == "heads":
        corpus = params.Corpus(speakers=18, minutes=15.0, test_speakers=6, test_minutes=3.0, **words)
        clients = params.Partition(clients=6, heldout_speakers=0, seed=seed)
    else:
        corpus = params.Corpus(kind="librispeech", root=librispeech, test_subsets=[], **words)
        clients = params.Partition(scheme="speaker", clients=1000, heldout_speakers=4, seed=seed)
    kinds = list(KINDS) if study == "heads" else ["federated"]
    corpora.prepare(run, corpus)
    partition.assign(run, clients)
    with federated.connect(run) as connected:
        kmeans.run(run, params.Kmeans(codebooks=kinds, clusters=CLUSTERS, seed=seed, device="cpu"), connected)
    return run


def trained(base: Path, name: str, p: params.Pretrain, out: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Train one arm in a folder of its own; the model folder, and the rows of its ledger."""
    run = out / f"{base.name}-{name.replace(', ', '-').replace(' ', '-')}"
    run.mkdir(parents=True, exist_ok=True)
    for stage in ("00_corpus", "01_partition", "02_kmeans"):
        if not (run / stage).exists():
            (run / stage).symlink_to((base / stage).resolve())
    if name == "centralised":
        return pooled.train(run, p), files.read_rows(run / "03_pretrain/centralised/metrics.jsonl")
    return pretraining.run(run, p), files.read_rows(run / "03_pretrain/metrics.jsonl")


def on_new_voices(base: Path, checkpoint: Path, p: params.Pretrain) -> dict[str, float]:
    """Masked loss and accuracy on all speech of the held-out speakers, who are labelled by the shared codebook."""
    heldout = pd.read_parquet(base / "01_partition" / "heldout.parquet")
    home = ClientHome("heldout", base / "heldout", base / "heldout/labels", base / "heldout/state")
    book = base / "02_kmeans" / "codebooks" / p.codebook
    if not (home.data / "train.parquet").exists():
        home.data.mkdir(exist_ok=True)
        heldout.iloc[:0].to_parquet(home.data / "validation.parquet")
        heldout.to_parquet(home.data / "train.parquet")
    settings = {**json.loads((book / "codebook.json").read_text(encoding="utf-8"))["settings"], "kind": p.codebook}
    handlers.HANDLERS["kmeans.features"](home, {}, settings)
    handlers.HANDLERS["kmeans.label"](home, {"centroids": torch.from_numpy(np.load(book / "centroids.npy"))}, settings)
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
    counts = np.bincount(np.concatenate([labels[name] for name in heldout.utterance]), minlength=CLUSTERS)
    return {**objectives.averages(sums), **unigram([counts])}


def unigram(counts: list[np.ndarray]) -> dict[str, float]:
    """What needs no model: guessing from how often each client has each label. ``counts``: labels of each client."""
    total = sum(own.sum() for own in counts)
    entropy = sum(float(own.sum() / total) * stats.entropy(own) for own in counts)
    return {"unigram_loss": entropy, "unigram_accuracy": sum(int(own.max()) for own in counts) / total}


def phone_probe(base: Path, encoder: systems.Encoder, cache: Path, seed: int) -> list[float]:
    """Accuracy of a linear phone classifier on frames of voices that it was not fitted on, for each layer."""
    table, phones = layers.held_out(base, 3.0, seed)
    frames = extraction.utterances(encoder, table, cache)
    labels, speakers = layers.phone_labels(table, phones)
    known = labels >= 0
    return [
        probes.leave_speakers_out(frames[known, layer], labels[known], speakers[known], seed=seed, folds=3)[0]
        for layer in range(frames.shape[1])
    ]


def arm(study: str, name: str, seed: int, out: Path, librispeech: str) -> dict[str, Any]:
    """Everything that the report needs of one arm and seed."""
    base = prepared(study, seed, out, librispeech)
    p = params.Pretrain(**ARMS[study][name], seed=seed)
    checkpoint, rows = trained(base, name, p, out)
    ledger = pd.DataFrame([row for row in rows if row["kind"] == "round"])
    result: dict[str, Any] = {"study": study, "arm": name, "seed": seed, "clusters": CLUSTERS}
    result |= {"rounds": ledger[["round", "loss", "validation_loss", "validation_accuracy_masked"]].to_dict("list")}
    result |= {"seconds": float(ledger.seconds.sum()), "failures": sum(row["kind"] == "failure" for row in rows)}
    if study != "heads":
        return result | {"new_voices": on_new_voices(base, checkpoint, p)}
    counts = []
    for client in federated.client_ids(base):
        own = Labels(base / "02_kmeans" / "clients" / client / p.codebook)
        counts.append(np.bincount(np.concatenate([own[name] for name in own.utterances]), minlength=CLUSTERS))
    model, _ = pretrained.load(checkpoint)
    result |= unigram(counts)
    cache = base / f"frames-{name}.npy"
    result["probe"] = phone_probe(base, systems.of_model(model, torch.device("cpu")), cache, seed)
    cache.unlink()
    for floor, encoder in {
        "random weights": systems.of_model(systems.untrained(model.config, seed), torch.device("cpu")),
        "MFCC": systems.mfcc,
    }.items():
        result[f"probe {floor}"] = phone_probe(base, encoder, base / f"frames-{floor}.npy", seed)
    return result


def report(out: Path) -> None:
    """Print the tables of all results there are, as mean and 95 % interval over seeds, and draw the curves.

    Columns with ``minus`` are differences within a seed, so that what seeds differ in by themselves is left out.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    by_arm: dict[str, dict[str, list[dict]]] = {study: {} for study in ARMS}
    for study, arms in ARMS.items():
        for name in arms:
            if found := [result for result in results if (result["study"], result["arm"]) == (study, name)]:
                by_arm[study][name] = found
    for study, arms in by_arm.items():
        print(f"\n{study}\n")
        rows: dict[str, dict[str, Any]] = {}
        base = {r["seed"]: r for r in arms.get("centralised", [])}
        for name, found in arms.items():
            last = {r["seed"]: r["rounds"]["validation_loss"][-1] for r in found}
            if study == "heads":
                values = {
                    "nats gained over guessing": [r["unigram_loss"] - last[r["seed"]] for r in found],
                    "masked accuracy": [r["rounds"]["validation_accuracy_masked"][-1] for r in found],
                    "guessing": [r["unigram_accuracy"] for r in found],
                    "phones of new voices": [max(r["probe"]) for r in found],
                    "minus random weights": [max(r["probe"]) - max(r["probe random weights"]) for r in found],
                }
            else:
                paired = [r for r in found if r["seed"] in base]
                values = {
                    "loss, new voices": [r["new_voices"]["loss"] for r in found],
                    "guessing": [r["new_voices"]["unigram_loss"] for r in found],
                    "minus centralised": [
                        r["new_voices"]["loss"] - base[r["seed"]]["new_voices"]["loss"] for r in paired
                    ],
                    "masked accuracy": [r["new_voices"]["accuracy_masked"] for r in found],
                    "guessing ": [r["new_voices"]["unigram_accuracy"] for r in found],
                    "loss, known voices": list(last.values()),
                }
            rows[name] = {"seeds": str(len(found))} | {
                k: str(intervals.measure(v)) if v else "" for k, v in values.items()
            }
        if study == "heads" and arms:
            found = next(iter(arms.values()))
            for floor in ("random weights", "MFCC"):
                accuracy = intervals.measure([max(r[f"probe {floor}"]) for r in found])
                rows[floor] = {"phones of new voices": str(accuracy)}
        table = pd.DataFrame.from_dict(rows, orient="index").fillna("")
        print("| " + " | ".join(["", *table.columns]) + " |\n" + "|---" * (1 + table.shape[1]) + "|")
        for name, row in zip(table.index, table.to_numpy(), strict=True):
            print("| " + " | ".join([name, *map(str, row)]) + " |")
    panels = {}
    for study, title in (("speakers", "One client per speaker: loss"), ("heads", "Codebook, head: loss over guessing")):
        for name, found in by_arm[study].items():
            guessing = [r["unigram_loss"] if study == "heads" else 0.0 for r in found]
            losses = [np.array(r["rounds"]["validation_loss"]) for r in found]
            values = [loss - guess for loss, guess in zip(losses, guessing, strict=True)]
            panels.setdefault(title, {})[name] = np.array(values)
    style.save(curves(panels), out, "curves")


@style.styled
def curves(panels: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Title to arm to validation loss [seeds, rounds]; thin lines are seeds, thick ones their means."""
    figure, places = style.panels(1, len(panels), width=5 * len(panels), height=3.6)
    for axes, (title, arms) in zip(places, panels.items(), strict=True):
        for index, (name, values) in enumerate(arms.items()):
            paired = len(arms) > 4  # of each codebook a shared head, and dashed the personal ones
            look = {"color": style.PALETTE[index // 2 if paired else index]}
            look["linestyle"] = "--" if paired and index % 2 else "-"
            at = np.arange(1, values.shape[1] + 1)
            axes.plot(at, values.T, **look, linewidth=0.6, alpha=0.5)
            axes.plot(at, values.mean(0), **look, linewidth=2, label=name)
        axes.set(xlabel="round", ylabel="nats per masked frame", title=title)
        axes.legend(fontsize=7)
    return figure


def main() -> None:
    """Run what is asked for and not yet there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*ARMS, "report"])
    parser.add_argument("--out", type=Path, default=params.ROOT / "outputs" / "study-federation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further arm after so long")
    parser.add_argument("--librispeech", default="", help="folder that holds train-clean-100")
    given = parser.parse_args()
    if given.study == "report":
        report(given.out)
        return
    began = time.monotonic()
    for seed in given.seeds:
        for name in ARMS[given.study]:
            path = given.out / f"{given.study}-{name}-{seed}.json"
            if not path.exists() and time.monotonic() - began < 60 * given.minutes:
                files.write_json(path, arm(given.study, name, seed, given.out, given.librispeech))
                print(f"{path}: done", flush=True)


if __name__ == "__main__":
    main()
