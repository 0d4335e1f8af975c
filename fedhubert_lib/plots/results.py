"""What it is worth: figures beside their baselines, layers, words, what a student kept."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedhubert_lib.plots import style
from fedhubert_lib.plots.style import BLACK, BLUE, GREY, PALETTE, RED, styled


@styled
def bars(table: pd.DataFrame, title: str = "") -> Figure:
    """A panel per measure, a bar per system with its interval.

    ``table`` has the columns system, measure, value, low, high (the interval, or NaN) and baseline (chance or the
    shuffled figure, or NaN), drawn as a dotted line across the system's bar. Systems and measures keep their order. The
    axis of shares ends at 0 and 1, though an interval may not.
    """
    measures, systems = list(table.measure.unique()), list(table.system.unique())
    columns = 2 if len(measures) == 4 else min(len(measures), 3)
    lines = -(-len(measures) // columns)
    figure, places = style.panels(lines, columns, width=4 * columns, height=0.7 + lines * (0.6 + 0.27 * len(systems)))
    seen = [colour for colour in PALETTE if colour != BLACK]  # on which the interval is
    colours = dict(zip(systems, seen * len(systems), strict=False))
    for axes, measure in zip(places, measures, strict=False):
        own = table[table.measure == measure]
        at = np.arange(len(own))
        axes.barh(at, own.value, color=[colours[system] for system in own.system], height=0.75, alpha=0.85)
        error = np.array([own.value - own.low, own.high - own.value])
        axes.errorbar(own.value, at, xerr=error, fmt="none", color=BLACK, capsize=2)
        axes.vlines(own.baseline, at - 0.45, at + 0.45, color=BLACK, linestyle=":", linewidth=1.5)
        axes.set_yticks(at, own.system, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_title(measure)
        if own.value.between(0, 1).all():  # shares: an interval of two seeds may reach far beyond what there can be
            left, right = axes.get_xlim()
            axes.set_xlim(max(left, 0.0), min(right, 1.0))
    for axes in places[len(measures) :]:
        axes.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


@styled
def kept(quality: Mapping[str, float], cost: Mapping[str, float]) -> Figure:
    """What a student kept of its teacher's quality, and at what cost: each value is a share of the teacher's."""
    figure, [axes] = style.panels(width=7, height=0.9 + 0.3 * (len(quality) + len(cost)))
    shares, at = [*quality.values(), *cost.values()], np.arange(len(quality) + len(cost))
    axes.barh(at, shares, 0.7, color=[BLUE] * len(quality) + [RED] * len(cost))
    for place, share in zip(at, shares, strict=True):
        # Beside the frame, where no line crosses them.
        axes.text(1.01, place, f"{share:.0%}", va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.axvline(1, color=BLACK, linestyle=":")
    axes.set_yticks(at, [*quality, *cost])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="share of the teacher's", xlim=(0, 1.05 * max(1.0, *shares)))
    axes.set_title("Student against teacher: " + ("quality (blue), cost (red)" if quality else "cost"))
    return figure


@styled
def confusion(counts: np.ndarray, words: Sequence[str]) -> Figure:
    """Share of each true word's clips (rows of ``counts``) recognised as each word (columns)."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, [axes] = style.panels(width=7.2, height=6.4)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    style.ticks(axes.xaxis, words, rotation=90)
    style.ticks(axes.yaxis, words)
    axes.grid(visible=False)
    axes.set(xlabel="recognised as", ylabel="spoken", title=f"Words: {np.trace(counts) / counts.sum():.1%} right")
    figure.colorbar(image, ax=axes, label="share of the spoken word's clips", shrink=0.8)
    return figure


@styled
def layers(table: pd.DataFrame, label: str, baselines: Mapping[str, float] | None = None) -> Figure:
    """A measure per layer: ``table`` has a row per layer (index; 0 is the transformer's input), a column per model.

    ``baselines`` are drawn as dotted horizontal lines.
    """
    figure, [axes] = style.panels(width=8)
    for name, marker in zip(table.columns, "osD^vPX*" * len(table.columns), strict=False):
        own = table[name].dropna()
        axes.plot(own.index, own, marker=marker, markersize=4, label=name)
    for (name, value), colour in zip((baselines or {}).items(), (BLACK, GREY) * 4, strict=False):
        axes.axhline(value, color=colour, linestyle=":", label=name)
    axes.set(xlabel="layer (0: input of the transformer)", ylabel=label, title="Layer by layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper")
    return figure


@styled
def along(table: pd.DataFrame) -> Figure:
    """Quality over hours of speech heard, on a logarithmic axis: a panel per measure, a line per system.

    ``table`` has the columns run, system, measure, hours and value. A line is the mean over runs, its band reaches from
    the lowest run to the highest. What has no hours (NaN) does not train, and is a dotted line across.
    """
    measures = list(table.measure.unique())
    systems = list(table.system.unique())
    colours = dict(zip(systems, (BLUE, RED, GREY, BLACK, *PALETTE[2:6]), strict=False))
    rows = -(-len(measures) // 2)
    figure, places = style.panels(rows, min(2, len(measures)), width=8, height=0.6 + 2.6 * rows)
    for axes, measure in zip(places, measures, strict=False):
        for system, own in table[table.measure == measure].groupby("system", sort=False):
            if own.hours.isna().all():
                axes.axhline(own.value.mean(), color=colours[system], linestyle=":", label=system)
                continue
            # Runs of other seeds hear a little more or less until the same checkpoint, which is the n-th of each.
            points = own.assign(point=own.groupby("run").hours.rank()).groupby("point")
            hours, values = points.hours.mean(), points.value
            axes.plot(hours, values.mean(), marker="o", markersize=4, color=colours[system], label=system)
            axes.fill_between(hours, values.min(), values.max(), color=colours[system], alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        axes.set(xlabel="hours of speech heard", ylabel=measure)
    for axes in places[len(measures) :]:
        axes.set_axis_off()
    if (runs := table.run.nunique()) > 1:
        figure.supxlabel(f"line: mean of {runs} training seeds, band: lowest to highest", fontsize=8)
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure
