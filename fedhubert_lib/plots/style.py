"""The style of all figures: colours, sizes, files; and the parts that several of them draw."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import XAxis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from fedhubert_lib.files import atomic

BLUE, RED, GREEN, ORANGE, SKY, PURPLE, GREY, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#7F7F7F", "#000000",
)  # fmt: skip
STYLE: dict[Any, Any] = {
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
NAMED = 40
"""The most clients, clusters or words that are drawn with a name for each."""

styled = matplotlib.rc_context(STYLE)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@styled
def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``figure`` atomically as NAME.png and NAME.svg in ``folder``."""
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        with atomic(folder / f"{name}{suffix}") as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
        figure.set_layout_engine("none")  # the second file has the first one's layout; working it out takes time


@styled
def panels(
    rows: int = 1, columns: int = 1, *, width: float = 8, height: float = 3, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A Figure of ``width`` x ``height`` inches and its axes as a flat array."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def ticks(axis: matplotlib.axis.Axis, names: Sequence[Any] | np.ndarray, rotation: float | None = None) -> None:
    """A tick per name up to ``NAMED`` names; beyond, about ten."""
    if len(names) > NAMED:
        axis.set_major_locator(MaxNLocator(10, integer=True))
        axis.set_tick_params(labelrotation=90 if isinstance(axis, XAxis) and len(str(names[0])) > 6 else 0)
        axis.set_major_formatter(lambda place, _: str(names[int(place)]) if 0 <= place < len(names) else "")
        return
    names = [str(name) for name in names]
    if rotation is None:
        rotation = 90 if isinstance(axis, XAxis) and (len(names) > 8 or max(map(len, names)) > 6) else 0
    axis.set_ticks(np.arange(len(names)), names, rotation=rotation, fontsize=7 if len(names) > 12 else 8)


def heat_map(axes: Axes, table: pd.DataFrame, rotation: float | None = None, **options: Any) -> AxesImage:
    """``table`` as an image with its index and columns as ticks."""
    image = axes.imshow(table, **({"aspect": "auto", "cmap": "Blues", "interpolation": "nearest"} | options))
    ticks(axes.xaxis, table.columns, rotation)
    ticks(axes.yaxis, table.index)
    axes.grid(visible=False)
    return image
