"""TensorBoard event files of curves and figures, below the folder that ``FEDHUBERT_TENSORBOARD`` names.

A line for each training (RUN/03_pretrain, RUN/03_pretrain/centralised ...) and each system of 05_evaluate. The variable
says how a stage runs: no result depends on it. ``files.events`` imports this module where it is set.
"""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedhubert_lib import params
from fedhubert_lib.records import RunError

VARIABLE = "FEDHUBERT_TENSORBOARD"


class Curve:
    """The event file of one line."""

    def __init__(self, place: Path, step: int) -> None:
        """For ``place``, a folder in that of a stage; what it had of ``step`` and later ones is void, as after a kill.

        Raises RunError where tensorboard is not installed.
        """
        check()
        from torch.utils.tensorboard import SummaryWriter

        stages = (path for path in (place, *place.parents) if re.fullmatch("0[0-9]_[a-z]+|own_experiment", path.name))
        stage = next(stages, place)
        root = params.ROOT / os.path.expanduser(os.environ[VARIABLE])
        self._writer = SummaryWriter(str(root / place.relative_to(stage.parent.parent)), purge_step=step)

    def add(self, values: Mapping[str, Any], step: int, time: float | None = None) -> None:
        """Write the numbers among ``values``, on disk when this returns; ``time`` is in seconds since 1970."""
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("round", "time"):
                self._writer.add_scalar(name, value, step, walltime=time)
        self._writer.flush()


def figures(stage: Path, best: Mapping[str, Mapping[str, Any]], along: Sequence[Mapping[str, Any]]) -> None:
    """The figures of 05_evaluate, a line for each system: over rounds if there are any, then those of the report.

    ``best`` is as of ``tables.best``, ``along`` the rows of the report.
    """
    for system, of_system in best.items():
        curve, rows = Curve(stage / system, 0), [row for row in along if row["system"] == system]
        for row in rows:
            curve.add({row["measure"]: row["value"]}, row["round"])
        last = max((row["round"] for row in rows), default=0)
        # Not of single layers: the best of them was chosen on test clips.
        curve.add({name: one["value"] for name, one in of_system.items() if not name.startswith("layer-")}, last)


def check() -> None:
    """Raise RunError where tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise RunError(f"{VARIABLE} is set, but tensorboard is not installed; run: make tensorboard, or unset it")
