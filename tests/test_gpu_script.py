"""`make gpu`: runs to its end without a GPU, keeps what a cut-off phase has measured, says what is missing."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from fedhubert_lib import params

SCRIPT = params.ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_phase_runs_to_its_end_on_a_cpu(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--minutes", "14", "--out", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    phases = json.loads((tmp_path / "measured-tiny.json").read_text())["phases"]
    assert {phase["ended"] for phase in phases.values()} == {"done"}
    assert list(phases) == ["parity", "speed", "federation", "features", "learning"]
    assert all(row["holds"] for row in phases["parity"]["rows"])
    skipped = [row["skipped"] for row in phases["speed"]["rows"] if "skipped" in row]
    assert skipped and set(skipped) == {"needs CUDA"}
    assert phases["features"]["rows"][0]["labels_as_on_a_cpu"] == 1.0
    assert {"trained", "random"} <= {
        row["what"].split()[1].strip(",") for row in phases["learning"]["rows"] if "pnmi" in row
    }


def test_a_phase_that_is_cut_off_keeps_its_figures(gpu):
    program = 'import time; print(\'ROW {"what": "a", "x": 1}\', flush=True); print(\'words\'); time.sleep(60)'
    kept = []
    keep = lambda name, figures: kept.append((name, figures))  # noqa: E731
    ended = gpu.follow("speed", [sys.executable, "-c", program], dict(os.environ), 3.0, keep)
    assert ended == "stopped after 3 s"
    assert kept == [("speed", {"what": "a", "x": 1})]
    ended = gpu.follow("speed", [sys.executable, "-c", "raise SystemExit('no memory')"], dict(os.environ), 30.0, keep)
    assert ended.startswith("failed with exit code 1: no memory")


def test_a_machine_that_lacks_packages_is_told_where_they_come_from(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "NEEDED", ("sys", "absent_package"))
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    with pytest.raises(SystemExit, match="absent_package not installed.*run make gpu-wheels"):
        gpu.provide(str(tmp_path))


def test_every_phase_has_a_limit(gpu):
    assert gpu.PHASES.keys() == gpu.LIMITS.keys()
