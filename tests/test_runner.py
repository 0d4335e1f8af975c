"""The runner end to end on small notebooks of its own, in a project of its own, as a person would call it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from fedhubert_lib import params, runner, runs

MODULES = ("__init__", "audio", "cli", "files", "identity", "index", "params", "provenance", "records", "runner")
MODULES += ("runs", "studies", "threads")

WORK = """\
(stage.folder / "made.bin").write_bytes(repr(work.RESULT).encode() + repr(stage.p.seed).encode())
"""

ROUNDS = """\
# Rounds with a checkpoint each. At round 3 it waits for as long as the file "gate" is there.
path, gate = stage.folder / "rounds.json", stage.run.parent / "gate"
begun = time.time()
files.append_row(stage.folder / "metrics.jsonl", {"kind": "plan", "rounds": 6, "time": begun})
done = json.loads(path.read_text()) if path.exists() else []
try:
    while len(done) < 6:
        if len(done) == 3:
            while gate.exists():
                time.sleep(0.05)
        done.append(len(done) + 1)
        files.write_json(path, done)
        row = {"kind": "round", "round": done[-1], "loss": 4.25, "accuracy_masked": 0.125, "seconds": 1.0}
        files.append_row(stage.folder / "metrics.jsonl", row | {"audio_seconds_per_second": 99.0, "time": time.time()})
except KeyboardInterrupt:
    time.sleep(4)  # a checkpoint that takes longer than an interrupted kernel is commonly given
    files.write_json(stage.folder / "checkpoint.json", done)
    raise
(stage.folder / "made.bin").write_bytes(repr(done).encode())
"""


class Project:
    """A copy of the runner with notebooks that take no time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "outputs" / "study"
        (root / "fedhubert_lib").mkdir(parents=True)
        (root / "notebooks").mkdir()
        for module in MODULES:
            shutil.copy(ROOT / "fedhubert_lib" / f"{module}.py", root / "fedhubert_lib")
        # What the stages of the bench need, these do not: the real one imports all of it.
        (root / "fedhubert_lib" / "preflight.py").write_text("def study(study, stages, run): pass\n")
        self.library("RESULT = 1\n")
        (root / "study.yaml").write_text("study: study\n")
        for stage in params.SECTIONS:
            self.notebook(stage, WORK)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("FEDHUBERT")}
        self.environment["PYTHONPATH"] = str(root)

    def library(self, source: str) -> None:
        (self.root / "fedhubert_lib" / "work.py").write_text(source)

    def notebook(self, stage: str, work: str, end: str = 'runs.finish(stage, {"figure": 1.5})') -> None:
        plain = params.SECTIONS[stage]().model_dump()
        cells = [
            nbformat.v4.new_markdown_cell(f"# {stage}"),
            nbformat.v4.new_code_cell(
                "\n".join(f"{name} = {value!r}" for name, value in plain.items()), metadata={"tags": ["parameters"]}
            ),
            nbformat.v4.new_code_cell(
                "import json, os, resource, signal, sys, time\nfrom fedhubert_lib import files, runs, work\n"
                f'stage = runs.start("{stage}", globals())'
            ),
            nbformat.v4.new_code_cell(work),
            nbformat.v4.new_code_cell(end),
        ]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
        nbformat.write(notebook, self.root / "notebooks" / f"{params.FOLDERS[stage]}.ipynb")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "fedhubert_lib.cli", *arguments]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        command = self.command("run", "study.yaml", *arguments)
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=800, check=False
        )

    def begin(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command("run", "study.yaml", *arguments),
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def folder(self, stage: str) -> Path:
        return self.run / params.FOLDERS[stage]

    def state(self, stage: str) -> str:
        return json.loads((self.run / "run.json").read_text())["stages"][stage]["state"]

    def rounds(self) -> list[int]:
        path = self.folder("corpus") / "rounds.json"
        return json.loads(path.read_text()) if path.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.05)


def lines(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stdout.splitlines() if line[:2].isdigit() and "done in" not in line]


def test_a_misspelt_parameter_starts_nothing(project):
    result = project("--set", "kmeans.clustrs=3")
    assert result.returncode == runner.USAGE
    assert "did you mean clusters?" in result.stderr and "Traceback" not in result.stderr
    assert not project.run.exists()


def test_a_folder_that_is_not_there_starts_nothing(project):
    result = project("--set", "pretrain.initial=nowhere")
    assert result.returncode == runner.USAGE
    assert f"pretrain.initial: {project.root / 'nowhere'}: no such file or folder" in result.stderr
    assert not project.run.exists()


def test_stages_in_the_wrong_order_start_nothing(project):
    result = project("--from", "evaluate", "--until", "corpus")
    assert result.returncode == runner.USAGE
    assert "--from evaluate comes after --until corpus" in result.stderr


def test_a_stage_whose_files_were_changed_is_made_anew(project):
    assert project("--until", "kmeans").returncode == runner.OK
    made = project.folder("partition") / "made.bin"
    before = made.read_bytes()
    made.write_bytes(b"something else")
    (project.folder("kmeans") / "made.bin").unlink()
    result = project("--until", "kmeans")
    assert lines(result)[0] == "00_corpus: unchanged, skipped"
    assert lines(result)[1:] == [f"{name}: {runner.DAMAGED}" for name in ("01_partition", "02_kmeans")]
    assert made.read_bytes() == before and (project.folder("kmeans") / "made.bin").exists()
    assert all("unchanged" in line for line in lines(project("--until", "kmeans")))


def test_stages_out_of_order_leave_no_empty_run(project):
    result = project("--from", "kmeans")
    assert result.returncode == runner.USAGE and "00_corpus: not done yet" in result.stderr
    assert not project.run.exists()


@pytest.mark.slow
def test_a_stage_that_is_refused_leaves_what_was_done(project):
    """As 05 with another task: refused at once, its good report stays; the one before it is in nobody's use."""
    project.notebook("corpus", f"with stage.working():\n    if stage.p.seed: raise ValueError('no noise')\n    {WORK}")
    assert project("--until", "corpus").returncode == runner.OK
    made = project.folder("corpus") / "made.bin"
    before = made.read_bytes(), (project.run / "00_corpus.ipynb").read_bytes()
    result = project("--until", "corpus", "--set", "corpus.seed=5")
    assert result.returncode == runner.FAILED and "no noise" in result.stderr
    assert (made.read_bytes(), (project.run / "00_corpus.ipynb").read_bytes()) == before
    assert project.state("corpus") == "done" and not any((project.run / ".previous").iterdir())
    assert lines(project("--until", "corpus")) == ["00_corpus: unchanged, skipped"]


def test_a_relative_place_of_all_runs_counts_from_the_project(project):
    project.environment["FEDHUBERT_OUTPUTS"] = "elsewhere"
    assert project("--until", "partition").returncode == runner.OK
    assert (project.root / "elsewhere" / "study" / "01_partition" / "done.json").is_file()
    assert not (project.root / "notebooks" / "elsewhere").exists()


def test_a_notebook_whose_parameters_would_be_overridden_starts_nothing(project):
    path = project.root / "notebooks/03_pretrain.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    result = project()
    assert result.returncode == runner.USAGE
    assert "03_pretrain.ipynb: 0 cells are tagged 'parameters'" in result.stderr
    assert not project.run.exists()


def test_one_stage_then_nothing_then_what_has_changed(project):
    assert lines(project("--until", "corpus")) == ["00_corpus: not run yet"]
    executed = nbformat.read(project.run / "00_corpus.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    assert not list(project.run.glob("*unfinished*"))
    assert project.state("corpus") == "done"
    record = json.loads((project.run / "run.json").read_text())
    assert {"study", "seed", "git", "versions", "hardware", "data"} <= record.keys()
    assert {"seconds", "peak_memory_bytes", "headline"} <= record["stages"]["corpus"].keys()
    assert lines(project("--until", "corpus")) == ["00_corpus: unchanged, skipped"]
    (project.run / "00_corpus.ipynb").rename(project.run / "00_corpus.unfinished.ipynb")  # killed just before that
    assert lines(project("--until", "corpus")) == ["00_corpus: its notebook was not saved: its results are kept"]
    result = project("--until", "corpus", "--set", "corpus.seed=5")
    assert lines(result) == ["00_corpus: parameters changed: seed 0 -> 5: starts anew"]
    aside = project.run / ".previous/00_corpus-1"
    assert f"what is there moves to {aside}" in result.stdout
    assert (aside / "made.bin").read_bytes() == b"10" and (aside / "00_corpus.ipynb").exists()
    result = project("--until", "corpus")
    assert lines(result) == [
        f"00_corpus: parameters changed: seed 5 -> 0: taken back from {aside}",
        "00_corpus: unchanged, skipped",
    ]
    assert (project.folder("corpus") / "made.bin").read_bytes() == b"10" and not aside.exists()
    assert project.state("corpus") == "done" and (project.run / "00_corpus.ipynb").exists()


@pytest.mark.slow
def test_the_whole_chain_and_what_each_change_runs_again(project):
    assert len(lines(project())) == 6
    assert (project.root / "outputs/index.html").exists()

    # Code alone: nothing is made again, unless it is asked for.
    project.library("RESULT = 1  # the same, said otherwise\n")
    (project.folder("kmeans") / "left.over").touch()
    got = lines(project("--until", "kmeans"))
    assert got == [
        f"{params.FOLDERS[s]}: library changed: work.py: what it made is kept, skipped; --force makes it anew"
        for s in ("corpus", "partition", "kmeans")
    ]
    assert (project.folder("kmeans") / "left.over").exists()

    # Other results: those after it see other inputs, and only they.
    project.library("RESULT = 1\n")
    got = lines(project("--set", "distill.seed=3"))
    assert [line.split(": ", 1)[1] for line in got] == ["unchanged, skipped"] * 4 + [
        "parameters changed: seed 0 -> 3: starts anew",
        "inputs changed: 04_distill: starts anew",
    ]

    # Words and pictures: run again, but what was made stays.
    (project.folder("evaluate") / "kept").touch()
    project.notebook("evaluate", "# a remark\n" + WORK)
    got = lines(project("--from", "evaluate", "--set", "distill.seed=3"))
    assert got == ["05_evaluate: notebook changed: its results are kept"]
    assert (project.folder("evaluate") / "kept").exists()

    got = lines(project("--from", "evaluate", "--force", "--set", "distill.seed=3"))
    assert got == ["05_evaluate: forced: starts anew"]
    assert not (project.folder("evaluate") / "kept").exists()
    assert (project.run / ".previous/05_evaluate-2/kept").exists()

    # What rests on something older is said to be stale.
    result = project("--until", "pretrain", "--set", "pretrain.seed=4", "--set", "distill.seed=3")
    assert result.returncode == runner.OK
    listed = subprocess.run(
        project.command("ls"), cwd=project.root, env=project.environment, capture_output=True, text=True, check=True
    )
    assert "04_distill stale; 05_evaluate stale" in listed.stdout and "1.5 (stale)" in listed.stdout
    project("--until", "pretrain", "--set", "distill.seed=3")

    # Out of order: said, not run.
    (project.folder("partition") / "done.json").unlink()
    result = project("--from", "kmeans")
    assert result.returncode == runner.USAGE and "run notebook 01_partition first" in result.stderr


@pytest.mark.parametrize(
    ("work", "end", "said"),
    [
        ("sys.exit(0)", "", "sys.exit"),
        pytest.param(WORK, "runs.finish(stage, {})\nsys.exit(0)", "sys.exit", marks=pytest.mark.slow),
        pytest.param(WORK, "", "without runs.finish", marks=pytest.mark.slow),
        pytest.param("1 / 0", "", "failed in cell [4]: ZeroDivisionError: division by zero", marks=pytest.mark.slow),
        pytest.param(
            WORK, 'runs.finish(stage, {"x": float("nan")})', "headline figure x is NaN", marks=pytest.mark.slow
        ),
    ],
)
def test_what_counts_as_failed(project, work, end, said):
    project.notebook("corpus", work, end)
    result = project()
    assert result.returncode == runner.FAILED
    assert said in result.stderr and "Traceback" not in result.stderr
    assert project.state("corpus") == "failed"
    assert not (project.folder("corpus") / "done.json").exists()
    assert not (project.run / "00_corpus.ipynb").exists()
    assert not runs.is_held(project.run / ".lock")
    assert (project.run / "00_corpus.unfinished.ipynb").exists()
    assert not project.folder("partition").exists()


@pytest.mark.slow
def test_a_parameter_overridden_in_the_notebook_counts_as_failed(project):
    path = project.root / "notebooks/00_corpus.ipynb"
    path.write_text(path.read_text().replace("stage = runs.start", "minutes = 7.0\\nstage = runs.start"))
    result = project()
    assert result.returncode == runner.FAILED and "has overridden a parameter" in result.stderr


@pytest.mark.slow
def test_a_killed_kernel_is_told_apart_and_gone_on_from(project):
    kill = "if not json.loads(path.read_text())[3:]: os.kill(os.getpid(), signal.SIGKILL)"
    project.notebook(
        "corpus",
        ROUNDS.replace(
            "        files.append_row(stage.folder", f"        {kill}\n        files.append_row(stage.folder", 1
        ),
    )
    result = project("--until", "corpus")
    assert result.returncode == runner.DIED and "its kernel died" in result.stderr
    assert project.state("corpus") == "died"
    assert not (project.folder("corpus") / "done.json").exists()
    assert project.rounds() == [1]
    project.notebook("corpus", ROUNDS)
    result = project("--until", "corpus")
    assert result.returncode == runner.OK
    assert "was not finished: goes on where it stopped (notebook changed)" in result.stdout
    assert (project.folder("corpus") / "made.bin").read_bytes() == b"[1, 2, 3, 4, 5, 6]"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_lets_the_checkpoint_finish_and_the_same_command_goes_on(project, number):
    project.notebook("corpus", ROUNDS)
    gate = project.root / "outputs/gate"
    gate.parent.mkdir()
    gate.touch()
    process = project.begin("--until", "partition")
    wait_for(lambda: len(project.rounds()) == 3, process)
    process.send_signal(number)
    out, error = process.communicate(timeout=600)
    assert process.returncode == runner.INTERRUPTED, (out, error)
    assert f"stopped by {number.name}; the same command goes on" in error
    assert json.loads((project.folder("corpus") / "checkpoint.json").read_text()) == [1, 2, 3]
    assert project.state("corpus") == "interrupted"
    gate.unlink()
    result = project("--until", "partition")
    assert result.returncode == runner.OK
    assert "00_corpus: was not finished: goes on where it stopped" in result.stdout
    assert (project.folder("corpus") / "made.bin").read_bytes() == b"[1, 2, 3, 4, 5, 6]"


@pytest.mark.slow
def test_progress_is_shown_and_a_second_runner_is_refused_and_a_killed_one_replaced(project):
    project.notebook("corpus", ROUNDS)
    gate = project.root / "outputs/gate"
    gate.parent.mkdir()
    gate.touch()
    process = project.begin("--until", "corpus")
    wait_for(lambda: len(project.rounds()) == 3, process)
    result = project("--until", "corpus")
    assert result.returncode == runner.USAGE and "in use by fedhubert run, process" in result.stderr
    shown = ""
    while "round 3/6" not in shown:
        shown = process.stdout.readline()
        assert shown, "no progress was shown"
    assert shown == "00_corpus: round 3/6, loss 4.25, masked accuracy 0.125, 99 audio s/s, 3 s left\n"
    process.kill()
    process.communicate()
    gate.unlink()
    result = project("--until", "corpus")  # the old kernel takes a moment to notice that its parent is gone
    assert result.returncode == runner.OK, result.stderr
    assert (project.folder("corpus") / "made.bin").read_bytes() == b"[1, 2, 3, 4, 5, 6]"


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_nothing_half_written(project):
    full = """\
stage.folder  # there before the disk is full
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    with files.atomic(stage.folder / "model.bin") as temporary:
        temporary.write_bytes(bytes(5000))
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    project.notebook("corpus", full)
    result = project("--until", "corpus")
    assert result.returncode == runner.FAILED and "OSError: [Errno 27]" in result.stderr
    left = {path.name for path in project.folder("corpus").iterdir()}
    assert left == {"params.yaml", "begun.json", "figures"}
