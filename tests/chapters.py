"""The notebooks, and what one chain of them changes of their own defaults."""

from pathlib import Path
from typing import Any

from fedhubert_lib import params

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {stage: ROOT / "notebooks" / f"{folder}.ipynb" for stage, folder in params.FOLDERS.items()}
OWN = ROOT / "notebooks" / "own_experiment.ipynb"
"""No stage: what a reader builds from the library's parts."""
INJECTED: dict[str, dict[str, Any]] = {
    "kmeans": {"codebooks": ["federated", "one-shot", "client", "aligned", "random-projection", "central"]},
    "pretrain": {"rounds": 3},
    "evaluate": {"seeds": 2, "probe_steps": 50},
}
