"""What notebooks show, without a notebook: curves while rows are written, the browser's pages, tables and sound."""

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from matplotlib.figure import Figure

from fedhubert_lib import audio, files, notebook

ROUND = {"kind": "round", "time": 0.0, "loss": 2.0, "accuracy_masked": 0.1, "accuracy_unmasked": 0.2}


class Handle:
    """Stands for the output of a cell."""

    def __init__(self) -> None:
        self.shown: list = []

    def display(self, item: object) -> None:
        self.shown.append(item)

    update = display


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    handle = Handle()
    monkeypatch.setattr(notebook, "DisplayHandle", lambda: handle)
    return handle


@pytest.fixture
def manifest(tmp_path) -> pd.DataFrame:
    rows = []
    for i, seconds in enumerate((1.0, 2.0, 12.0)):
        path = tmp_path / f"u{i}.flac"
        soundfile.write(path, 0.1 * np.sin(np.arange(int(seconds * 16_000)) / (5 + i)), audio.SAMPLE_RATE)
        rows.append((f"u{i}", str(path), "ab"[i // 2], int(seconds * 16_000), "<b>bold</b>"))
    return pd.DataFrame(rows, columns=["utterance", "path", "speaker", "samples", "text"])


def test_curves_are_drawn_while_rows_come_and_once_more_at_the_end(tmp_path, handle):
    folder = tmp_path / "03_pretrain"
    with notebook.live_curves(tmp_path, "pretrain", clusters=20) as live:
        files.append_row(folder / "metrics.jsonl", {"kind": "plan", "rounds": 4})
        for number in (1, 2, 3):
            files.append_row(folder / "metrics.jsonl", ROUND | {"round": number})
            live(ROUND)
    pictures = [item.data for item in handle.shown if isinstance(item, notebook.Image)]
    assert len(set(pictures)) == len(pictures) == 2, "the first row, then, since drawing is rationed, the end"
    assert {path.name for path in (folder / "figures").iterdir()} == {"curves.png", "curves.svg"}
    lines = [item.data for item in handle.shown if isinstance(item, notebook.HTML)]
    assert "round 1 of 4" in lines[-2] and "round 3 of 4" in lines[-1]


def test_curves_are_kept_when_training_fails_and_absent_without_a_round(tmp_path, handle):
    metrics = tmp_path / "03_pretrain" / "metrics.jsonl"
    with notebook.live_curves(tmp_path, "pretrain"):
        files.append_row(metrics, {"kind": "plan", "rounds": 3})
    assert not (metrics.parent / "figures").exists()
    with pytest.raises(KeyboardInterrupt), notebook.live_curves(tmp_path, "pretrain"):
        files.append_row(metrics, ROUND | {"round": 1})
        raise KeyboardInterrupt
    assert isinstance(handle.shown[-1], notebook.Image)


def test_progress_is_a_bar_per_task(monkeypatch):
    bars = []
    monkeypatch.setattr(notebook, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    progress = notebook.Progress()
    for done in (100, 110, 2_980, 2_980):
        progress("download (MiB)", done, 2_980)
    progress("download (MiB)", 7, 60)
    progress("download (MiB)", 60, 60)
    progress("download (MiB)", 256, 28_000)
    for number in (1, 2):
        progress.row({"kind": "lloyd", "codebook": "federated", "round": number, "inertia": 0.5, "time": 1.0})
    assert [(bar.desc, bar.total, bar.initial, bar.n) for bar in bars] == [
        ("download (MiB)", 2_980, 100, 2_980),
        ("download (MiB)", 60, 7, 60),
        ("download (MiB)", 28_000, 256, 256),
        ("federated lloyd", None, 0, 2),
    ]
    assert bars[3].postfix in ("inertia=0.5, round=2", "round=2, inertia=0.5")


class Bar(notebook.tqdm.__mro__[1]):
    """A bar of text, printed to nowhere."""

    def __init__(self, **options: object) -> None:
        super().__init__(file=io.StringIO(), **options)


def test_browser_turns_pages_by_group_and_utterance(manifest):
    labels = {"k": {"a": {u: np.zeros(1000, int) for u in ("u0", "u1")}, "b": {"u2": np.ones(1000, int)}}}
    browser = notebook.Browser(manifest, labels=labels)
    assert browser.group.options == ("a", "b")
    pages = [bytes(browser.picture.value)]
    assert "u0" in browser.text.value
    browser.utterance.value = 1
    assert "u1" in browser.text.value
    pages.append(bytes(browser.picture.value))
    browser.group.value = "b"
    assert browser.utterance.value == browser.utterance.max == 0
    assert "u2" in browser.text.value and "12.0 s" in browser.text.value and "<b>bold" not in browser.text.value
    pages.append(bytes(browser.picture.value))
    assert len(set(pages)) == 3 and all(page.startswith(b"\x89PNG") for page in pages)
    samples, rate = soundfile.read(io.BytesIO(browser.sound.value))
    assert len(samples) / rate == notebook.PAGE_SECONDS


def test_browser_output_carries_widget_and_picture(manifest):
    browser = notebook.Browser(manifest)
    bundle = browser._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == browser.picture.value
    assert json.dumps(browser.get_state(["layout"]), default=str), "headless, it needs no kernel"


def test_pages_of_a_long_utterance_are_aligned(manifest, monkeypatch):
    phones = pd.DataFrame(
        {"utterance": "u2", "start_sample": [0, 80_000], "end_sample": [80_000, 192_000], "phone": ["a", "b"]}
    )
    labels = {"k": {"a": {}, "b": {"u2": np.arange(599)}}}
    browser, drawn = notebook.Browser(manifest[manifest.speaker == "b"], phones=phones, labels=labels), []
    monkeypatch.setattr(notebook.plots, "aligned_units", lambda *page, start: drawn.append((*page, start)) or Figure())
    browser.second.value = 3
    browser.second.value = browser.second.max
    (waveform, shifted, units, start), (last, _, _, _) = drawn
    assert start == 3
    np.testing.assert_allclose(waveform, audio.read(manifest.path[2])[48_000:112_000])
    assert shifted.start_sample.tolist() == [-48_000, 32_000]
    assert units["k"].tolist() == list(range(150, 150 + audio.frame_count(64_000)))
    assert len(last) == audio.SAMPLE_RATE


@pytest.fixture
def displayed(monkeypatch):
    """What the notebook shows, in order."""
    shown = []
    monkeypatch.setattr(notebook, "_display", shown.append)
    return shown


def test_sounds_can_be_played_without_a_file(displayed):
    waveform = 0.5 * torch.sin(torch.arange(16_000) / 10)
    notebook.sounds({"a <tone>": waveform})
    page = displayed[0].data
    assert "a &lt;tone&gt;" in page
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(page.split("base64,")[1].split('"')[0])))
    assert rate == 16_000
    np.testing.assert_allclose(samples, waveform.numpy(), atol=1e-4)


def test_sounds_beyond_full_scale_can_be_played(displayed):
    """Which float WAV files hold, and every resampler makes."""
    notebook.sounds({"loud": torch.tensor([0.0, 1.3, -1.0001] * 400)})
    samples, _ = soundfile.read(io.BytesIO(base64.b64decode(displayed[0].data.split("base64,")[1].split('"')[0])))
    np.testing.assert_allclose(samples[:3], [0, 1, -1], atol=1e-4)


def test_properties_are_readable(displayed):
    values = {"git": {"commit": "abc", "dirty": False}, "gpus": [], "peak_memory_bytes": 2**30, "<b>": 1}
    values |= {"bytes": 2**20, "seconds": 150.0, "client_seconds": 9.5}
    notebook.properties(values)
    page = displayed[0].data
    assert all(word in page for word in ("commit abc, dirty False", "none", "1.00 GiB", "&lt;b&gt;"))
    assert all(word in page for word in ("1.00 MiB", "2.5 min", "9.5"))


def test_sizes_in_a_table_are_in_gib(displayed):
    notebook.table(pd.DataFrame({"peak_memory_bytes": [2**30, 2**29], "loss": [1.0, 2.0]}))
    (frame,) = displayed
    assert frame["peak_memory (GiB)"].tolist() == [1.0, 0.5] and frame.loss.tolist() == [1.0, 2.0]
