"""Curves that are not normal: the usual causes, each put in on purpose, against the reference of the same small study.

``python benchmarks/study_curves.py`` trains three seeds as they should be and a run with each cause, prints the
verdicts, and writes the pictures of docs/curves.md. Ten minutes of 12 synthetic voices over 3 clients, a model of two
layers: a few minutes of one core. tests/test_reference.py asks of the same runs that each cause is found.
"""

import argparse
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from fedhubert_lib import corpora, files, identity, params, partition, plots, pretraining, recipes, reference, studies
from fedhubert_lib.federated import connect
from fedhubert_lib.kmeans import stage as kmeans

ROOT = Path(__file__).resolve().parents[1]
STUDY = [
    "corpus.speakers=12", "corpus.minutes=10", "corpus.keyword_voices=3", "partition.heldout_speakers=0",
    "kmeans.clusters=50", "pretrain.layers=2", "pretrain.hidden_size=128", "pretrain.rounds=8",
    "pretrain.local_steps=8", "pretrain.batch_seconds=8", "pretrain.learning_rate=0.004", "pretrain.centralised=false",
    "pretrain.device=cpu", "pretrain.threads=1",
]  # fmt: skip
CAUSES = {
    "plateau": ["pretrain.unmasked_weight=0"],
    "shifted": [],
    "rate": ["pretrain.learning_rate=0.1"],
    "codebooks": ["pretrain.codebook=client"],
}
"""What is changed to put a cause in; for ``shifted`` the labels are moved against the audio."""
SHIFT = 10
"""Frames of 20 ms."""
STAGES = ("corpus", "partition", "kmeans")


def prepare(run: Path) -> Path:
    """Corpus, partition and targets of the study, in the folder ``run``."""
    study = studies.load(ROOT / "params" / "toy.yaml", STUDY, run.name)
    for stage in STAGES:
        _record(run, stage, getattr(study, stage))
    corpora.prepare(run, study.corpus)
    partition.assign(run, study.partition)
    with connect(run, "inprocess", "cpu") as clients:
        kmeans.run(run, study.kmeans, clients)
    return run


def train(prepared: Path, run: Path, *changes: str, shift: int = 0) -> Path:
    """Pretrain on what ``prepared`` holds, in the folder ``run``, with labels moved by ``shift`` frames."""
    for stage in STAGES:
        shutil.copytree(prepared / params.FOLDERS[stage], run / params.FOLDERS[stage])
    for path in run.glob("02_kmeans/clients/*/*/labels.bin") if shift else ():
        np.roll(np.fromfile(path, "<u2"), shift).tofile(path)
    p = studies.load(ROOT / "params" / "toy.yaml", [*STUDY, *changes], run.name).pretrain
    _record(run, "pretrain", p)
    pretraining.run(run, p)
    files.write_json(
        run / "03_pretrain" / "done.json", {"git": identity.git(), "identity": {"inputs": {}}, "outputs": ""}
    )
    files.write_json(run / "run.json", {"study": "curves"})
    return run


def _record(run: Path, stage: str, p: params.Section) -> None:
    path = run / params.FOLDERS[stage] / "params.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(p.model_dump()))


def make(folder: Path) -> dict[str, Path]:
    """The runs of this study by name: three seeds as they should be, and one with each cause; and their reference."""
    prepared = prepare(folder / "prepared")
    runs = {f"seed-{n}": train(prepared, folder / f"seed-{n}", f"pretrain.seed={n}") for n in range(3)}
    reference.write(reference.make(list(runs.values())), folder / "reference" / "curves.json")
    for cause, changes in CAUSES.items():
        runs[cause] = train(prepared, folder / cause, *changes, shift=SHIFT * (cause == "shifted"))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "curves", help="of the runs; must not exist")
    chosen = parser.parse_args()
    for name, run in make(chosen.folder).items():
        if name in ("seed-1", "seed-2"):  # they look like the first
            continue
        normal, _ = reference.of(run, "pretrain", chosen.folder / "reference")
        print(f"\n{name}\n{reference.verdict(run, 'pretrain', chosen.folder / 'reference')}")
        rows = files.read_rows(run / "03_pretrain" / "metrics.jsonl")
        figure = plots.curves(rows, (), recipes.clusters(run, "federated"), normal.curves["pretrain"])
        with files.atomic(ROOT / "docs" / "curves" / f"{name}.png") as temporary:
            # 64 colours make a quarter of the size
            Image.open(BytesIO(plots.png(figure))).convert("RGB").quantize(64).save(temporary, "png", optimize=True)


if __name__ == "__main__":
    main()
