"""The notebooks as they stand, cell by cell with their own defaults, in the order a person opens them."""

import os
import subprocess
import sys

import pytest
from chapters import NOTEBOOKS, ROOT


@pytest.mark.timeout(1800)  # a minute or two; a busy machine takes its time
def test_notebooks_run_as_they_stand(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--color=no", "--nbval-lax"]
    command += ["--nbval-cell-timeout=600", "--nbval-kernel-startup-timeout=120", *map(str, NOTEBOOKS.values())]
    environment = os.environ | {"FEDHUBERT_OUTPUTS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert len(list((tmp_path / "toy").glob("*/done.json"))) == len(NOTEBOOKS)
