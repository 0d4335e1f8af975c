"""Pictures: data in, a matplotlib Figure out.

Every function is pure: it makes a Figure of its own, without pyplot and its global state, so it works the same in a
notebook, in a script and on a headless node. Colours are those of Okabe and Ito, told apart by colour-blind readers;
axes carry their units. ``save`` writes a figure as PNG and SVG; display.py shows it in a notebook.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torchaudio.compliance.kaldi import fbank

from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD, SAMPLE_RATE
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
CURVES = 100
"""At most so many clients' curves are drawn behind the mean."""

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


# ---------------------------------------------------------------------------------------------- corpus and partition


@styled
def utterance_lengths(manifest: pd.DataFrame) -> Figure:
    """Histogram of utterance lengths in seconds, a line per split of the manifest."""
    figure, [axes] = _figure(width=6)
    seconds = manifest.samples / manifest.sample_rate
    bins = np.linspace(0, seconds.max(), 31)
    for split in sorted(manifest.split.unique(), reverse=True):  # train, test
        own = seconds[manifest.split == split]
        axes.hist(own, bins, histtype="step", linewidth=1.6, label=f"{split}: {len(own):,} utterances")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="length of an utterance (s)", ylabel="utterances", title="Utterance lengths")
    axes.legend()
    return figure


@styled
def speakers(manifest: pd.DataFrame) -> Figure:
    """Speech per speaker, longest first, coloured by sex."""
    table = manifest.assign(hours=manifest.samples / manifest.sample_rate / 3600)
    table = table.groupby(["speaker", "sex"], as_index=False).hours.sum().sort_values("hours", ascending=False)
    figure, [axes] = _figure(width=8)
    amount, unit = _duration(table.hours.to_numpy())
    colours = table.sex.map({"F": RED, "M": BLUE}).fillna(GREY)
    for colour in colours.unique():
        _bars(axes, np.where(colours == colour, amount, 0), colour)
    _names(axes.xaxis, table.speaker)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="speaker, longest first", ylabel=f"speech ({unit})", title="Speech per speaker")
    for sex, colour, name in (("F", RED, "female"), ("M", BLUE, "male")):
        if (table.sex == sex).any():
            axes.bar(0, 0, color=colour, label=f"{name}: {(table.sex == sex).sum():,} speakers")
    if not table.sex.isin(["F", "M"]).all():
        axes.bar(0, 0, color=GREY, label="sex not recorded")
    axes.legend()
    return figure


@styled
def phone_lengths(phones: pd.DataFrame) -> Figure:
    """How often each phone occurs, and how long it lasts (median, and the middle half)."""
    milliseconds = (phones.end_sample - phones.start_sample) * (1000 / SAMPLE_RATE)
    quartiles = milliseconds.groupby(phones.phone).quantile([0.25, 0.5, 0.75]).unstack()
    share = phones.phone.value_counts(normalize=True)
    order, place = share.index, np.arange(len(share))
    figure, (top, bottom) = _figure(2, 1, width=9, height=4.2, sharex=True)
    top.bar(place, share, color=BLUE)
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    top.set(ylabel="share of phones", title="Phones: how often, and how long")
    low, middle, high = (quartiles.loc[order, q].to_numpy() for q in (0.25, 0.5, 0.75))
    bottom.errorbar(place, middle, [middle - low, high - middle], fmt="o", color=RED, markersize=3)
    bottom.axhline(1000 * HOP / SAMPLE_RATE, color=BLACK, linestyle=":", label="one frame, 20 ms")
    bottom.set(ylabel="length (ms)", xlabel="phone, most frequent first", ylim=(0, None))
    bottom.set_xticks(place, order, fontsize=7)
    bottom.set_xlim(-0.7, len(order) - 0.3)
    bottom.legend()
    return figure


@styled
def clients(table: pd.DataFrame, owned: pd.DataFrame) -> Figure:
    """What each client holds: speech, speakers, and the spread of its utterance lengths.

    ``table`` is 01_partition/clients.parquet; ``owned`` has a row per utterance: client, samples, sample_rate.
    """
    figure, (first, second, third) = _figure(1, 3, width=11, height=3)
    amount, unit = _duration(table.hours.to_numpy())
    _bars(first, amount, BLUE)
    first.set(ylabel=f"speech ({unit})", title="Speech per client")
    _bars(second, table.speakers.to_numpy(), GREEN)
    second.yaxis.set_major_locator(MaxNLocator(integer=True))
    second.set(ylabel="speakers", title="Speakers per client")
    lengths = (owned.samples / owned.sample_rate).groupby(owned.client)
    quantiles = lengths.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack().loc[table.client].to_numpy().T
    _bars(third, quantiles[4], SKY, quantiles[0], alpha=0.4)
    _bars(third, quantiles[3], SKY, quantiles[1])
    third.plot(quantiles[2], "_", color=BLACK, markersize=4)
    third.set(ylabel="utterance length (s)", title="Lengths: median, 50 % and 90 %", ylim=(0, None))
    for axes in (first, second, third):
        _names(axes.xaxis, table.client)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("client")
    return figure


@styled
def partition_schemes(schemes: Mapping[str, pd.DataFrame], summaries: Mapping[str, str] | None = None) -> Figure:
    """Partition schemes side by side: speech per client, whose speech it is, and how much of it is female.

    Each table has a row per utterance with client, speaker, sex, samples and sample_rate; a summary is one line of text
    under the scheme's name.
    """
    count = len(schemes)
    figure, places = _figure(3, count, width=2.3 + 2.2 * count, height=6.2, sharey="row", height_ratios=[1, 1.4, 0.8])
    hours = {
        name: table.assign(hours=table.samples / table.sample_rate / 3600).pivot_table(
            values="hours", index="client", columns="speaker", aggfunc="sum", fill_value=0
        )
        for name, table in schemes.items()
    }
    women = pd.concat(schemes.values()).drop_duplicates("speaker").query("sex == 'F'").speaker
    _, unit = _duration(np.concatenate([table.sum(axis=1) for table in hours.values()]))
    for column, (scheme, table) in enumerate(hours.items()):
        top, middle, bottom = places[column::count]
        table = table.iloc[np.argsort(-table.sum(axis=1).to_numpy(), kind="stable")]
        amount, share = table.sum(axis=1), table.div(table.sum(axis=1), axis=0)
        _bars(top, amount.to_numpy() * (1 if unit == "hours" else 60), BLUE)
        top.set_title(scheme + (f"\n{summaries[scheme]}" if summaries else ""))
        # Speakers in the order of the clients that hold them: whole speakers give a staircase, IID gives a wash.
        order = np.lexsort((-share.to_numpy().max(0), share.to_numpy().argmax(0)))
        image = middle.imshow(
            share.iloc[:, order].T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
        )
        _bars(bottom, share.loc[:, share.columns.isin(women)].sum(axis=1).to_numpy(), RED)
        bottom.axhline(table.loc[:, table.columns.isin(women)].sum(axis=None) / amount.sum(), color=BLACK, ls=":")
        for axes in (top, middle, bottom):
            axes.grid(visible=axes is not middle, axis="y")
            axes.set_xticks([] if axes is not bottom else [0, len(table) - 1])
            axes.set_xlim(-0.6, len(table) - 0.4)
        bottom.set(xlabel="client, largest first", ylim=(0, 1))
    places[0].set_ylabel(f"speech ({unit})")
    places[count].set_ylabel("speaker")
    places[2 * count].set_ylabel("share of women's\nspeech")
    places[2 * count].yaxis.set_major_formatter(PercentFormatter(1))
    figure.colorbar(image, ax=list(places[count : 2 * count]), label="share of the client's speech", pad=0.01)
    return figure


# ------------------------------------------------------------------------------------------------- units and phones


@styled
def aligned_units(
    waveform: torch.Tensor,
    phones: pd.DataFrame | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
    mask: np.ndarray | None = None,
) -> Figure:
    """A spectrogram, and under it on the same time axis the phones and each codebook's frame labels.

    ``waveform`` [samples] at 16 kHz; ``phones`` has start_sample, end_sample, phone; ``labels`` maps the name of a
    codebook to its labels [frames] at 50 Hz, each drawn 20 ms wide around the centre of its frame. Where ``mask``
    [frames] is true the spectrogram is veiled.
    """
    strips = ([] if phones is None or phones.empty else [("phones", *_phone_runs(phones))]) + [
        (name, *_label_runs(np.asarray(units))) for name, units in (labels or {}).items()
    ]
    figure, axes = _figure(
        1 + len(strips), 1, width=11, height=2.4 + 0.42 * len(strips), sharex=True,
        height_ratios=[4] + [0.8] * len(strips),
    )  # fmt: skip
    seconds = len(waveform) / SAMPLE_RATE
    window = torch.hann_window(RECEPTIVE_FIELD)
    spectrum = torch.stft(waveform.float(), 512, HOP // 2, RECEPTIVE_FIELD, window, return_complex=True)
    decibels = 10 * torch.log10(spectrum.abs().square() + 1e-10)
    extent = (0, seconds, 0, SAMPLE_RATE / 2000)
    axes[0].imshow(
        decibels.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=float(decibels.max()) - 80
    )
    axes[0].grid(visible=False)
    axes[0].set_ylabel("frequency (kHz)")
    if mask is not None:
        starts, widths, texts, _ = _label_runs(mask.astype(int))
        for start, width, text in zip(starts, widths, texts, strict=True):
            if text == "1":
                axes[0].axvspan(start, start + width, color="white", alpha=0.75, linewidth=0)
    for strip, (name, starts, widths, texts, colours) in zip(axes[1:], strips, strict=True):
        strip.barh(0, widths, 1, starts, color=colours, edgecolor="white", linewidth=0.5)
        for start, width, text in zip(starts, widths, texts, strict=True):
            if width > seconds / 140 * len(text):  # only where it fits
                strip.text(start + width / 2, 0, text, ha="center", va="center_baseline", fontsize=6.5)
        strip.set_ylabel(name, rotation=0, ha="right", va="center")
        strip.set(yticks=[], ylim=(-0.5, 0.5))
        strip.grid(visible=False)
        strip.spines[:].set_visible(False)
    axes[-1].set(xlabel="time (s)", xlim=(0, seconds))
    return figure


def _phone_runs(phones: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, list[str], list[Any]]:
    starts = phones.start_sample.to_numpy() / SAMPLE_RATE
    widths = phones.end_sample.to_numpy() / SAMPLE_RATE - starts
    return starts, widths, list(phones.phone), ["#D9D9D9" if i % 2 else "#EFEFEF" for i in range(len(phones))]


def _label_runs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str], list[Any]]:
    first = np.flatnonzero(np.diff(labels, prepend=-1))
    frames = np.diff(first, append=len(labels))
    half = (RECEPTIVE_FIELD - HOP) / 2
    starts = (first * HOP + half) / SAMPLE_RATE
    hues = labels[first] * 0.618 % 1  # neighbouring ids get far-apart hues
    colours = 0.35 * matplotlib.colormaps["turbo"](hues)[:, :3] + 0.65  # pale, so that the id can be read on it
    return starts, frames * HOP / SAMPLE_RATE, [str(label) for label in labels[first]], list(colours)


@styled
def inertia(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean squared distance of a frame to its centroid per Lloyd round, a line per codebook of metrics.jsonl."""
    table = pd.DataFrame([row for row in rows if row["kind"] == "lloyd"])
    figure, [axes] = _figure(width=5)
    for name, own in table.groupby("codebook"):
        axes.plot(own["round"], own.inertia, marker="o", markersize=3, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="Lloyd round", ylabel="squared distance per frame", title="Distance of frames to their centroids")
    axes.legend()
    return figure


@styled
def cluster_sizes(counts: Mapping[str, np.ndarray]) -> Figure:
    """Share of the frames in each cluster, largest first; ``counts`` maps a codebook's name to frames per cluster."""
    figure, [axes] = _figure(width=6.5)
    clusters = max(len(values) for values in counts.values())
    for (name, values), marker in zip(counts.items(), "osD^vPX*" * len(counts), strict=False):
        values = np.sort(values)[::-1] / np.sum(values)
        used = np.count_nonzero(values)
        axes.plot(np.arange(1, len(values) + 1), values, label=f"{name}: {used} of {len(values)} used", linewidth=1.2,
                  marker=marker if clusters <= READABLE else "", markersize=4)  # fmt: skip
    axes.axhline(1 / clusters, color=BLACK, linestyle=":", label="all of one size")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="cluster, largest first", ylabel="share of frames", title="Cluster sizes", ylim=(0, None))
    axes.legend()
    return figure


@styled
def projection(frames: np.ndarray, labels: np.ndarray) -> Figure:
    """Frames [N, D] on their first two principal components, the seven largest clusters in colour."""
    centred = frames - frames.mean(0)
    _, scale, axes_of_variance = np.linalg.svd(centred, full_matrices=False)
    points = centred @ axes_of_variance[:2].T
    share = scale[:2] ** 2 / np.sum(scale**2)
    figure, [axes] = _figure(width=5.5, height=4.5)
    axes.scatter(*points.T, s=3, color="#D5D5D5", linewidths=0, rasterized=True)
    largest = np.argsort(-np.bincount(labels))[:7]
    for cluster, colour in zip(largest[np.isin(largest, labels)], (*PALETTE[:6], BLACK), strict=False):
        own = points[labels == cluster]
        axes.scatter(*own.T, s=5, color=colour, linewidths=0, alpha=0.6, rasterized=True)
        axes.text(*np.median(own, 0), str(cluster), weight="bold", color=colour, ha="center", va="center",
                  bbox={"boxstyle": "circle", "facecolor": "white", "edgecolor": colour})  # fmt: skip
    axes.set(
        xlabel=f"first component ({share[0]:.0%} of the variance)",
        ylabel=f"second component ({share[1]:.0%} of the variance)",
        title=f"{len(frames):,} frames; the {len(largest)} largest clusters in colour",
    )
    return figure


@styled
def phones_per_cluster(counts: pd.DataFrame) -> Figure:
    """P(phone | cluster) as a heat map; ``counts`` holds frames, phones as rows and clusters as columns.

    Phones run from the most frequent down, clusters by their most likely phone (as in the HuBERT paper's figure 2):
    the better the units, the sharper the staircase.
    """
    counts = counts.loc[counts.sum(axis=1).sort_values(ascending=False).index]
    share = (counts / counts.sum()).loc[:, counts.sum() > 0]
    best = share.to_numpy().argmax(0)
    share = share.iloc[:, np.lexsort((-share.to_numpy().max(0), best))]
    figure, [axes] = _figure(width=10, height=1.5 + 0.11 * len(share))
    image = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    axes.set_yticks(np.arange(len(share)), share.index, fontsize=6.5)
    _names(axes.xaxis, share.columns, rotation=0)
    axes.grid(visible=False)
    axes.set(xlabel="cluster, by its most likely phone", ylabel="phone, most frequent first")
    axes.set_title("Phones in each cluster")
    figure.colorbar(image, ax=axes, label="P(phone | cluster)", pad=0.01)
    return figure


@styled
def cluster_spectra(waveforms: Sequence[torch.Tensor], labels: Sequence[np.ndarray], clusters: int) -> Figure:
    """What each cluster sounds like: the mean kaldi log-mel spectrum of its frames, less that of all frames.

    ``labels`` [frames] at 50 Hz belong to ``waveforms`` [samples], one by one. Clusters without a frame are left out.
    """
    bins = 40
    total, frames = np.zeros((clusters, bins)), np.zeros(clusters, int)
    for waveform, own in zip(waveforms, labels, strict=True):
        # kaldi scales samples as 16-bit integers; its frames come every 10 ms, the labels every 20 ms
        spectra = fbank(waveform[None].float() * 2**15, num_mel_bins=bins, sample_frequency=SAMPLE_RATE)[::2].numpy()
        np.add.at(total, own, spectra[: len(own)])
        frames += np.bincount(own, minlength=clusters)
    used = np.flatnonzero(frames)
    mean = total[used] / frames[used, None]
    relative = mean - total.sum(0) / frames.sum()
    gravity = np.exp(mean) @ np.arange(bins) / np.exp(mean).sum(axis=1)
    order = np.argsort(gravity)
    figure, [axes] = _figure(width=10, height=3)
    limit = np.abs(relative).max()
    image = axes.imshow(relative[order].T, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    _names(axes.xaxis, used[order], rotation=0)
    mel = 1127 * np.log1p(np.array([20, 250, 500, 1000, 2000, 4000, 8000]) / 700)
    axes.set_yticks((mel - mel[0]) / (mel[-1] - mel[0]) * (bins + 1) - 1, ["0.02", "0.25", "0.5", "1", "2", "4", "8"])
    axes.set_ylim(-0.5, bins - 0.5)
    axes.grid(visible=False)
    axes.set(xlabel="cluster: energy in low frequencies left, in high ones right", ylabel="frequency (kHz)")
    axes.set_title("Mean spectrum of each cluster, against the average frame")
    figure.colorbar(image, ax=axes, label="log energy above average", pad=0.01)
    return figure


@styled
def histograms(counts: pd.DataFrame) -> Figure:
    """Share of each cluster (columns) in each client's frames (rows of ``counts``)."""
    share = counts.div(counts.sum(axis=1), axis=0)
    order = share.mean().sort_values(ascending=False).index
    figure, [axes] = _figure(width=10, height=1.4 + min(0.25 * len(share), 4))
    image = axes.imshow(share[order], aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    _names(axes.yaxis, share.index)
    _names(axes.xaxis, order, rotation=0)
    axes.grid(visible=False)
    axes.set(xlabel="cluster, most used first", ylabel="client", title="Clusters in each client's speech")
    figure.colorbar(image, ax=axes, label="share of frames", pad=0.01)
    return figure


@styled
def matrices(tables: Mapping[str, pd.DataFrame], label: str, low: float = 0.0, high: float | None = None) -> Figure:
    """Square client-by-client tables side by side on one colour scale, values written in where they can be read."""
    figure, axes = _figure(1, len(tables), width=1.2 + 3.4 * len(tables), height=3.4)
    high = max(float(np.nanmax(table)) for table in tables.values()) if high is None else high
    for place, (name, table) in zip(axes, tables.items(), strict=True):
        image = place.imshow(table, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        _names(place.xaxis, table.columns)
        _names(place.yaxis, table.index)
        place.grid(visible=False)
        place.set_title(name)
        if len(table) <= 10:
            for row, column in np.ndindex(table.shape):
                value = table.iat[row, column]
                colour = "white" if value < low + 0.6 * (high - low) else "black"
                place.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=list(axes), label=label, shrink=0.8)
    return figure


# --------------------------------------------------------------------------------------------------- training curves


@styled
def curves(
    rows: Sequence[Mapping[str, Any]], centralised: Sequence[Mapping[str, Any]] = (), clusters: int | None = None
) -> Figure:
    """Loss, and accuracy on masked and unmasked frames, per round.

    ``rows`` and ``centralised`` are those of metrics.jsonl. Thin: each client; thick: their mean, weighted by masked
    frames; dashed: training on the pooled data with the same number of updates; dotted, where ``clusters`` is given:
    guessing at random among so many.
    """
    rounds, each, central = _rows(rows, "round"), _rows(rows, "client"), _rows(centralised, "round")
    panels = (
        ("loss", "validation_loss", "loss (nats per frame)", "Loss"),
        ("accuracy_masked", "validation_accuracy_masked", "accuracy", "Masked frames"),
        ("accuracy_unmasked", None, "accuracy", "Unmasked frames"),
    )
    figure, places = _figure(1, 3, width=11, height=3)
    for axes, (name, validation, label, title) in zip(places, panels, strict=True):
        if len(each):
            ids = each.client.unique()
            chosen = ids[np.linspace(0, len(ids) - 1, min(len(ids), CURVES)).astype(int)]
            shown = each[each.client.isin(chosen)].groupby("client")
            lines = [group[["round", name]].to_numpy() for _, group in shown]
            text = "each client" if len(chosen) == len(ids) else f"{len(chosen)} of {len(ids):,} clients"
            axes.add_collection(LineCollection(lines, colors=SKY, linewidths=0.7, alpha=0.6, label=text))
        marker = "o" if len(rounds) <= READABLE else ""
        if len(rounds):
            axes.plot(rounds["round"], rounds[name], color=BLUE, linewidth=2, marker=marker, markersize=3, label="mean")
        if len(central):
            axes.plot(central["round"], central[name], color=RED, linestyle="--", label="centralised")
        if validation in rounds:
            held = rounds.dropna(subset=[validation])
            axes.plot(held["round"], held[validation], color=GREEN, marker=marker, markersize=3, label="validation")
        if clusters is not None:
            guess = np.log(clusters) if name == "loss" else 1 / clusters
            axes.axhline(guess, color=BLACK, linestyle=":", label="guessing")
        axes.set(xlabel="round", ylabel=label, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.autoscale_view()
    for axes in places[1:]:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    places[0].legend()
    return figure


@styled
def ledger(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Learning rate, norm of the aggregated update, bytes moved so far, and speed, per round of metrics.jsonl."""
    rounds = _rows(rows, "round")
    figure, (rate, norm, sent, speed) = _figure(1, 4, width=12, height=2.7)
    at, marker = rounds["round"], "o" if len(rounds) <= READABLE else ""
    line = {"color": BLUE, "marker": marker, "markersize": 3}
    rate.plot(at, rounds.learning_rate, **line)
    rate.set(ylabel="learning rate", title="Clients' learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    norm.plot(at, rounds.update_norm, **line)
    norm.set(ylabel="L2 norm", title="Aggregated update", ylim=(0, None))
    behind = line | {"color": ORANGE, "linewidth": 4, "alpha": 0.6}
    sent.plot(at, rounds.bytes_down.cumsum() / 1e6, **behind, label="to clients")
    sent.plot(at, rounds.bytes_up.cumsum() / 1e6, **line, label="to the server")
    sent.set(ylabel="sent so far (MB)", title="Bytes", ylim=(0, None))
    sent.legend()
    speed.plot(at, rounds.audio_seconds_per_second, **line)
    speed.set(ylabel="audio seconds per second", title="Speed", ylim=(0, None))
    for axes in (rate, norm, sent, speed):
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


# -------------------------------------------------------------------------------------------------------- evaluation


@styled
def bars(table: pd.DataFrame, title: str = "") -> Figure:
    """A panel per measure, a bar per system with its interval.

    ``table`` has the columns system, measure, value, low, high (the interval, or NaN) and baseline (chance or the
    shuffled figure, or NaN), drawn as a dotted line across the system's bar. Systems and measures keep their order.
    """
    measures, systems = list(table.measure.unique()), list(table.system.unique())
    columns = 2 if len(measures) == 4 else min(len(measures), 3)
    lines = -(-len(measures) // columns)
    figure, places = _figure(lines, columns, width=4 * columns, height=0.7 + lines * (0.6 + 0.27 * len(systems)))
    colours = dict(zip(systems, PALETTE * len(systems), strict=False))
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
    for axes in places[len(measures) :]:
        axes.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


@styled
def kept(quality: Mapping[str, float], cost: Mapping[str, float]) -> Figure:
    """What a student kept of its teacher's quality, and at what cost: each value is a share of the teacher's."""
    figure, [axes] = _figure(width=7, height=0.9 + 0.3 * (len(quality) + len(cost)))
    shares, at = [*quality.values(), *cost.values()], np.arange(len(quality) + len(cost))
    axes.barh(at, shares, 0.7, color=[BLUE] * len(quality) + [RED] * len(cost))
    for place, share in zip(at, shares, strict=True):
        axes.text(share, place, f" {share:.0%}", va="center", fontsize=8)
    axes.axvline(1, color=BLACK, linestyle=":")
    axes.set_yticks(at, [*quality, *cost])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="share of the teacher's", xlim=(0, max(1.1, 1.12 * max(shares))))
    axes.set_title("What the student kept (blue), at what cost (red)")
    return figure


@styled
def confusion(counts: np.ndarray, words: Sequence[str]) -> Figure:
    """Share of each true word's clips (rows of ``counts``) recognised as each word (columns)."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, [axes] = _figure(width=7.2, height=6.4)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    _names(axes.xaxis, words, rotation=90)
    _names(axes.yaxis, words)
    axes.grid(visible=False)
    axes.set(xlabel="recognised as", ylabel="spoken", title=f"Words: {np.trace(counts) / counts.sum():.1%} right")
    figure.colorbar(image, ax=axes, label="share of the spoken word's clips", shrink=0.8)
    return figure


@styled
def layers(table: pd.DataFrame, label: str, baselines: Mapping[str, float] | None = None) -> Figure:
    """A measure per layer: ``table`` has a row per layer (index; 0 is the transformer's input), a column per model.

    ``baselines`` are drawn as dotted horizontal lines.
    """
    figure, [axes] = _figure(width=6.5)
    for name, marker in zip(table.columns, "osD^vPX*" * len(table.columns), strict=False):
        own = table[name].dropna()
        axes.plot(own.index, own, marker=marker, markersize=4, label=name)
    for (name, value), colour in zip((baselines or {}).items(), (BLACK, GREY) * 4, strict=False):
        axes.axhline(value, color=colour, linestyle=":", label=name)
    axes.set(xlabel="layer (0: input of the transformer)", ylabel=label, title="Layer by layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


# ------------------------------------------------------------------------------------------------------------ helpers


def _figure(rows: int = 1, columns: int = 1, *, width: float = 8, height: float = 3, **options: Any):
    """A Figure of ``width`` x ``height`` inches and its axes as a flat array."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def _duration(hours: np.ndarray) -> tuple[np.ndarray, str]:
    """Hours, or minutes where no value reaches two hours, and the unit's name."""
    return (hours, "hours") if np.max(hours) >= 2 else (hours * 60, "minutes")


def _bars(axes: Axes, heights: np.ndarray, colour: str, bottoms: np.ndarray | float = 0.0, alpha: float = 1.0) -> None:
    """Bars from ``bottoms`` to ``heights``; where they are too many to be told apart, one filled outline."""
    if len(heights) <= READABLE:
        axes.bar(np.arange(len(heights)), heights - bottoms, 0.8, bottoms, color=colour, alpha=alpha)
    else:
        axes.fill_between(np.arange(len(heights)), bottoms, heights, step="mid", color=colour, alpha=alpha, linewidth=0)


def _names(axis: matplotlib.axis.Axis, names: Sequence[Any], rotation: float | None = None) -> None:
    """A tick per name while they can be read; else about ten numbered ticks."""
    if len(names) > READABLE:
        axis.set_major_locator(MaxNLocator(10, integer=True))
        return
    names = [str(name) for name in names]
    if rotation is None:
        rotation = 90 if axis.axis_name == "x" and (len(names) > 8 or max(map(len, names)) > 6) else 0
    axis.set_ticks(np.arange(len(names)), names, rotation=rotation, fontsize=7 if len(names) > 12 else 8)


def _rows(rows: Sequence[Mapping[str, Any]], kind: str) -> pd.DataFrame:
    """The rows of one kind; of a round that was done again after a restart, the last."""
    table = pd.DataFrame([row for row in rows if row["kind"] == kind])
    return table.drop_duplicates(["round", "client"][: 1 + (kind == "client")], keep="last") if len(table) else table
