"""Figures of the study toy that every version of the library has to reach, and digests that a refactoring keeps.

``python tests/golden.py digests outputs/toy`` prints a digest of each file of weights and codebooks, to be compared on
one machine before and after a change. ``python tests/golden.py figures outputs/toy`` takes the golden figures from a
run, where a change of the recipe moves them on purpose.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.numpy import load_file

from fedhubert_lib import files
from fedhubert_lib.evaluation import tables

GOLDEN = Path(__file__).with_name("golden.json")
MEASURES = ("pnmi", "phone-accuracy", "keyword-accuracy")


def figures(run: Path) -> dict[str, dict[str, float]]:
    """Losses of the first and last rounds, and each measure at its best layer, by system."""
    losses: dict[str, float] = {}
    for folder in ("03_pretrain", "03_pretrain/centralised", "04_distill", "04_distill/centralised"):
        rows = [row for row in files.read_rows(run / folder / "metrics.jsonl") if row["kind"] == "round"]
        losses |= {f"{folder}, round {row['round']}": row["loss"] for row in (rows[0], rows[-1])}
    result = {"loss": losses}
    best = tables.best(tables.read(run)["figures"])
    for measure in MEASURES:
        result[measure] = {system: figures[measure]["value"] for system, figures in best.items() if measure in figures}
    return result


def digests(run: Path) -> Iterator[tuple[str, str]]:
    """(file, digest of its tensors' names, types and bytes) of what the stages of ``run`` ended with."""
    for path in sorted(run.glob("[0-9]*/**/*.safetensors")):
        place = path.relative_to(run)
        if not {"clients", "checkpoints"} & set(place.parts):
            total = hashlib.sha256()
            for name, array in sorted(load_file(path).items()):
                total.update(f"{name} {array.dtype}".encode() + array.tobytes())
            yield place.as_posix(), total.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["digests", "figures"])
    parser.add_argument("run", type=Path, help="outputs/toy, finished")
    chosen = parser.parse_args()
    if chosen.what == "digests":
        for place, digest in digests(chosen.run):
            print(digest, place)
    else:
        golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
        for name, values in figures(chosen.run).items():
            golden[name]["figures"] = {key: round(value, 4) for key, value in values.items()}
        GOLDEN.write_text(json.dumps(golden, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
