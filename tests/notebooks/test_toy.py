"""The notebooks as they stand, in the order a person opens them, with their defaults: the study toy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import papermill
import pytest
from chapters import NOTEBOOKS, ROOT

from fedhubert_lib import params

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


@pytest.mark.parametrize("objective", ["distilhubert", "hubert", "soft-targets"])
def test_every_objective_goes_through_the_notebooks(toy, tmp_path, monkeypatch, objective):
    """A student of distilhubert alone names no clusters: it has no accuracy to draw, and no head."""
    monkeypatch.setenv("FEDHUBERT_OUTPUTS", str(tmp_path))
    last = ("distill", "evaluate")
    folders = [params.FOLDERS[stage] for stage in last]
    shutil.copytree(toy, tmp_path / "other", ignore=lambda *_: folders)
    for stage, chosen in zip(
        last, ({"objectives": [objective], "soft_weight": 0.5}, {"seeds": 1, "probe_steps": 10}), strict=True
    ):
        executed = papermill.execute_notebook(
            NOTEBOOKS[stage], tmp_path / f"{stage}.ipynb", {"run": "other", **chosen}, progress_bar=False, cwd=tmp_path
        )
        outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    report = json.loads((tmp_path / "other/05_evaluate/report.json").read_text())
    assert {"student", "centralised-student"} <= {row["system"] for row in report["systems"]}
