"""What there is: utterances, speakers, phones, and what each client holds of them."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedhubert_lib.audio import HOP, SAMPLE_RATE
from fedhubert_lib.plots import style
from fedhubert_lib.plots.style import BLACK, BLUE, GREEN, GREY, PURPLE, RED, SKY, styled


@styled
def utterance_lengths(manifest: pd.DataFrame) -> Figure:
    """Histogram of utterance lengths in seconds, a line per split of the manifest, each as shares of its own."""
    figure, [axes] = style.panels(width=6)
    seconds = manifest.samples / manifest.sample_rate
    bins = np.linspace(0, seconds.max(), 31)
    for split in sorted(manifest.split.unique(), reverse=True):  # train, test
        own = seconds[manifest.split == split]
        label, weights = f"{split}: {len(own):,} utterances", np.full(len(own), 1 / len(own))
        axes.hist(own, bins, weights=weights, histtype="step", linewidth=1.6, label=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="length of an utterance (s)", ylabel="share of utterances", title="Utterance lengths")
    axes.legend()
    return figure


@styled
def speakers(manifest: pd.DataFrame) -> Figure:
    """Speech per speaker, longest first, coloured by sex: a bar each, or, of very many, a curve per sex."""
    table = manifest.assign(hours=manifest.samples / manifest.sample_rate / 3600)
    table = table.groupby(["speaker", "sex"], as_index=False).hours.sum().sort_values("hours", ascending=False)
    figure, [axes] = style.panels(width=8)
    amount, unit = style.duration(table.hours.to_numpy())
    bars = len(table) <= style.READABLE
    known = {"F": ("female", RED), "M": ("male", BLUE)}
    for sex in sorted(table.sex.unique(), reverse=True):
        name, colour = known.get(sex, ("sex not recorded", GREY))
        own = (table.sex == sex).to_numpy()
        label = f"{name}: {own.sum():,} speakers"
        if bars:
            axes.bar(np.flatnonzero(own), amount[own], color=colour, label=label)
        else:
            axes.step(np.arange(own.sum()), amount[own], where="mid", color=colour, linewidth=1.6, label=label)
    style.ticks(axes.xaxis, table.speaker)
    axes.grid(axis="x", visible=False)
    order = "speaker, longest first" if bars else "speakers of each sex, longest first"
    axes.set(xlabel=order, ylabel=f"speech ({unit})", title="Speech per speaker", ylim=(0, None))
    axes.legend()
    return figure


@styled
def phone_lengths(phones: pd.DataFrame) -> Figure:
    """How often each phone occurs, and how long it lasts (median, and the middle half)."""
    milliseconds = (phones.end_sample - phones.start_sample) * (1000 / SAMPLE_RATE)
    quartiles = milliseconds.groupby(phones.phone).quantile([0.25, 0.5, 0.75]).unstack()
    share = phones.phone.value_counts(normalize=True)
    order, place = share.index, np.arange(len(share))
    figure, (top, bottom) = style.panels(2, 1, width=9, height=4.2, sharex=True)
    top.bar(place, share, color=BLUE)
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    top.set(ylabel="share of phones", title="Phones: how often, and how long")
    low, middle, high = (quartiles.loc[order, q].to_numpy() for q in (0.25, 0.5, 0.75))
    bottom.errorbar(place, middle, [middle - low, high - middle], fmt="o", color=RED, markersize=3)
    bottom.axhline(1000 * HOP / SAMPLE_RATE, color=BLACK, linestyle=":", label="one frame, 20 ms")
    bottom.set(ylabel="length (ms)", xlabel="phone, most frequent first", ylim=(0, 1.25 * high.max()))  # legend above
    bottom.set_xticks(place, order, fontsize=7)
    bottom.set_xlim(-0.7, len(order) - 0.3)
    bottom.legend()
    return figure


@styled
def clients(held: pd.DataFrame) -> Figure:
    """What each client holds, six bars each: ``held`` is a table of skew.clients, with the clients as its index.

    A dotted line marks the median client. What no client knows (sex, transcripts) is said to be missing.
    """
    figure, places = style.panels(2, 3, width=11, height=4.6, sharex=True)
    hours, unit = style.duration(held.hours.to_numpy())
    bars = (
        ("Speech", f"speech ({unit})", hours, BLUE),
        ("Utterances", "utterances", held.utterances, BLUE),
        ("Speakers", "speakers", held.speakers, GREEN),
        ("Share of women's speech", "share of speech", held.female, RED),
        ("Utterance lengths: 5 %, median, 95 %", "length (s)", held["median"], SKY),
        ("Speaking rate", "words per minute", held.words_per_minute, PURPLE),
    )
    for axes, (title, label, values, colour) in zip(places, bars, strict=True):
        values = np.asarray(values, dtype=float)
        if label == "length (s)":
            style.columns(axes, held.longest.to_numpy(), colour, held.shortest.to_numpy())
            axes.hlines(values, np.arange(len(values)) - 0.4, np.arange(len(values)) + 0.4, color=BLACK)
        else:
            style.columns(axes, values, colour)
        if np.isfinite(values).any():
            axes.axhline(np.nanmedian(values), color=BLACK, linestyle=":")
        else:
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        style.ticks(axes.xaxis, held.index)
        axes.grid(axis="x", visible=False)
        axes.set(ylabel=label, title=title, ylim=(0, None))
    for axes in places[1:3]:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    for axes in places[3:]:
        axes.set_xlabel("client")
    places[3].set_ylim(0, 1)
    places[3].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


@styled
def partition_schemes(schemes: Mapping[str, pd.DataFrame], summaries: Mapping[str, str] | None = None) -> Figure:
    """Partition schemes side by side: speech per client, whose speech it is (share of each speaker), share of women.

    Each table has a row per utterance with client, speaker, sex, samples and sample_rate; a summary is one line of text
    under the scheme's name. Of more clients or speakers than can be told apart, neighbours are drawn as the largest of
    their shares; hours that differ a hundredfold are drawn on a logarithmic scale.
    """
    count = len(schemes)
    figure, places = style.panels(
        3, count, width=2.5 + 1.6 * count, height=6.2, sharey="row", height_ratios=[1, 1.4, 0.8]
    )
    hours = {
        name: table.assign(hours=table.samples / table.sample_rate / 3600).pivot_table(
            values="hours", index="client", columns="speaker", aggfunc="sum", fill_value=0
        )
        for name, table in schemes.items()
    }
    speakers = next(iter(schemes.values())).drop_duplicates("speaker")
    women = speakers.speaker[speakers.sex == "F"]
    held = np.concatenate([table.sum(axis=1) for table in hours.values()])
    _, unit = style.duration(held)
    for column, (scheme, table) in enumerate(hours.items()):
        top, middle, bottom = places[column::count]
        table = table.iloc[np.argsort(-table.sum(axis=1).to_numpy(), kind="stable")]
        amount, share = table.sum(axis=1), table / table.sum()
        style.columns(top, amount.to_numpy() * (1 if unit == "hours" else 60), BLUE)
        top.set_title(scheme + (f"\n{summaries[scheme]}" if summaries else ""))
        # Speakers in the order of the clients that hold them: whole speakers give a staircase, IID gives a wash.
        order = np.argsort(share.to_numpy().argmax(0), kind="stable")
        extent = (-0.5, len(table) - 0.5, len(order) - 0.5, -0.5)
        picture = _pooled(share.to_numpy().T[order])
        image = middle.imshow(
            picture, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=extent
        )
        female = table.loc[:, table.columns.isin(women)].sum(axis=1)
        known = table.loc[:, table.columns.isin(speakers.speaker[speakers.sex.isin(["F", "M"])])].sum(axis=1)
        if known.any():
            style.columns(bottom, (female / known.where(known > 0)).to_numpy(), RED)
            bottom.axhline(female.sum() / known.sum(), color=BLACK, linestyle=":")
        else:
            bottom.text(0.5, 0.5, "not recorded", ha="center", transform=bottom.transAxes)
        for axes in (top, middle, bottom):
            axes.grid(visible=axes is not middle, axis="y")
            axes.set_xticks([] if axes is not bottom else [0, len(table) - 1])
            axes.set_xlim(-0.6, len(table) - 0.4)
        bottom.set(xlabel="client, largest first", ylim=(0, 1))
    places[0].set_ylabel(f"speech ({unit})")
    if held.max() > 100 * held.min():
        places[0].set_yscale("log")
    places[count].set_ylabel("speaker")
    places[count].yaxis.set_major_locator(MaxNLocator(6, integer=True))
    places[2 * count].set_ylabel("share of women's\nspeech")
    places[2 * count].yaxis.set_major_formatter(PercentFormatter(1))
    figure.colorbar(image, ax=list(places[count : 2 * count]), label="share of the speaker's speech", pad=0.01)
    return figure


def _pooled(values: np.ndarray, most: int = 150) -> np.ndarray:
    """The largest value of each block, so that no more than ``most`` rows and columns are left."""
    for axis, length in enumerate(values.shape):
        starts = np.unique(np.linspace(0, length, min(length, most), endpoint=False, dtype=int))
        values = np.maximum.reduceat(values, starts, axis=axis)
    return values
