"""The notebooks as they stand, in the order a person opens them, with their defaults: the study toy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest
from chapters import NOTEBOOKS, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # a minute or two; a busy machine takes its time


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that the notebooks leave."""
    outputs = tmp_path_factory.mktemp("toy")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--color=no", "--nbval-lax"]
    command += ["--nbval-cell-timeout=1200", "--nbval-kernel-startup-timeout=600", *map(str, NOTEBOOKS.values())]
    environment = os.environ | {"FEDHUBERT_OUTPUTS": str(outputs)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return outputs / "toy"


def test_notebooks_run_as_they_stand(toy):
    assert len(list(toy.glob("*/done.json"))) == len(NOTEBOOKS)


@pytest.mark.parametrize("name", ["loss", *golden.MEASURES])
def test_toy_reaches_its_golden_figures(toy, name):
    """On any processor: digests of weights differ between processors, these figures by less than the tolerance."""
    expected = json.loads(golden.GOLDEN.read_text())[name]
    assert golden.figures(toy)[name] == pytest.approx(expected["figures"], abs=expected["tolerance"])
