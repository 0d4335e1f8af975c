"""Speech and its labels: clients, clusters, and an utterance from sound to label."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torchaudio.compliance.kaldi import fbank

from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD, SAMPLE_RATE
from fedhubert_lib.plots import style


@style.styled
def clients(held: pd.DataFrame) -> Figure:
    """The data of each client, six bars each: ``held`` is a table of skew.clients, with the clients as its index.

    A dotted line marks the median client. Unknown values (sex, transcripts) leave their panel empty.
    """
    figure, axes = style.panels(2, 3, width=11, height=4.6, sharex=True)
    hours, unit = (held.hours, "hours") if held.hours.max() >= 2 else (held.hours * 60, "minutes")
    bars = (
        ("Speech", f"speech ({unit})", hours, style.BLUE),
        ("Utterances", "utterances", held.utterances, style.BLUE),
        ("Speakers", "speakers", held.speakers, style.GREEN),
        ("Women's speech", "fraction of speech", held.female, style.RED),
        ("Utterance lengths: 5 %, median, 95 %", "length (s)", held["median"], style.SKY),
        ("Speaking rate", "words per minute", held.words_per_minute, style.PURPLE),
    )
    place = np.arange(len(held))
    for panel, (title, label, values, colour) in zip(axes, bars, strict=True):
        values = values.to_numpy(float)
        if label == "length (s)":
            _bars(panel, held.longest, colour, held.shortest)
            panel.hlines(values, place - 0.4, place + 0.4, color=style.BLACK)
        else:
            _bars(panel, values, colour)
        if np.isfinite(values).any():
            panel.axhline(np.nanmedian(values), color=style.BLACK, linestyle=":")
        style.ticks(panel.xaxis, held.index)
        panel.grid(axis="x", visible=False)
        panel.set(ylabel=label, title=title, ylim=(0, 1 if label == "fraction of speech" else None))
    for panel in axes[3:]:
        panel.set_xlabel("client")
    return figure


@style.styled
def partition_schemes(schemes: Mapping[str, pd.DataFrame], summaries: Mapping[str, str]) -> Figure:
    """Partition schemes side by side: speech per client, fraction of each speaker's speech per client, women's speech.

    Each table has a row per utterance with client, speaker, sex, samples and sample_rate; a summary is one line of text
    under the scheme's name. Women's speech of a client without a speaker of recorded sex is left out.
    """
    count = len(schemes)
    figure, axes = style.panels(3, count, width=2.5 + 1.6 * count, height=6.2, sharex="col", sharey="row")
    tops, middles, bottoms = axes.reshape(3, count)
    for (scheme, table), top, middle, bottom in zip(schemes.items(), tops, middles, bottoms, strict=True):
        table = table.assign(seconds=table.samples / table.sample_rate)
        held = table.pivot_table("seconds", "client", "speaker", aggfunc="sum", fill_value=0)
        held = held.iloc[np.argsort(-held.sum(axis=1).to_numpy(), kind="stable")]
        _bars(top, held.sum(axis=1) / 3600, style.BLUE)
        top.set_title(f"{scheme}\n{summaries[scheme]}")
        # Speakers in the order of the clients that hold them: whole speakers give a staircase, IID gives a wash.
        fractions = (held / held.sum()).to_numpy().T
        order = np.argsort(fractions.argmax(1), kind="stable")
        image = middle.imshow(fractions[order], aspect="auto", cmap="Blues", vmin=0, vmax=1)
        middle.grid(visible=False)
        sexes = table.pivot_table("seconds", "client", "sex", aggfunc="sum", fill_value=0)
        sexes = sexes.reindex(columns=["F", "M"], fill_value=0)
        women = (sexes.F / sexes.sum(axis=1)).reindex(held.index)
        _bars(bottom, women, style.RED)
        bottom.axhline(sexes.F.sum() / (sexes.to_numpy().sum() or np.nan), color=style.BLACK, linestyle=":")
        bottom.set(xlabel="client, largest first", ylim=(0, 1), xticks=[0, len(held) - 1], xlim=(-0.6, len(held) - 0.4))
    tops[0].set_ylabel("speech (hours)")
    middles[0].set_ylabel("speaker")
    bottoms[0].set_ylabel("fraction of\nwomen's speech")
    figure.colorbar(image, ax=list(middles), label="fraction of the speaker's speech", pad=0.01)
    return figure


def _bars(panel: Axes, tops: Any, colour: str, bottoms: Any = 0.0) -> None:
    """Bars from ``bottoms`` to ``tops`` [clients] as one patch with gaps: 4,600 patches of 2,300 clients take 17 s."""
    edges = (np.arange(len(tops))[:, None] + [-0.4, 0.4]).ravel()
    steps = np.column_stack([tops, np.full(len(tops), np.nan)]).ravel()[:-1]
    baseline = np.repeat(np.broadcast_to(bottoms, len(tops)), 2)[:-1]
    panel.stairs(steps, edges, baseline=baseline, fill=True, color=colour)


@style.styled
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
    [frames] is true the spectrogram is veiled. ``start`` is the second at which the waveform begins in its utterance.
    """
    seconds = len(waveform) / SAMPLE_RATE
    strips: dict[str, list[tuple[float, float, str, Any]]] = {}  # left and width in seconds, text and colour
    if phones is not None and len(phones):
        starts, ends = phones.start_sample / SAMPLE_RATE, phones.end_sample / SAMPLE_RATE
        greys = itertools.cycle(("#EFEFEF", "#D9D9D9"))
        strips["phones"] = list(zip(starts, ends - starts, phones.phone, greys, strict=False))
    strips |= {name: _label_runs(np.asarray(units)) for name, units in (labels or {}).items()}
    ratios = {"height_ratios": [4] + [0.8] * len(strips)}
    figure, axes = style.panels(1 + len(strips), 1, width=11, height=2.4 + 0.42 * len(strips), sharex=True, **ratios)
    window = torch.hann_window(RECEPTIVE_FIELD)
    spectrum = torch.stft(waveform.float(), 512, HOP // 2, RECEPTIVE_FIELD, window, return_complex=True)
    decibels = 10 * torch.log10(spectrum.abs().square() + 1e-10)
    options = {"extent": (0, seconds, 0, SAMPLE_RATE / 2000), "vmin": float(decibels.max()) - 80}
    axes[0].imshow(decibels.numpy(), origin="lower", aspect="auto", cmap="magma", **options)
    axes[0].grid(visible=False)
    axes[0].set_ylabel("frequency (kHz)")
    if mask is not None:
        for left, width, text, _ in _label_runs(mask.astype(int)):
            if text == "1":
                axes[0].axvspan(left, left + width, color="white", alpha=0.75, linewidth=0)
    for strip, (name, runs) in zip(axes[1:], strips.items(), strict=True):
        for left, width, text, colour in runs:
            strip.barh(0, width, 1, left, color=colour, edgecolor="white", linewidth=0.5)
            if width > seconds / 140 * len(text) and 0 <= left + width / 2 <= seconds:  # only where it fits
                strip.text(left + width / 2, 0, text, ha="center", va="center_baseline", fontsize=6.5)
        strip.set_ylabel(name, rotation=0, ha="right", va="center")
        strip.set(yticks=[], ylim=(-0.5, 0.5))
        strip.grid(visible=False)
        strip.spines[:].set_visible(False)
    axes[-1].set(xlabel="time (s)", xlim=(0, seconds))
    axes[-1].xaxis.set_major_formatter(lambda second, position: f"{start + second:g}")
    return figure


def _label_runs(labels: np.ndarray) -> list[tuple[float, float, str, Any]]:
    """Start and width in seconds, text and colour of each run of equal labels."""
    first = np.flatnonzero(np.diff(labels, prepend=-1))
    widths = np.diff(first, append=len(labels)) * HOP / SAMPLE_RATE
    starts = (first * HOP + (RECEPTIVE_FIELD - HOP) / 2) / SAMPLE_RATE
    hues = labels[first] * 0.618 % 1  # neighbouring ids get far-apart hues
    colours = 0.35 * matplotlib.colormaps["turbo"](hues)[:, :3] + 0.65  # pale, so that the id can be read on it
    return list(zip(starts, widths, map(str, labels[first]), colours, strict=True))


@style.styled
def projection(frames: np.ndarray, labels: np.ndarray) -> Figure:
    """Frames [N, D] on their first two principal components, the seven largest clusters in colour."""
    centred = frames - frames.mean(0)
    _, scale, components = np.linalg.svd(centred, full_matrices=False)
    points, variance = centred @ components[:2].T, scale[:2] ** 2 / np.sum(scale**2)
    figure, [axes] = style.panels(width=6, height=4.5)
    axes.scatter(*points.T, s=3, color="#D5D5D5", linewidths=0, rasterized=True)
    largest = np.argsort(-np.bincount(labels))[: min(7, len(np.unique(labels)))]
    for cluster, colour in zip(largest, (*style.PALETTE[:6], style.BLACK), strict=False):
        dots = {"s": 5, "color": colour, "linewidths": 0, "alpha": 0.6, "rasterized": True}
        axes.scatter(*points[labels == cluster].T, **dots, label=str(cluster))
    axes.set(
        xlabel=f"first component ({variance[0]:.0%} of the variance)",
        ylabel=f"second component ({variance[1]:.0%} of the variance)",
        title=f"{len(frames):,} frames; the {len(largest)} largest clusters in colour",
    )
    figure.legend(loc="outside right upper", title="cluster", markerscale=4)
    return figure


@style.styled
def phones_per_cluster(counts: pd.DataFrame) -> Figure:
    """P(phone | cluster) as a heat map; ``counts`` holds frames, phones as rows and clusters as columns.

    Phones run from the most frequent down, clusters by their most likely phone (as in the HuBERT paper's figure 2):
    the better the units, the sharper the staircase.
    """
    counts = counts.loc[counts.sum(axis=1).sort_values(ascending=False).index]
    table = (counts / counts.sum()).loc[:, counts.sum() > 0]
    table = table.iloc[:, np.lexsort((-table.to_numpy().max(0), table.to_numpy().argmax(0)))]
    figure, [axes] = style.panels(width=10, height=1.5 + 0.11 * len(table))
    image = style.heat_map(axes, table, 0, vmin=0)
    axes.set_yticks(np.arange(len(table)), table.index, fontsize=6.5)
    axes.set(xlabel="cluster, by its most likely phone", ylabel="phone, most frequent first")
    axes.set_title("Phones in each cluster")
    figure.colorbar(image, ax=axes, label="P(phone | cluster)", pad=0.01)
    return figure


@style.styled
def cluster_spectra(waveforms: Sequence[torch.Tensor], labels: Sequence[np.ndarray], clusters: int) -> Figure:
    """The sound of each cluster: the mean kaldi log-mel spectrum of its frames, less that of all frames.

    ``labels`` [frames] at 50 Hz belong to ``waveforms`` [samples], one by one. Clusters without a frame are left out.
    """
    bins = 40
    total, frames = np.zeros((clusters, bins)), np.zeros(clusters, int)
    for waveform, units in zip(waveforms, labels, strict=True):
        # kaldi scales samples as 16-bit integers; its frames come every 10 ms, the labels every 20 ms
        spectra = fbank(waveform[None].float() * 2**15, num_mel_bins=bins, sample_frequency=SAMPLE_RATE)[::2].numpy()
        np.add.at(total, units, spectra[: len(units)])
        frames += np.bincount(units, minlength=clusters)
    used = np.flatnonzero(frames)
    mean = total[used] / frames[used, None]
    relative = pd.DataFrame((mean - total.sum(0) / frames.sum()).T, columns=used)
    order = np.argsort(np.exp(mean) @ np.arange(bins) / np.exp(mean).sum(axis=1))
    figure, [axes] = style.panels(width=10)
    limit = relative.abs().to_numpy().max()
    image = style.heat_map(axes, relative.iloc[:, order], 0, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
    mel = 1127 * np.log1p(np.array([20, 250, 500, 1000, 2000, 4000, 8000]) / 700)
    axes.set_yticks((mel - mel[0]) / (mel[-1] - mel[0]) * (bins + 1) - 1, ["0.02", "0.25", "0.5", "1", "2", "4", "8"])
    axes.set_ylim(-0.5, bins - 0.5)
    axes.set(xlabel="cluster: energy in low frequencies left, in high ones right", ylabel="frequency (kHz)")
    axes.set_title("Mean spectrum of each cluster, against the average frame")
    figure.colorbar(image, ax=axes, label="log energy above average", pad=0.01)
    return figure


@style.styled
def histograms(counts: pd.DataFrame) -> Figure:
    """Fraction of each client's frames (rows of ``counts``) in each cluster (columns)."""
    table = counts.div(counts.sum(axis=1), axis=0)
    table = table[table.mean().sort_values(ascending=False).index]
    figure, [axes] = style.panels(width=10, height=1.4 + min(0.25 * len(table), 4))
    # On a linear scale one client's favourite cluster would leave the others white.
    image = style.heat_map(axes, table, 0, norm=PowerNorm(0.5, vmin=0))
    axes.set(xlabel="cluster, most used first", ylabel="client", title="Clusters in each client's speech")
    figure.colorbar(image, ax=axes, label="fraction of frames", pad=0.01)
    return figure


@style.styled
def matrices(tables: Mapping[str, pd.DataFrame], label: str, high: float | None = None) -> Figure:
    """Square client-by-client tables side by side, on one colour scale from 0 to ``high``."""
    columns = min(len(tables), 3)
    rows = -(-len(tables) // columns)
    figure, axes = style.panels(rows, columns, width=1.6 + 3 * columns, height=0.5 + 2.9 * rows)
    high = max(float(np.nanmax(table)) for table in tables.values()) if high is None else high
    for panel, (name, table) in zip(axes, tables.items(), strict=False):
        image = style.heat_map(panel, table, aspect="equal", cmap="viridis", vmin=0, vmax=high)
        panel.set(title=name, xlabel="client", ylabel="client")
        for row, column in np.ndindex(table.shape) if len(table) <= 10 else ():
            value = table.iat[row, column]
            colour = "white" if value < 0.6 * high else "black"
            panel.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    for panel in axes[len(tables) :]:
        panel.set_axis_off()
    figure.colorbar(image, ax=list(axes), label=label, shrink=0.8)
    return figure
