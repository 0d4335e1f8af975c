"""Fixtures of several test files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from federation import NARROW

from fedhubert_lib import hubert

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 3}
"""A model for exports."""


LONGEST = {"test_chain", "test_engines", "test_federation_slow", "test_gpu_script", "test_learning", "test_sharing"}
"""Files of minutes: they come first, so that at the end no worker waits for another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Tests kill processes, not machines: what was written is there without waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def real_speech() -> Path:
    """The folder of real speech: ``librispeech_mini`` and the like; tests that need it are skipped without it."""
    folder = Path(os.environ.get("FEDHUBERT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real speech: {folder} is no folder; set FEDHUBERT_DATA")
    return folder


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One narrow layer in the preset tiny; clients get the configuration in the message."""
    monkeypatch.setitem(hubert.PRESETS, "tiny", {**hubert.PRESETS["tiny"], **NARROW})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums split over another number of threads round differently; and two workers fit two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty outputs/ of the test's own."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    monkeypatch.setenv("FEDHUBERT_OUTPUTS", str(folder))
    return folder
