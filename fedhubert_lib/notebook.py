"""What only a notebook shows: pictures in place, sound to play, curves that grow, a browser of utterances.

The one module that imports IPython and ipywidgets. Everything here works headless too: the executed notebook then holds
the final picture, and the browser its first page as a PNG beside the widget.
"""

import base64
import time
from collections.abc import Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import ipywidgets as widgets
import numpy as np
import pandas as pd
import soundfile
import torch
from IPython.display import HTML, DisplayHandle, Image
from IPython.display import display as _display
from matplotlib.figure import Figure

from fedhubert_lib import audio, plots
from fedhubert_lib.files import read_rows

LONGEST = 8.0
"""Seconds of a clip that are embedded as sound: a notebook must stay small."""
PAGE = 4
"""Seconds of an utterance on one page of the browser: at more, labels of 20 ms cannot be read."""


class UnitLabels(Protocol):
    """Labels by utterance: labels.Labels, or a plain mapping to [frames]."""

    def __getitem__(self, utterance: str) -> np.ndarray: ...


def show(figure: Figure, folder: Path, name: str) -> None:
    """Save ``figure`` as NAME.png and NAME.svg in ``folder`` and show it."""
    plots.save(figure, folder, name)
    _display(Image(data=(folder / f"{name}.png").read_bytes()))


def table(*frames: pd.DataFrame, digits: int = 3) -> None:
    """Show tables one below the other, figures rounded to ``digits``; an empty one is said to be empty."""
    for frame in frames:
        with pd.option_context("display.max_colwidth", None):  # a path that is cut off cannot be looked up
            _display(frame.round(digits) if frame.size else HTML("<em>none</em>"))


def properties(values: Mapping[str, Any]) -> HTML:
    """A two-column table of names and values, such as a stage's provenance; nested mappings become one line."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(str(name))}</th>"
        f"<td style='text-align:left'>{escape(_words(name, value))}</td></tr>"
        for name, value in values.items()
    )
    return HTML(f"<table>{rows}</table>")


def _words(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(key, item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if name.endswith("bytes"):
        return f"{value / 2**30:.2f} GiB"
    return str(value)


def sounds(clips: Mapping[str, torch.Tensor]) -> HTML:
    """A line per clip, its caption and a player; waveforms [samples] at 16 kHz, embedded up to ``LONGEST`` seconds."""
    rows = "".join(
        f"<tr><td style='text-align:left'>{escape(caption)}</td><td><audio controls preload='none' "
        f"src='data:audio/wav;base64,{base64.b64encode(_wav(waveform)).decode()}'></audio></td></tr>"
        for caption, waveform in clips.items()
    )
    return HTML(f"<table>{rows}</table>")


class Progress:
    """A line of text per task in one output. Give it to a stage as ``on_progress``, or its ``row`` as ``on_row``."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._handle: DisplayHandle | None = None
        self._next = 0.0

    def __call__(self, task: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``task`` are done; until all are, their rate and the time left are shown."""
        start, first = self._begun.setdefault(task, (time.monotonic(), done))
        line = f"{done:,} of {total:,}" if total else f"{done:,}"
        if first < done < total:
            rate = (done - first) / max(time.monotonic() - start, 1e-3)
            minutes, seconds = divmod(round((total - done) / rate), 60)
            line += f", {rate:,.1f} a second, {minutes}:{seconds:02d} left"
        self._show(task, line, done == total)

    def row(self, row: Mapping[str, Any]) -> None:
        """The latest row of each kind, and of each codebook, that a stage writes to metrics.jsonl."""
        task = " ".join(str(row[name]) for name in ("codebook", "kind") if name in row)
        figures = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "time"}
        self._show(task, ", ".join(f"{name} {value:.4g}" for name, value in list(figures.items())[:5]), True)

    def _show(self, task: str, line: str, now: bool) -> None:
        self._lines[task] = f"{task}: {line}"
        if time.monotonic() < self._next and not now:
            return
        self._next = time.monotonic() + 0.5
        text = HTML(f"<pre>{escape(chr(10).join(self._lines.values()))}</pre>")
        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display(text)
        else:
            self._handle.update(text)


class LiveCurves:
    """Training curves that grow while a stage trains: one output, redrawn from metrics.jsonl as rows are written.

    Use it as a context, and give it to the stage as ``on_row``. On leaving, also by an error, the last picture is
    drawn, so that a headless run holds the final state. At most one twentieth of the time goes into drawing.
    """

    def __init__(self, folder: Path, clusters: int | None = None) -> None:
        """``folder`` is the stage's: it holds metrics.jsonl, and centralised/metrics.jsonl when that is trained.

        ``clusters`` draws what guessing among so many would give. The last picture is saved as figures/curves.
        """
        self._clusters = clusters
        self._files = folder / "metrics.jsonl", folder / "centralised" / "metrics.jsonl"
        self._figures = folder / "figures"
        self._next = 0.0
        self._handle = DisplayHandle()

    def __enter__(self) -> "LiveCurves":
        self._handle.display(HTML("<em>waiting for the first round …</em>"))
        return self

    def __call__(self, row: Mapping[str, Any]) -> None:
        """A row was written: draw again, unless that was done a moment ago."""
        if time.monotonic() >= self._next:
            start = time.monotonic()
            self._draw()
            self._next = time.monotonic() + max(1.0, 20 * (time.monotonic() - start))

    def __exit__(self, *exception: object) -> None:
        figure = self._draw()
        if figure is not None:
            plots.save(figure, self._figures, "curves")

    def _draw(self) -> Figure | None:
        rows, centralised = map(read_rows, self._files)
        if not any(row["kind"] == "round" for row in rows + centralised):
            return None
        figure = plots.curves(rows, centralised, self._clusters)
        self._handle.update(Image(data=plots.png(figure)))
        return figure


class Browser(widgets.VBox):
    """Steps through groups of utterances (clients, speakers): spectrogram, phones and labels aligned, and the sound.

    Its output carries the widget and a PNG of the first page, so that a static copy of the notebook keeps a picture.
    """

    def __init__(
        self,
        manifest: pd.DataFrame,
        group: str = "speaker",
        phones: pd.DataFrame | None = None,
        labels: Mapping[str, Mapping[str, UnitLabels]] | None = None,
    ) -> None:
        """``manifest`` has utterance, path, samples and the column ``group``; ``phones`` as in phones.parquet.

        ``labels`` maps the name of a codebook to the labels of each group, and those an utterance to its labels.
        """
        self._tables = dict(list(manifest.groupby(group)))
        self._phones = {} if phones is None else dict(list(phones.groupby("utterance")))
        self._labels = labels or {}
        self.group = widgets.Dropdown(options=list(self._tables), description=group)
        self.utterance = widgets.IntSlider(min=0, max=0, description="utterance", continuous_update=False)
        self.second = widgets.IntSlider(min=0, max=0, description="from (s)", continuous_update=False)
        self.text = widgets.HTML()
        self.picture = widgets.Image(format="png")
        self.sound = widgets.Audio(format="wav", autoplay=False, loop=False)
        self.group.observe(self._choose, "value")
        self.utterance.observe(self._open, "value")
        self.second.observe(self._turn, "value")
        super().__init__([widgets.HBox([self.group, self.utterance, self.second]), self.text, self.picture, self.sound])
        self._choose()

    def _choose(self, change: object = None) -> None:
        self.utterance.max = len(self._tables[self.group.value]) - 1
        if self.utterance.value:
            self.utterance.value = 0  # opens it, too
        else:
            self._open()

    def _open(self, change: object = None) -> None:
        row = self._tables[self.group.value].iloc[self.utterance.value]
        self.second.max = max(0, row.samples // audio.SAMPLE_RATE - 1)
        if self.second.value:
            self.second.value = 0  # turns the page, too
        else:
            self._turn()

    def _turn(self, change: object = None) -> None:
        row = self._tables[self.group.value].iloc[self.utterance.value]
        start = self.second.value * audio.SAMPLE_RATE
        waveform = audio.read(row.path, start, min(row.samples, start + PAGE * audio.SAMPLE_RATE))
        first, frames = start // audio.HOP, audio.frame_count(len(waveform))
        units = {name: own[self.group.value][row.utterance] for name, own in self._labels.items()}
        units = {name: sequence[first : first + frames] for name, sequence in units.items()}
        phones = self._phones.get(row.utterance)
        if phones is not None:
            phones = phones.assign(start_sample=phones.start_sample - start, end_sample=phones.end_sample - start)
        self.picture.value = plots.png(plots.aligned_units(waveform, phones, units, start=self.second.value))
        self.sound.value = _wav(waveform)
        seconds = row.samples / audio.SAMPLE_RATE
        text = row.get("text")
        said = f": {escape(text)}" if isinstance(text, str) else ""
        self.text.value = f"<b>{escape(row.utterance)}</b>, speaker {escape(row.speaker)}, {seconds:.1f} s{said}"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        return bundle | {"image/png": base64.b64encode(self.picture.value).decode()}


def _wav(waveform: torch.Tensor) -> bytes:
    buffer = BytesIO()
    samples = waveform[: int(LONGEST * audio.SAMPLE_RATE)].numpy()
    soundfile.write(buffer, samples, audio.SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
