"""Output of notebooks: figures in place, sound to play, curves that grow, a browser of utterances.

The one module that imports IPython and ipywidgets. Everything here works headless too: the executed notebook then holds
the final figure, and the browser its first page as a PNG beside the widget.
"""

import base64
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from inspect import getsource
from pathlib import Path
from symtable import symtable
from typing import Any

import ipywidgets as widgets
import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import HTML, Audio, DisplayHandle, Image
from IPython.display import display as _display
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from fedhubert_lib import audio, plots, progress, reference
from fedhubert_lib.files import read_rows
from fedhubert_lib.params import FOLDERS

SOUND_SECONDS = 8.0
"""The most that is embedded of a clip: a notebook must stay small."""
PAGE_SECONDS = 4
"""Length of a page of the browser: on a longer one, labels of 20 ms cannot be read."""


def _name_the_public(*_: object) -> None:
    """Let Tab behind a module of the library list what it defines, not what it imports or keeps to itself (PEP 562)."""
    for place, module in sys.modules.copy().items():  # one step of the interpreter: other threads import meanwhile
        if place.startswith("fedhubert_lib.") and "__dir__" not in vars(module):
            symbols = symtable(getsource(module), place, "exec").get_symbols()
            names = [symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_imported()]
            public = getattr(module, "__all__", [name for name in names if not name.startswith("_")])
            module.__dir__ = public.copy  # type: ignore[method-assign]


if (_shell := get_ipython()) is not None:
    _shell.events.register("post_run_cell", _name_the_public)


def show(figure: Figure, folder: Path, name: str) -> None:
    """Save ``figure`` as NAME.png and NAME.svg in ``folder`` and show it."""
    plots.save(figure, folder, name)
    _display(Image(data=(folder / f"{name}.png").read_bytes()))


def table(*frames: pd.DataFrame, digits: int = 3) -> None:
    """Show tables one below the other, rounded to ``digits``, columns of bytes as GiB; an empty one as "none"."""
    for frame in frames:
        sizes = [name for name in frame.columns if str(name).endswith("_bytes")]
        frame = frame.assign(**{name: frame[name] / 2**30 for name in sizes})
        frame = frame.rename(columns={name: f"{name.removesuffix('_bytes')} (GiB)" for name in sizes})
        with pd.option_context("display.max_colwidth", None):  # a path that is cut off cannot be looked up
            _display(frame.round(digits) if frame.size else HTML("<em>none</em>"))


def properties(values: Mapping[str, Any]) -> None:
    """Show names and values in two columns, such as a stage's provenance; nested mappings become one line."""
    words = pd.Series({name: _words(name, value) for name, value in values.items()}).to_frame()
    with pd.option_context("display.max_colwidth", None):
        rows = words.to_html(header=False, border=0).replace("<td>", '<td style="text-align: left">')
        _display(HTML(rows))


def _words(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(key, item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if "bytes" in name:
        return f"{value / 2**30:.2f} GiB" if value >= 2**27 else f"{value / 2**20:.2f} MiB"
    return f"{value / 60:.1f} min" if name.endswith("seconds") and value >= 100 else str(value)


def sounds(clips: Mapping[str, torch.Tensor]) -> None:
    """Show a line per clip: caption and player. Waveforms [samples] at 16 kHz, embedded up to ``SOUND_SECONDS``."""
    rows = (
        f"<tr><td>{escape(caption)}</td><td>{_player(clip)._repr_html_()}</td></tr>" for caption, clip in clips.items()
    )
    _display(HTML(f"<table>{''.join(rows)}</table>"))


def _player(waveform: torch.Tensor) -> Audio:
    samples = waveform[: int(SOUND_SECONDS * audio.SAMPLE_RATE)].clamp(-1, 1).numpy()  # as a loudspeaker does
    return Audio(samples, rate=audio.SAMPLE_RATE, normalize=False)


class Progress:
    """A progress bar per task. Give it to a stage as ``on_progress``, or its ``row`` as ``on_row``."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``task`` are done; ``total`` 0: unknown."""
        if (bar := self._bars.get(task)) and (done < bar.n or bar.total != (total or None)):
            del self._bars[task]  # the next one of that name: words, then speech
        bar = self._bar(task, total=total or None, initial=done)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    def row(self, row: Mapping[str, Any]) -> None:
        """Count the rows that a stage writes to metrics.jsonl, by codebook, kind and action, and show the latest."""
        names = [str(row[name]) for name in ("codebook", "kind", "action") if name in row]
        bar = self._bar(" ".join(names), unit=" rows")
        figures = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "time"}
        bar.set_postfix(dict(list(figures.items())[:5]), refresh=False)
        bar.update()

    def _bar(self, task: str, **options: Any) -> tqdm:
        if task not in self._bars:
            self._bars[task] = tqdm(desc=task, **options)
        return self._bars[task]


@contextmanager
def live_curves(run: Path, stage: str, clusters: int | None = None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Training curves that grow while ``stage`` of a run trains: a line of progress and a figure, both redrawn from
    metrics.jsonl as rows are written.

    The block gets the stage's ``on_row``. ``clusters`` draws what guessing among them would give; the band of the
    reference that belongs to the run is drawn where there is one, else a line says why not. On leaving, also by an
    error, the last figure is drawn, so that a headless run holds the final state, and saved as figures/curves. At most
    one fiftieth of the time goes into drawing.
    """
    folder, (chosen, words) = run / FOLDERS[stage], reference.of(run, stage)
    band = None if chosen is None else chosen.curves[stage]
    _display(HTML(f"<em>{escape(words)}</em>"))
    line, handle, due = DisplayHandle(), DisplayHandle(), 0.0
    line.display(HTML("<em>waiting for the first round …</em>"))
    handle.display(HTML(""))

    def draw() -> Figure | None:
        rows, centralised = (read_rows(folder / part / "metrics.jsonl") for part in ("", "centralised"))
        pooled = progress.last_round(centralised)
        words = progress.last_round(rows), progress.at_work(rows), pooled and f"centralised {pooled}"
        line.update(HTML(f"<code>{escape('; '.join(filter(None, words)))}</code>"))
        if not any(row["kind"] == "round" for row in rows + centralised):
            return None
        figure = plots.curves(rows, centralised, clusters, band)
        handle.update(Image(data=plots.png(figure)))
        return figure

    def on_row(row: Mapping[str, Any]) -> None:
        nonlocal due
        if (start := time.monotonic()) >= due:
            draw()
            due = time.monotonic() + max(1.0, 50 * (time.monotonic() - start))

    try:
        yield on_row
    finally:
        if (figure := draw()) is not None:
            plots.save(figure, folder / "figures", "curves")


def verdict(run: Path, stage: str) -> None:
    """Show in words whether the curves of ``stage`` of a run are normal; see ``reference.verdict``."""
    _display(HTML("<br>".join(map(escape, reference.verdict(run, stage).splitlines()))))


class Browser(widgets.VBox):
    """Steps through groups of utterances (clients, speakers): spectrogram, phones and labels aligned, and the sound."""

    def __init__(
        self,
        manifest: pd.DataFrame,
        group: str = "speaker",
        phones: pd.DataFrame | None = None,
        labels: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """``manifest`` has utterance, path, samples and the column ``group``; ``phones`` as in phones.parquet.

        ``labels`` maps the name of a codebook to the labels of each group: of an utterance [frames].
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
        waveform = audio.read(row.path, start, min(row.samples, start + PAGE_SECONDS * audio.SAMPLE_RATE))
        frames = slice(start // audio.HOP, start // audio.HOP + audio.frame_count(len(waveform)))
        units = {name: labels[self.group.value][row.utterance][frames] for name, labels in self._labels.items()}
        phones = self._phones.get(row.utterance)
        if phones is not None:
            phones = phones.assign(start_sample=phones.start_sample - start, end_sample=phones.end_sample - start)
        self.picture.value = plots.png(plots.aligned_units(waveform, phones, units, start=self.second.value))
        self.sound.value = _player(waveform).data
        text = f": {escape(row.text)}" if isinstance(row.get("text"), str) else ""
        length = f"{row.samples / audio.SAMPLE_RATE:.1f} s"
        self.text.value = f"<b>{escape(row.utterance)}</b>, speaker {escape(row.speaker)}, {length}{text}"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        return bundle | {"image/png": base64.b64encode(self.picture.value).decode()}
