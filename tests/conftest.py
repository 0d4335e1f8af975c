"""What all tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_speech() -> Path:
    """The folder of real speech: ``librispeech_mini`` and the like; tests that need it are skipped without it."""
    folder = Path(os.environ.get("FEDHUBERT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real speech: {folder} is no folder; set FEDHUBERT_DATA")
    return folder


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty outputs/ of the test's own."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    monkeypatch.setenv("FEDHUBERT_OUTPUTS", str(folder))
    return folder
