"""The first notebook as it stands, without papermill: what nbval runs of it ends without an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chapters import NOTEBOOKS, ROOT

pytestmark = pytest.mark.timeout(3600)  # seconds; a busy machine takes its time


def test_the_first_notebook_runs_as_it_stands(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--color=no", "--nbval-lax"]
    command += ["--nbval-cell-timeout=1200", "--nbval-kernel-startup-timeout=600"]
    command += [str(NOTEBOOKS["corpus"])]
    environment = os.environ | {"FEDHUBERT_OUTPUTS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert (tmp_path / "toy/00_corpus/done.json").is_file()
