"""What the targets are worth on real speech with phone times: every kind of codebook, normalisation, and layers.

    python benchmarks/study_kmeans.py kinds  --librispeech ROOT --alignments FILE --seeds 0 1 2
    python benchmarks/study_kmeans.py layers --librispeech ROOT --alignments FILE --seeds 0 --checkpoint FOLDER
    python benchmarks/study_kmeans.py report

``kinds``: each kind of codebook under each normalisation of the MFCCs, a client per speaker of train-clean-100 below
ROOT (the excerpt that is there), 100 clusters. ``layers``: federated codebooks of the middle layer of a checkpoint and
of the same model with random weights, beside MFCCs, with 100 and 500 clusters: what a second iteration would train on.
A seed draws starts and random weights anew, not the speech. Each run writes a JSON file below --out and is not run
again; ``report`` prints the tables.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch

from fedhubert_lib import corpora, federated, hubert, kmeans, params, partition, pretrained

KINDS = list(get_args(params.Codebook))
NORMALISATIONS = ("none", "speaker")
MEASURES = ["pnmi", "shuffled_pnmi", "pnmi_within", "phone_purity", "cluster_purity", "agreement_same", "agreement_nmi"]


def prepared(options: argparse.Namespace) -> Path:
    """The run folder that all share: corpus, and a client for each speaker."""
    run = options.out / "librispeech"
    if not (run / "01_partition" / "clients.parquet").exists():
        corpus = params.Corpus(
            kind="librispeech", root=options.librispeech, alignments=options.alignments, test_subsets=["test-other"],
            keyword_voices=3,
        )  # fmt: skip
        corpora.prepare(run, corpus)
        partition.assign(run, params.Partition(scheme="speaker", clients=1000, heldout_speakers=0))
    return run


def measured(run: Path, path: Path, **settings: Any) -> None:
    """Fit and label with these settings, and write the table of quality to ``path``, if it is not there."""
    if path.exists():
        return
    p = params.Kmeans(device="cpu", lloyd_rounds=50, **settings)
    with federated.connect(run) as clients:
        table = kmeans.run(run, p, clients)
    path.write_text(table.to_json(orient="index", indent=2), encoding="utf-8")
    for kind in p.codebooks:  # features stay cached
        shutil.rmtree(run / "02_kmeans" / "codebooks" / kind)


def kinds(options: argparse.Namespace) -> None:
    """Every kind under every normalisation."""
    for seed in options.seeds:
        for normalisation in NORMALISATIONS:
            for kind in options.kinds:
                path = options.out / f"kinds-{normalisation}-{kind.replace('-', '_')}-{seed}.json"
                settings = {"codebooks": [kind], "clusters": 100, "normalisation": normalisation, "seed": seed}
                measured(prepared(options), path, **settings)
                print(path, flush=True)


def layers(options: argparse.Namespace) -> None:
    """Federated codebooks of MFCCs, of random weights and of the checkpoint."""
    model, _ = pretrained.load(options.checkpoint)
    for seed in options.seeds:
        torch.manual_seed(seed)
        pretrained.save(options.out / f"random-{seed}", hubert.Hubert(model.config))
        random = str(options.out / f"random-{seed}")
        for name, folder in {"MFCC": "mfcc", "random weights": random, "trained": options.checkpoint}.items():
            for clusters in options.clusters:
                path = options.out / f"layers-{name.replace(' ', '_')}-{clusters}-{seed}.json"
                settings = {"codebooks": ["federated"], "clusters": clusters, "normalisation": "speaker", "seed": seed}
                middle = "auto" if folder == "mfcc" else max(1, model.config.num_hidden_layers // 2)
                measured(prepared(options), path, features=folder, layer=middle, **settings)
                print(path, flush=True)


def report(options: argparse.Namespace) -> None:
    """Print mean and standard deviation over seeds, in Markdown."""
    rows = []
    for path in sorted(options.out.glob("*-*-*-*.json")):
        study, features, which, seed = path.stem.replace("_", " ").split("-")
        (values,) = json.loads(path.read_text(encoding="utf-8")).values()
        rows.append({"study": study, "features": features, "which": which, "seed": seed, **values})
    table = pd.DataFrame(rows)
    for study, results in table.groupby("study"):
        groups = results.groupby(["which", "features"], sort=False)
        mean, deviation, seeds = groups[MEASURES].mean(), groups[MEASURES].std(), groups.size()
        print(f"\n{study}: {int(results.frames.iloc[0]):,} frames with a phone; mean ± standard deviation over seeds\n")
        print(f"| | | seeds | {' | '.join(MEASURES)} |\n|{'---|' * (3 + len(MEASURES))}")
        for place in mean.index:
            spread = [f" ± {value:.3f}" if seeds[place] > 1 else "" for value in deviation.loc[place]]
            cells = [f"{value:.3f}{more}" for value, more in zip(mean.loc[place], spread, strict=True)]
            print(f"| {' | '.join([*place, str(seeds[place]), *cells])} |")


def main() -> None:
    """Run what is missing of a study, or print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["kinds", "layers", "report"])
    parser.add_argument("--librispeech", default="", help="folder of the subsets")
    parser.add_argument("--alignments", default="", help="phone times of its utterances")
    parser.add_argument("--checkpoint", default="", help="layers: folder of the first iteration's model")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="kinds: leave out what takes long")
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 500], help="layers: K")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/study_kmeans"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    {"kinds": kinds, "layers": layers, "report": report}[options.study](options)


if __name__ == "__main__":
    main()
