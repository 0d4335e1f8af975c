"""One style for all pictures: colours, sizes, files; and the few things that several of them draw."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedhubert_lib.files import atomic

BLUE, RED, GREEN, ORANGE, SKY, PURPLE, GREY, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#7F7F7F", "#000000",
)  # fmt: skip
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=PALETTE),
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "fedhubert",  # the same figure gives the same file
}
READABLE = 40
"""More clients, clusters or words than this are drawn without a name for each."""

styled = matplotlib.rc_context(STYLE)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@styled
def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``figure`` as NAME.png and NAME.svg in ``folder``, whole or not at all."""
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        with atomic(folder / f"{name}{suffix}") as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
        figure.set_layout_engine("none")  # the second file has the first one's layout; working it out takes time


def panels(
    rows: int = 1, columns: int = 1, *, width: float = 8, height: float = 3, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A Figure of ``width`` x ``height`` inches and its axes as a flat array."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def duration(hours: np.ndarray) -> tuple[np.ndarray, str]:
    """Hours, or minutes where no value reaches two hours, and the unit's name."""
    return (hours, "hours") if np.max(hours) >= 2 else (hours * 60, "minutes")


def columns(
    axes: Axes, heights: np.ndarray, colour: str, bottoms: np.ndarray | float = 0.0, alpha: float = 1.0
) -> None:
    """Bars from ``bottoms`` to ``heights``; where they are too many to be told apart, one filled outline."""
    if len(heights) <= READABLE:
        axes.bar(np.arange(len(heights)), heights - bottoms, 0.8, bottoms, color=colour, alpha=alpha)
    else:
        axes.fill_between(np.arange(len(heights)), bottoms, heights, step="mid", color=colour, alpha=alpha, linewidth=0)


def ticks(
    axis: matplotlib.axis.Axis, names: Sequence[Any], rotation: float | None = None, most: int = READABLE
) -> None:
    """A tick per name while they are not more than ``most``; else about ten numbered ticks."""
    if len(names) > most:
        axis.set_major_locator(MaxNLocator(10, integer=True))
        return
    names = [str(name) for name in names]
    if rotation is None:
        rotation = 90 if axis.axis_name == "x" and (len(names) > 8 or max(map(len, names)) > 6) else 0
    axis.set_ticks(np.arange(len(names)), names, rotation=rotation, fontsize=7 if len(names) > 12 else 8)
