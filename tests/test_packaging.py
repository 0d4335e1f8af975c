"""What is installed, by whom, from where; and that notebooks are stored without outputs."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from fedhubert_lib import params

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ("requirements.lock", "requirements-test.lock")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pins(lock: str) -> dict[str, str]:
    found = re.findall(r"^([a-z0-9._-]+)(?:\[[^\]]*\])?==([^ ;\\]+)", (ROOT / lock).read_text(), re.MULTILINE)
    return dict(found)


def name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_name_no_host_and_pin_everything_with_hashes(lock):
    text = (ROOT / lock).read_text()
    assert not re.search(r"://|@ |--(index|extra-index|find-links|trusted)", text)
    entries = [entry for entry in re.split(r"\n(?=[a-z0-9])", text) if not entry.startswith("#")]
    assert len(entries) > 100
    assert all(re.match(r"[a-z0-9._-]+(\[[^\]]*\])?==", entry) and "--hash=sha256:" in entry for entry in entries)


def test_locks_hold_what_the_project_asks_for():
    pinned, tested = pins(LOCKS[0]), pins(LOCKS[1])
    extras = PROJECT["optional-dependencies"]
    assert {name(each) for each in PROJECT["dependencies"] + extras["synthetic"]} <= pinned.keys()
    assert {name(each) for extra in extras.values() for each in extra} <= tested.keys()
    assert pinned.items() <= tested.items(), "what is tested is what is installed"
    assert pinned["flwr"] == "1.41.0"
    assert pinned["torch"].startswith("2.11.") and pinned["torchaudio"].startswith("2.11.")


def test_conda_installs_the_same_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, last = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert "python=3.11" in conda and PROJECT["requires-python"] == ">=3.11"
    # The project itself, from here: its dependencies come from pyproject.toml, with the extra that is locked.
    assert last == {"pip": ["-e .[synthetic]"]}
    assert "--extra synthetic --output-file requirements.lock" in (ROOT / "Makefile").read_text()


def test_make_lists_its_targets():
    said = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    for target in ("quickstart", "lab", "test", "test-all", "bench", "lint", "lock"):
        assert re.search(rf"^  make {target} +\w", said, re.MULTILINE)


def test_ci_can_be_run():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)


def test_no_telemetry():
    import fedhubert_lib

    assert fedhubert_lib.__version__ == PROJECT["version"]
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_licence():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()


def test_there_is_a_notebook_for_each_stage():
    assert [path.stem for path in NOTEBOOKS] == list(params.FOLDERS.values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_stripped(path: Path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"].keys() <= {"kernelspec", "language_info"}
    tagged = 0
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        tagged += "parameters" in tags
        assert cell["metadata"].keys() <= {"tags"}
        if cell["cell_type"] == "code" and "keep_output" not in tags:
            assert cell["outputs"] == [] and cell["execution_count"] is None
        # Papermill knows one parameters cell, and warns of names outside it as unknown: that cell has a line for each.
        assert len("".join(cell["source"]).splitlines()) <= 25 or "parameters" in tags
        assert not re.search(r"^\s*(def|class) ", "".join(cell["source"]), re.MULTILINE), "the library does the work"
    assert tagged == 1
