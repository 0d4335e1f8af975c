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

ROUND = {"kind": "round", "loss": 2.0, "accuracy_masked": 0.1, "accuracy_unmasked": 0.2}


class Handle:
    """Stands for the output of a cell."""

    def __init__(self) -> None:
        self.shown: list = []

    def display(self, item: object) -> None:
        self.shown.append(item)

    update = display


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    made: list[Handle] = []
    monkeypatch.setattr(notebook, "DisplayHandle", lambda: made.append(Handle()) or made[-1])
    return made


@pytest.fixture
def manifest(tmp_path) -> pd.DataFrame:
    rows = []
    for i, seconds in enumerate((1.0, 2.0, 12.0)):
        path = tmp_path / f"u{i}.flac"
        soundfile.write(path, 0.1 * np.sin(np.arange(int(seconds * 16_000)) / (5 + i)), audio.SAMPLE_RATE)
        rows.append((f"u{i}", str(path), "ab"[i // 2], int(seconds * 16_000), "<b>bold</b>"))
    return pd.DataFrame(rows, columns=["utterance", "path", "speaker", "samples", "text"])


def test_curves_are_drawn_while_rows_come_and_once_more_at_the_end(tmp_path, handles):
    with notebook.LiveCurves(tmp_path, clusters=20) as live:
        for number in (1, 2, 3):
            files.append_row(tmp_path / "metrics.jsonl", ROUND | {"round": number})
            live(ROUND)
    pictures = [item for item in handles[0].shown if isinstance(item, notebook.Image)]
    assert len(pictures) == 2, "the first row, then, since drawing is rationed, the end"
    assert pictures[0].data != pictures[1].data
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"curves.png", "curves.svg"}


def test_curves_are_kept_when_training_fails(tmp_path, handles):
    with pytest.raises(KeyboardInterrupt), notebook.LiveCurves(tmp_path):
        files.append_row(tmp_path / "metrics.jsonl", ROUND | {"round": 1})
        raise KeyboardInterrupt
    assert isinstance(handles[0].shown[-1], notebook.Image)


def test_curves_without_a_round_leave_no_picture(tmp_path, handles):
    with notebook.LiveCurves(tmp_path):
        files.append_row(tmp_path / "metrics.jsonl", {"kind": "plan", "rounds": 3})
    assert not (tmp_path / "figures").exists()


def test_progress_is_one_output_with_a_line_per_task(handles):
    progress = notebook.Progress()
    for done in range(1, 1001):
        progress("scan", done, 1000)
    progress("decode", 3, 3)
    (handle,) = handles
    assert "scan: 1,000 of 1,000\ndecode: 3 of 3" in handle.shown[-1].data
    assert len(handle.shown) < 20


def test_progress_tells_rate_and_time_left(handles, monkeypatch):
    progress = notebook.Progress()
    for second, done in enumerate((100, 110, 130)):
        monkeypatch.setattr(notebook.time, "monotonic", lambda now=1000.0 + second: now)
        progress("download (MiB)", done, 2_980)
    assert handles[0].shown[-1].data == "<pre>download (MiB): 130 of 2,980, 15.0 a second, 3:10 left</pre>"


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
    assert "u2" in browser.text.value
    pages.append(bytes(browser.picture.value))
    assert len(set(pages)) == 3
    assert all(page.startswith(b"\x89PNG") for page in pages)


def test_browser_output_carries_widget_and_picture(manifest):
    browser = notebook.Browser(manifest)
    bundle = browser._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == browser.picture.value


def test_long_utterances_are_cut_and_text_is_no_markup(manifest):
    browser = notebook.Browser(manifest)
    browser.group.value = "b"
    samples, rate = soundfile.read(io.BytesIO(browser.sound.value))
    assert len(samples) / rate == notebook.PAGE
    assert "<b>bold" not in browser.text.value
    assert "12.0 s" in browser.text.value


def test_pages_of_a_long_utterance_are_aligned(manifest):
    phones = pd.DataFrame(
        {"utterance": "u2", "start_sample": [0, 80_000], "end_sample": [80_000, 192_000], "phone": ["a", "b"]}
    )
    labels = {"k": {"a": {}, "b": {"u2": np.arange(599)}}}
    browser = notebook.Browser(manifest[manifest.speaker == "b"], phones=phones, labels=labels)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebook.plots, "aligned_units", lambda *page, start: drawn.append((*page, start)) or Figure())
        browser.second.value = 3
        browser.second.value = browser.second.max
    (wave, known, units, start), (last, _, _, _) = drawn
    assert start == 3
    np.testing.assert_allclose(wave, audio.read(manifest.path[2])[48_000:112_000])
    assert known.start_sample.tolist() == [-48_000, 32_000]
    assert units["k"].tolist() == list(range(150, 150 + audio.frame_count(64_000)))
    assert len(last) == audio.SAMPLE_RATE


def test_sounds_can_be_played_without_a_file():
    wave = 0.5 * torch.sin(torch.arange(16_000) / 10)
    page = notebook.sounds({"a <tone>": wave}).data
    assert "a &lt;tone&gt;" in page
    encoded = page.split("base64,")[1].split("'")[0]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(encoded)))
    assert rate == 16_000
    np.testing.assert_allclose(samples, wave.numpy(), atol=1e-4)


def test_properties_are_readable(handles):
    page = notebook.properties({"git": {"commit": "abc", "dirty": False}, "gpus": [], "peak_memory_bytes": 2**30}).data
    assert "commit abc, dirty False" in page
    assert "none" in page
    assert "1.00 GiB" in page


def test_headless_widgets_need_no_kernel(manifest):
    assert json.dumps(notebook.Browser(manifest).get_state(["layout"]), default=str)
