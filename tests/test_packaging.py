"""Lock files, telemetry, and notebooks stored without outputs."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import size
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedhubert_lib import params

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ("requirements.lock", "requirements-test.lock")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pins(lock: str) -> dict[str, str]:
    versions = re.findall(r"^([a-z0-9._-]+)(?:\[[^\]]*\])?==([^ ;\\]+)", (ROOT / lock).read_text(), re.MULTILINE)
    return dict(versions)


def name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


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
    assert {name(requirement) for requirement in PROJECT["dependencies"] + extras["synthetic"]} <= pinned.keys()
    assert {name(requirement) for extra in extras.values() for requirement in extra} <= tested.keys()
    assert pinned.items() <= tested.items(), "what is tested is what is installed"
    for requirement in map(Requirement, PROJECT["dependencies"] + extras["test"]):
        assert requirement.specifier.contains(tested[name(str(requirement))]), requirement


def test_package_data_names_every_data_file_of_the_library():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {
        path
        for package, globs in declared.items()
        for g in globs
        for path in ROOT.glob(f"{package.replace('.', '/')}/{g}")
    }
    data = {path for path in (ROOT / "fedhubert_lib").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert data == packed != set()


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage == "kmeans" else pytest.mark.slow) for stage in size.ENTRIES]
)
def test_a_stage_loads_what_its_closure_counts(stage):
    """And nothing that is imported by name, such as hooks, hidden layers and noise, unless it is asked for."""
    names = size.modules()
    graph = {name: size.imports(path, names) - {name} for name, path in names.items()}
    script = f"import sys, fedhubert_lib.{size.ENTRIES[stage]}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    ours = {name.partition(".")[2] for name in loaded.stdout.split() if name.partition(".")[0] == "fedhubert_lib"}
    assert ours == size.closure(size.ENTRIES[stage], graph)


def test_what_every_notebook_imports_loads_no_scikit_learn():
    """Its import takes seconds: of each notebook's start, and at a real client of each message's process."""
    script = "import sys; from fedhubert_lib import corpora, kmeans, notebook, partition, planning, preflight, runs"
    script += ", distillation, pretraining; print({'sklearn', 'scipy.stats'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "set()"


def test_no_telemetry():
    import fedhubert_lib

    assert fedhubert_lib.__version__ == PROJECT["version"]
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_there_is_a_notebook_for_each_stage():
    assert [path.stem for path in NOTEBOOKS] == [*params.FOLDERS.values(), "own_experiment"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_stripped(path: Path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"].keys() <= {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert cell["metadata"].keys() <= {"tags"}
        if cell["cell_type"] == "code" and "keep_output" not in cell["metadata"].get("tags", []):
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in notebook["cells"]) == 1
