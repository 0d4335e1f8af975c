"""Objectives of distillation at equal updates and over training seeds, on the teacher of a finished run.

    python benchmarks/study_objectives.py RUN --study params/quickstart.yaml [--objectives labels] [--seeds 3]

RUN is a folder under outputs/ in which 03_pretrain is done. Each objective and seed gets a run of its own below --out,
which links to the stages of RUN: the student is trained (federated, and on the pooled data unless the study says
otherwise) and evaluated. ``labels`` is the control: HuBERT on the labels of k-means, without a teacher. What is done
is not done again. The table, in Markdown, has means and standard deviations over training seeds.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedhubert_lib import distillation, params, pooled, runs, studies
from fedhubert_lib.evaluation import report, tables
from fedhubert_lib.federated import rounds
from fedhubert_lib.kmeans import targets

LABELS = {"soft_weight": 0.0, "label_weight": 1.0}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "soft-targets": {"objectives": ["soft-targets"], "soft_weight": 0.7, "label_weight": 0.3},
    "distilhubert": {"objectives": ["distilhubert"]},
    "hubert": {"objectives": ["hubert"]},
    "labels": LABELS | {"objectives": ["soft-targets"]},
    "labels and layers": LABELS | {"objectives": ["soft-targets", "distilhubert"]},
}
MEASURES = ("keyword-accuracy", "phone-accuracy", "pnmi")
SYSTEMS = ("student", "centralised-student", "teacher", "random", "mfcc")


def student(base: Path, folder: Path, distill: params.Distill, evaluate: params.Evaluate) -> dict[str, Any]:
    """Train a student of ``base``'s teacher in ``folder`` and evaluate it; the report.

    Raises CheckpointError where ``folder`` holds a student of other parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ("00_corpus", "01_partition", "02_kmeans", "03_pretrain"):
        if not (folder / stage).exists():
            (folder / stage).symlink_to((base / stage).resolve())
    with rounds.connected(folder, distill) as clients:
        if "hubert" in distill.objectives:
            targets.run(folder, distill, clients)
        distillation.run(folder, distill, clients=clients)
    if distill.centralised:
        pooled.train(folder, distill)
    if not (folder / "05_evaluate" / "report.json").exists():
        report.run(folder, evaluate)
    return tables.read(folder)


def best(report: dict[str, Any]) -> pd.Series:
    """The value of each system and measure at its best layer, as in the bench's own tables; NaN where there is none."""
    chosen = tables.best(report["figures"])
    values = {(s, m): chosen.get(s, {}).get(m, {}).get("value", np.nan) for s in SYSTEMS for m in MEASURES}
    return pd.Series(values)


def main() -> None:
    """Train and evaluate what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder under outputs/ whose teacher the students learn from")
    parser.add_argument("--study", type=Path, required=True, help="file that the run was made with")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of each objective")
    parser.add_argument("--set", nargs="*", default=[], dest="changes", help="parameters that differ: distill.rounds=6")
    parser.add_argument("--out", type=Path, default=runs.outputs() / "study_objectives")
    options = parser.parse_args()
    study, rows = studies.load(options.study, options.changes), {}
    for seed in range(study.distill.seed, study.distill.seed + options.seeds):
        for name in options.objectives:
            folder = options.out / f"{options.run}-{name}-{seed}"
            distill = study.distill.model_copy(update={**OBJECTIVES[name], "seed": seed})
            rows[name, seed] = best(student(runs.outputs() / options.run, folder, distill, study.evaluate))
            print(folder, flush=True)
    groups = pd.DataFrame(rows).T.groupby(level=0, sort=False)
    cells = groups.mean().map("{:.3f}".format) + " ± " + groups.std().map("{:.3f}".format)
    table = cells.stack(0, future_stack=True)
    table.index = [", ".join(names) for names in table.index]
    print("\n" + tables.markdown(table, "objective, system"))


if __name__ == "__main__":
    main()
