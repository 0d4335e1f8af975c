"""Training, round by round, from the rows of metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedhubert_lib.plots import style
from fedhubert_lib.plots.style import BLACK, BLUE, GREEN, ORANGE, READABLE, RED, SKY, styled

CURVES = 100
"""At most so many clients' curves are drawn behind the mean."""


@styled
def curves(
    rows: Sequence[Mapping[str, Any]], centralised: Sequence[Mapping[str, Any]] = (), clusters: int | None = None
) -> Figure:
    """Loss, and per round what else was measured: accuracy on masked and unmasked frames, or the cosine between the
    teacher's layers and what a student (``distilhubert``, which names no clusters) predicts of them.

    ``rows`` and ``centralised`` are those of metrics.jsonl. Thin: each client; thick: their mean, weighted by masked
    frames; dashed: training on the pooled data with the same number of updates; dotted, where ``clusters`` is given:
    guessing at random among so many.
    """
    rounds, each, central = _rows(rows, "round"), _rows(rows, "client"), _rows(centralised, "round")
    measured = {*rounds.columns, *central.columns}
    unit = "nats per frame" if "accuracy_masked" in measured else "per frame"
    panels = [
        ("loss", "validation_loss", f"loss ({unit})", "Loss"),
        ("accuracy_masked", "validation_accuracy_masked", "accuracy", "Masked frames"),
        ("accuracy_unmasked", None, "accuracy", "Unmasked frames"),
        ("cosine", "validation_cosine", "cosine", "Teacher's layers, predicted"),
    ]
    panels = [panel for panel in panels if panel[0] in measured]
    figure, places = style.panels(1, len(panels), width=11, height=3)
    for axes, (name, validation, label, title) in zip(places, panels, strict=True):
        if name in each:
            ids = each.client.unique()
            chosen = ids[np.linspace(0, len(ids) - 1, min(len(ids), CURVES)).astype(int)]
            shown = each[each.client.isin(chosen)].groupby("client")
            lines = [group[["round", name]].to_numpy() for _, group in shown]
            text = "each client" if len(chosen) == len(ids) else f"{len(chosen)} of {len(ids):,} clients"
            axes.add_collection(LineCollection(lines, colors=SKY, linewidths=0.7, alpha=0.6, label=text))
        marker = "o" if len(rounds) <= READABLE else ""
        if name in rounds:
            axes.plot(rounds["round"], rounds[name], color=BLUE, linewidth=2, marker=marker, markersize=3, label="mean")
        if name in central:
            axes.plot(central["round"], central[name], color=RED, linestyle="--", label="centralised")
        if validation in rounds:
            held = rounds.dropna(subset=[validation])
            axes.plot(held["round"], held[validation], color=GREEN, marker=marker, markersize=3, label="validation")
        if clusters is not None:
            guess = np.log(clusters) if name == "loss" else 1 / clusters
            axes.axhline(guess, color=BLACK, linestyle=":", label="guessing")
        if label == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="round", ylabel=label, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.autoscale_view()
    places[0].legend()
    return figure


@styled
def ledger(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Per round of metrics.jsonl: learning rate, norm of the aggregated update, speed, bytes moved so far, the loss
    that they bought, and peak memory."""
    rounds = _rows(rows, "round")
    figure, (rate, norm, speed, sent, bought, memory) = style.panels(2, 3, width=11, height=5)
    at, marker = rounds["round"], "o" if len(rounds) <= READABLE else ""
    line = {"color": BLUE, "marker": marker, "markersize": 3}
    rate.plot(at, rounds.learning_rate, **line)
    rate.set(ylabel="learning rate", title="Clients' learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    norm.plot(at, rounds.update_norm, **line)
    norm.set(ylabel="L2 norm", title="Aggregated update", ylim=(0, None))
    speed.plot(at, rounds.audio_seconds_per_second, **line)
    speed.set(ylabel="audio seconds per second", title="Speed", ylim=(0, None))
    behind = line | {"color": ORANGE, "linewidth": 4, "alpha": 0.6}
    sent.plot(at, rounds.bytes_down.cumsum() / 1e6, **behind, label="to clients")
    sent.plot(at, rounds.bytes_up.cumsum() / 1e6, **line, label="to the server")
    sent.set(ylabel="sent so far (MB)", title="Bytes", ylim=(0, None))
    sent.legend()
    loss = "validation_loss" if "validation_loss" in rounds else "loss"
    held = rounds.assign(sent=(rounds.bytes_up + rounds.bytes_down).cumsum() / 1e6).dropna(subset=[loss])
    bought.plot(held.sent, held[loss], **line)
    bought.set(xlabel="sent so far, both ways (MB)", title="Quality for bytes", xlim=(0, None))
    unit = "nats per frame" if "accuracy_masked" in rounds else "per frame"
    bought.set_ylabel(f"{loss.replace('_', ' ')} ({unit})")
    memory.plot(at, rounds.peak_memory_bytes / 2**30, **line)
    memory.set(ylabel="GiB", title="Peak memory of the server's process", ylim=(0, None))
    for axes in (rate, norm, speed, sent, memory):
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _rows(rows: Sequence[Mapping[str, Any]], kind: str) -> pd.DataFrame:
    """The rows of one kind; of a round that was done again after a restart, the last."""
    chosen = [row for row in rows if row["kind"] == kind]
    # A round of a private study may tell no loss.
    table = pd.DataFrame([{key: np.nan if value is None else value for key, value in row.items()} for row in chosen])
    return table.drop_duplicates(["round", "client"][: 1 + (kind == "client")], keep="last") if len(table) else table
