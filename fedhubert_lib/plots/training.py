"""Training round by round, from the rows of metrics.jsonl, and its results beside their baselines."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedhubert_lib.plots import style

CLIENT_CURVES = 100
"""The most clients' curves that are drawn behind their mean."""


@style.styled
def curves(
    rows: Sequence[Mapping[str, Any]],
    centralised: Sequence[Mapping[str, Any]] = (),
    clusters: int | None = None,
    reference: Mapping[str, pd.DataFrame] | None = None,
) -> Figure:
    """Loss, accuracy on masked and unmasked frames, and cosine to the teacher's layers, as far as measured, over hours
    of speech heard; over rounds where clients do not say how much they heard.

    ``rows`` and ``centralised`` are those of metrics.jsonl. Thin: each client; thick: their mean, weighted by masked
    frames; dashed: training on the pooled data with the same number of updates; dotted, where ``clusters`` is given:
    guessing at random among them. ``reference``: by column a table of hours, mean and band (half its width), the grey
    band behind the curves.
    """
    rounds, clients, central = _rows(rows, "round"), _rows(rows, "client"), _rows(centralised, "round")
    kinds = _kinds({*rounds.columns, *central.columns})
    figure, axes = style.panels(1, len(kinds), width=11)
    heard = _add_hours(rounds, clients, central)
    along, unit = ("hours", "hours of speech heard") if heard else ("round", "round")
    for panel, (name, label, title) in zip(axes, kinds, strict=True):
        if reference and heard and name in reference:
            band = reference[name]
            edges = band["mean"] - band.band, band["mean"] + band.band
            panel.fill_between(band.hours, *edges, color=style.GREY, alpha=0.3, linewidth=0, label="reference")
        if name in clients:
            ids = clients.client.unique()
            ids = ids[np.linspace(0, len(ids) - 1, min(len(ids), CLIENT_CURVES)).astype(int)]
            lines = [table[[along, name]] for _, table in clients[clients.client.isin(ids)].groupby("client")]
            text = f"{len(ids)} of {clients.client.nunique():,} clients"
            panel.add_collection(LineCollection(lines, colors=style.SKY, linewidths=0.7, alpha=0.6, label=text))
            single = [line.iloc[0] for line in lines if len(line) == 1]  # of which there is no line yet
            panel.scatter([row[along] for row in single], [row[name] for row in single], s=3, color=style.SKY)
        for table, column, text, line in (
            (rounds, name, "mean", {"color": style.BLUE, "linewidth": 2}),
            (central, name, "centralised", {"color": style.RED, "linestyle": "--"}),
            (rounds, f"validation_{name}", "validation", {"color": style.GREEN}),
        ):
            if column in table:
                table = table if column == name else table.dropna(subset=[column])
                marker = "o" if len(table) <= style.NAMED else ""
                panel.plot(table[along], table[column], marker=marker, markersize=3, label=text, **line)
        if clusters is not None:
            guess = np.log(clusters) if name == "loss" else 1 / clusters
            panel.axhline(guess, color=style.BLACK, linestyle=":", label="guessing")
        if label == "accuracy":
            panel.yaxis.set_major_formatter(PercentFormatter(1))
        panel.set(xlabel=unit, ylabel=label, title=title)
        if not heard:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.autoscale_view()
    known = dict(pair for panel in axes for pair in zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    axes[0].legend(list(known.values()), list(known))  # a student's loss has no band, its accuracies may have one
    return figure


def _add_hours(rounds: pd.DataFrame, clients: pd.DataFrame, central: pd.DataFrame) -> bool:
    """Add the column hours, of speech that all have heard until then; False where that is not known."""
    tables = [table for table in (rounds, central) if len(table)]
    if not all("audio_seconds" in table and table.audio_seconds.notna().all() for table in tables):
        return False
    for table in tables:
        table["hours"] = table.audio_seconds.cumsum() / 3600
    if len(clients):  # of a round that is under way some are there already
        clients["hours"] = clients["round"].map(rounds.set_index("round").hours if len(rounds) else {})
    return True


def _kinds(measured: Collection[str]) -> list[tuple[str, str, str]]:
    """Name, axis label and title of the panels of what was ``measured``."""
    nats = not {"cosine", "label_loss", "divergence"} & set(measured)  # a student's loss is a sum of several
    kinds = [
        ("loss", f"loss ({'nats ' if nats else ''}per frame)", "Loss"),
        ("accuracy_masked", "accuracy", "Masked frames"),
        ("accuracy_unmasked", "accuracy", "Unmasked frames"),
        ("cosine", "cosine", "Teacher's layers"),
    ]
    return [kind for kind in kinds if kind[0] in measured]


@style.styled
def comparison(table: pd.DataFrame) -> Figure:
    """Training of several runs over hours of speech heard: panels of a stage in a row, a line per run and system.

    ``table`` has the columns stage, run, member, system, round, hours, measure (names of metrics.jsonl) and value. A
    line is the mean over the members of a run, its training seeds, and its band reaches from lowest to highest.
    Dashed: training on the pooled data.
    """
    table = table.assign(**table.measure.str.extract("(?P<prefix>validation_)?(?P<measure>.*)").fillna(""))
    stages = dict(list(table.groupby("stage", sort=False)))
    kinds = {
        stage: _kinds({*rows.measure, *["label_loss"] * (stage == "Distillation")}) for stage, rows in stages.items()
    }
    columns, runs = max(map(len, kinds.values())), list(table.run.unique())
    colours = dict(zip(runs, style.PALETTE[:6] * len(runs), strict=False))
    widths = dict(zip(runs, np.linspace(3.2, 1.2, len(runs)) if len(runs) > 1 else [1.6], strict=True))
    figure, axes = style.panels(len(stages), columns, width=11, height=0.4 + 2.8 * len(stages))
    for panels, (stage, rows) in zip(axes.reshape(-1, columns), stages.items(), strict=True):
        for panel, (name, label, title) in zip(panels, kinds[stage], strict=False):
            for (run, system), points in rows[rows.measure == name].groupby(["run", "system"], sort=False):
                by_round = points.groupby("round")
                hours, values = by_round.hours.mean(), by_round.value
                line, text = ("-", run) if system == "federated" else ("--", f"{run}, {system}")
                look = {"color": colours[run], "linewidth": widths[run]}  # of curves that are the same, all are seen
                look |= {"marker": "o", "markersize": 3} if len(hours) <= style.NAMED else {}
                panel.plot(hours, values.mean(), line, label=text, **look)
                panel.fill_between(hours, values.min(), values.max(), color=colours[run], alpha=0.15, linewidth=0)
            if label == "accuracy":
                panel.yaxis.set_major_formatter(PercentFormatter(1))
            label = rows.prefix.iloc[0].replace("_", " ") + label
            panel.set(xlabel="hours of speech heard", ylabel=label, title=f"{stage},\n{title.lower()}")
        for panel in panels[len(kinds[stage]) :]:
            panel.set_axis_off()
    if (members := table.groupby("run").member.nunique().max()) > 1:
        figure.supxlabel(f"line: mean of up to {members} training seeds, band: lowest to highest", fontsize=8)
    lines = {line.get_label(): line for panel in axes for line in panel.lines}
    figure.legend(list(lines.values()), list(lines), loc="outside upper left", ncols=min(len(lines), 6))
    return figure


@style.styled
def ledger(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Per round of metrics.jsonl: learning rate, norm of the aggregated update, speed, bytes moved so far, loss over
    these bytes, and peak memory."""
    rounds = _rows(rows, "round").set_index("round")
    before = _rows(rows, "sent").reindex(columns=["bytes_down", "bytes_up"]).sum()
    down, up = ((rounds[name].cumsum() + before[name]) / 1e6 for name in ("bytes_down", "bytes_up"))
    name = "validation_loss" if "validation_loss" in rounds else "loss"
    quality = rounds[name].dropna().rename(up + down)
    panels = (
        ("Clients' learning rate", "learning rate", rounds.learning_rate),
        ("Aggregated update", "L2 norm", rounds.update_norm),
        ("Speed", "audio seconds per second", rounds.audio_seconds_per_second),
        ("Bytes", "sent so far (MB)", up),
        ("Quality for bytes", name.partition("loss")[0].replace("_", " ") + _kinds(rounds)[0][1], quality),
        ("Peak memory of the server's process", "GiB", rounds.peak_memory_bytes / 2**30),
    )
    figure, axes = style.panels(2, 3, width=11, height=5)
    for panel, (title, label, values) in zip(axes, panels, strict=True):
        marker = "o" if len(values) <= style.NAMED else ""
        panel.plot(values, color=style.BLUE, marker=marker, markersize=3, label="to the server")
        panel.set(xlabel="round", ylabel=label, title=title)
        if values is quality:
            panel.set(xlabel="sent so far, both ways (MB)", xlim=(0, None))
            continue
        if values is up:
            panel.plot(down, color=style.ORANGE, linewidth=4, alpha=0.6, zorder=1, label="to clients")
            panel.legend()
        panel.set_ylim(0, None)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _rows(rows: Sequence[Mapping[str, Any]], kind: str) -> pd.DataFrame:
    """The rows of one kind, with NaN for a loss that a private study does not tell."""
    chosen = [row for row in rows if row["kind"] == kind]
    return pd.DataFrame([{key: np.nan if value is None else value for key, value in row.items()} for row in chosen])


@style.styled
def bars(table: pd.DataFrame) -> Figure:
    """A panel per measure, a bar per system with its interval.

    ``table`` has the columns system, measure and value and, where there are any, low and high (the interval) and
    baseline (such as chance), a dotted line across the system's bar. Systems and measures keep their order.
    """
    table = table.reindex(columns=["system", "measure", "value", "low", "high", "baseline"])
    measures, systems = list(table.measure.unique()), list(table.system.unique())
    columns = 2 if len(measures) == 4 else min(len(measures), 3)
    lines = -(-len(measures) // columns)
    figure, axes = style.panels(lines, columns, width=4 * columns, height=0.7 + lines * (0.6 + 0.27 * len(systems)))
    colours = dict(zip(systems, style.PALETTE[:-1] * len(systems), strict=False))
    for panel, measure in zip(axes, measures, strict=False):
        rows = table[table.measure == measure]
        place = np.arange(len(rows))
        panel.barh(place, rows.value, color=[colours[system] for system in rows.system], height=0.75, alpha=0.85)
        interval = np.array([rows.value - rows.low, rows.high - rows.value])
        panel.errorbar(rows.value, place, xerr=interval, fmt="none", color=style.BLACK, capsize=2)
        panel.vlines(rows.baseline, place - 0.45, place + 0.45, color=style.BLACK, linestyle=":", linewidth=1.5)
        panel.set_yticks(place, rows.system, fontsize=8)
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.set_title(textwrap.fill(measure, 34))
        if rows.value.between(0, 1).all():  # the interval of two seeds may reach beyond any fraction
            left, right = panel.get_xlim()
            panel.set_xlim(max(left, 0.0), min(right, 1.0))
    for panel in axes[len(measures) :]:
        panel.set_axis_off()
    return figure


@style.styled
def along(table: pd.DataFrame) -> Figure:
    """Quality over hours of speech heard, on a logarithmic axis: a panel per measure, a line per system.

    ``table`` has the columns run, system, measure, hours and value. A line is the mean over runs, its band reaches from
    the lowest run to the highest. A system without hours (NaN) does not train, and is a dotted line across.
    """
    measures, systems = list(table.measure.unique()), list(table.system.unique())
    trained = set(table.system[table.hours.notna()])
    systems.sort(key=lambda system: system not in trained)
    colours = dict(zip(systems, style.PALETTE[: len(trained)] + (style.GREY, style.BLACK), strict=False))
    rows = -(-len(measures) // 2)
    figure, axes = style.panels(rows, min(2, len(measures)), height=0.6 + 2.6 * rows)
    for panel, measure in zip(axes, measures, strict=False):
        for system, points in table[table.measure == measure].groupby("system", sort=False):
            if points.hours.isna().all():
                panel.axhline(points.value.mean(), color=colours[system], linestyle=":", label=system)
                continue
            # Runs of other seeds hear a little more or less until the same checkpoint, which is the n-th of each.
            points = points.assign(point=points.groupby("run").hours.rank()).groupby("point")
            hours, values = points.hours.mean(), points.value
            panel.plot(hours, values.mean(), marker="o", markersize=4, color=colours[system], label=system)
            panel.fill_between(hours, values.min(), values.max(), color=colours[system], alpha=0.2, linewidth=0)
        panel.set_xscale("log")
        panel.set(xlabel="hours of speech heard", ylabel=measure)
    for panel in axes[len(measures) :]:
        panel.set_axis_off()
    if (runs := table.run.nunique()) > 1:
        figure.supxlabel(f"line: mean of up to {runs} training seeds, band: lowest to highest", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure
