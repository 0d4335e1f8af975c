"""The notebooks: one for each stage, in order, and one for experiments of one's own."""

from pathlib import Path

from fedhubert_lib import params

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {stage: ROOT / "notebooks" / f"{folder}.ipynb" for stage, folder in params.FOLDERS.items()}
OWN = ROOT / "notebooks" / "own_experiment.ipynb"
"""No stage: what a reader builds from the library's parts."""
