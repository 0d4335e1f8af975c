"""Frame labels: under the spectrogram, as clusters, against phones, between clients."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torchaudio.compliance.kaldi import fbank

from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD, SAMPLE_RATE
from fedhubert_lib.plots import style
from fedhubert_lib.plots.style import BLACK, PALETTE, READABLE, styled


@styled
def aligned_units(
    waveform: torch.Tensor,
    phones: pd.DataFrame | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
    mask: np.ndarray | None = None,
    start: float = 0.0,
) -> Figure:
    """A spectrogram, and under it on the same time axis the phones and each codebook's frame labels.

    ``waveform`` [samples] at 16 kHz; ``phones`` has start_sample, end_sample, phone; ``labels`` maps the name of a
    codebook to its labels [frames] at 50 Hz, each drawn 20 ms wide around the centre of its frame. Where ``mask``
    [frames] is true the spectrogram is veiled. ``start`` is the second at which the waveform begins in its utterance:
    the axis counts from there.
    """
    seconds = len(waveform) / SAMPLE_RATE
    strips = [("phones", *_phone_runs(phones))] if phones is not None and len(phones) else []
    strips += [(name, *_label_runs(np.asarray(units))) for name, units in (labels or {}).items()]
    figure, axes = style.panels(
        1 + len(strips), 1, width=11, height=2.4 + 0.42 * len(strips), sharex=True,
        height_ratios=[4] + [0.8] * len(strips),
    )  # fmt: skip
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
        for left, width, text in zip(starts, widths, texts, strict=True):
            if text == "1":
                axes[0].axvspan(left, left + width, color="white", alpha=0.75, linewidth=0)
    for strip, (name, starts, widths, texts, colours) in zip(axes[1:], strips, strict=True):
        strip.barh(0, widths, 1, starts, color=colours, edgecolor="white", linewidth=0.5)
        for left, width, text in zip(starts, widths, texts, strict=True):
            if width > seconds / 140 * len(text) and 0 <= left + width / 2 <= seconds:  # only where it fits
                strip.text(left + width / 2, 0, text, ha="center", va="center_baseline", fontsize=6.5)
        strip.set_ylabel(name, rotation=0, ha="right", va="center")
        strip.set(yticks=[], ylim=(-0.5, 0.5))
        strip.grid(visible=False)
        strip.spines[:].set_visible(False)
    axes[-1].set(xlabel="time (s)", xlim=(0, seconds))
    axes[-1].xaxis.set_major_formatter(lambda second, position: f"{start + second:g}")
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
    figure, [axes] = style.panels(width=5)
    for name, own in table.groupby("codebook"):
        axes.plot(own["round"], own.inertia, marker="o", markersize=3, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="Lloyd round", ylabel="squared distance per frame", title="Distance of frames to their centroids")
    axes.legend()
    return figure


@styled
def cluster_sizes(counts: Mapping[str, np.ndarray]) -> Figure:
    """Share of the frames in each cluster, largest first; ``counts`` maps a codebook's name to frames per cluster."""
    figure, [axes] = style.panels(width=6.5)
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
    figure, [axes] = style.panels(width=5.5, height=4.5)
    axes.scatter(*points.T, s=3, color="#D5D5D5", linewidths=0, rasterized=True)
    largest = np.argsort(-np.bincount(labels))[:7]
    colours = (*PALETTE[:6], BLACK)
    for cluster, colour in zip(largest, colours, strict=False):
        axes.scatter(*points[labels == cluster].T, s=5, color=colour, linewidths=0, alpha=0.6, rasterized=True)
    shown = largest[np.isin(largest, labels)]
    middles = np.stack([np.median(points[labels == cluster], 0) for cluster in shown])
    width = np.ptp(points, axis=0) / (13, 10)  # of a label and its circle
    for cluster, middle, place, colour in zip(shown, middles, _apart(middles / width) * width, colours, strict=False):
        axes.annotate(str(cluster), middle, place, weight="bold", color=colour, ha="center", va="center",
                      bbox={"boxstyle": "circle", "facecolor": "white", "edgecolor": colour},
                      arrowprops={"arrowstyle": "-", "color": colour})  # fmt: skip
    axes.set(
        xlabel=f"first component ({share[0]:.0%} of the variance)",
        ylabel=f"second component ({share[1]:.0%} of the variance)",
        title=f"{len(frames):,} frames; the {len(largest)} largest clusters in colour",
    )
    return figure


def _apart(points: np.ndarray) -> np.ndarray:
    """``points`` [N, 2], moved until no two are nearer than 1: places for labels that can all be read."""
    points = points + 1e-3 * np.arange(len(points))[:, None]  # two at one place need a direction
    for _ in range(100):
        gaps = points[:, None] - points
        distance = np.linalg.norm(gaps, axis=2, keepdims=True) + np.eye(len(points))[..., None]
        points += np.where(distance < 1, gaps / distance * (1 - distance), 0).sum(1) / 2
    return points


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
    figure, [axes] = style.panels(width=10, height=1.5 + 0.11 * len(share))
    image = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    axes.set_yticks(np.arange(len(share)), share.index, fontsize=6.5)
    style.ticks(axes.xaxis, share.columns, rotation=0)
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
    figure, [axes] = style.panels(width=10, height=3)
    limit = np.abs(relative).max()
    image = axes.imshow(relative[order].T, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    style.ticks(axes.xaxis, used[order], rotation=0)
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
    figure, [axes] = style.panels(width=10, height=1.4 + min(0.25 * len(share), 4))
    square_root = PowerNorm(0.5, vmin=0)  # one client's favourite would leave all others white
    image = axes.imshow(share[order], aspect="auto", cmap="Blues", norm=square_root, interpolation="nearest")
    style.ticks(axes.yaxis, share.index)
    style.ticks(axes.xaxis, order, rotation=0)
    axes.grid(visible=False)
    axes.set(xlabel="cluster, most used first", ylabel="client", title="Clusters in each client's speech")
    figure.colorbar(image, ax=axes, label="share of frames", pad=0.01)
    return figure


@styled
def matrices(tables: Mapping[str, pd.DataFrame], label: str, low: float = 0.0, high: float | None = None) -> Figure:
    """Square client-by-client tables side by side on one colour scale, values written in where they can be read."""
    columns = min(len(tables), 3)
    rows = -(-len(tables) // columns)
    figure, axes = style.panels(
        rows, columns, width=1.6 + 3 * columns, height=0.5 + 2.9 * rows, sharex=True, sharey=True
    )
    high = max(float(np.nanmax(table)) for table in tables.values()) if high is None else high
    for place, (name, table) in zip(axes, tables.items(), strict=False):
        image = place.imshow(table, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        style.ticks(place.xaxis, table.columns, most=16)
        style.ticks(place.yaxis, table.index, most=16)
        place.grid(visible=False)
        place.set_title(name)
        if len(table) <= 10:
            for row, column in np.ndindex(table.shape):
                value = table.iat[row, column]
                colour = "white" if value < low + 0.6 * (high - low) else "black"
                place.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    for place in axes[len(tables) :]:
        place.set_axis_off()
    for place in axes[::columns]:
        place.set_ylabel("client")
    for place in axes[-columns:]:
        place.set_xlabel("client")
    figure.colorbar(image, ax=list(axes), label=label, shrink=0.8)
    return figure
