"""The runner end to end on small notebooks, in a project of their own, as a person would call it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT

from fedhubert_lib import cli, files, identity, params, preflight, progress, runner, runs, studies

WORK = """\
with stage.working():
    (stage.folder / "made.bin").write_bytes(repr(work.RESULT).encode() + repr(stage.p.seed).encode())
"""

ROUNDS = """\
# Rounds with a checkpoint each. At round 3 it waits for as long as the file "gate" exists.
path, gate = stage.folder / "rounds.json", stage.run.parent / "gate"
with stage.working():
    files.append_row(stage.folder / "metrics.jsonl", {"kind": "plan", "rounds": 6, "time": time.time()})
    done = json.loads(path.read_text()) if path.exists() else []
    try:
        while len(done) < 6:
            while len(done) == 3 and gate.exists():
                time.sleep(0.05)
            done.append(len(done) + 1)
            files.write_json(path, done)
            row = {"kind": "round", "round": done[-1], "loss": 4.25, "accuracy_masked": 0.125, "seconds": 1.0}
            row |= {"audio_seconds_per_second": 99.0, "time": time.time()}
            files.append_row(stage.folder / "metrics.jsonl", row)
    except KeyboardInterrupt:
        time.sleep(4)  # a checkpoint that takes longer than an interrupted kernel is commonly given
        files.write_json(stage.folder / "checkpoint.json", done)
        raise
    (stage.folder / "made.bin").write_bytes(repr(done).encode())
"""


class Project:
    """A copy of the bench with notebooks that take no time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "outputs" / "study"
        shutil.copytree(ROOT / "fedhubert_lib", root / "fedhubert_lib", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "notebooks").mkdir()
        # The bench's own stages need things that these do not.
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
        parameters = "\n".join(f"{name} = {value!r}" for name, value in plain.items())
        imports = "import json, os, resource, signal, sys, time\nfrom fedhubert_lib import files, runs, work\n"
        sources = [parameters, f'{imports}stage = runs.start("{stage}", globals())', work, end]
        cells = [nbformat.v4.new_markdown_cell(f"# {stage}"), *map(nbformat.v4.new_code_cell, sources)]
        cells[1].metadata["tags"] = ["parameters"]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
        nbformat.write(notebook, self.root / "notebooks" / f"{params.FOLDERS[stage]}.ipynb")

    def begin(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "fedhubert_lib.cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.root, env=self.environment, **pipes)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.begin("run", "study.yaml", *arguments)
        out, error = process.communicate(timeout=800)
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def folder(self, stage: str) -> Path:
        return self.run / params.FOLDERS[stage]

    def state(self, stage: str) -> str:
        return runs.state(self.run, stage)["state"]

    def rounds(self) -> list[int]:
        path = self.folder("corpus") / "rounds.json"
        return json.loads(path.read_text()) if path.exists() else []

    def until_round_3(self, *arguments: str) -> subprocess.Popen:
        """A runner whose first stage waits in round 3 until ``outputs/gate`` is removed."""
        self.notebook("corpus", ROUNDS)
        self.gate.parent.mkdir()
        self.gate.touch()
        process = self.begin("run", "study.yaml", *arguments)
        wait_for(lambda: len(self.rounds()) == 3, process)
        return process

    @property
    def gate(self) -> Path:
        return self.root / "outputs" / "gate"


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "kmeans.clustrs=3"), "clusters"),
        (("--from", "evaluate", "--until", "corpus"), "--from evaluate comes after --until corpus"),
        (("--from", "kmeans"), "00_corpus: not done yet"),
    ],
)
def test_a_usage_error_starts_nothing(project, arguments, message):
    result = project(*arguments)
    assert result.returncode == runner.USAGE
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not project.run.exists()


def test_a_runner_that_is_refused_leaves_the_folder_to_the_other(outputs, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.1)
    with runs.holding(outputs / "toy/.runner.lock", "the other"):
        with pytest.raises(runs.RunError, match="in use by the other"):
            runner.run(studies.load(ROOT / "params/toy.yaml"), [])
        assert (outputs / "toy/.runner.lock").exists()
    runner.run(studies.load(ROOT / "params/toy.yaml"), [])
    assert not (outputs / "toy").exists()


def test_a_run_that_begins_later_says_that_recordings_have_changed(outputs, tmp_path, monkeypatch, capsys):
    root = tmp_path / "recordings"
    (root / "ana").mkdir(parents=True)
    (root / "ana/1.wav").touch()
    study = studies.load(ROOT / "params/toy.yaml", ["corpus.kind=folder", f"corpus.root={root}"])
    done = {"identity": {"inputs": identity.listings(study.corpus)}}
    files.write_json(outputs / study.run / "00_corpus/done.json", done)

    def told() -> str:
        runner.run(study, [])
        return capsys.readouterr().out

    assert told() == ""
    (root / "ana/2.wav").touch()
    assert told().startswith("corpus.root: not the files that 00_corpus read")
    deployed = study.model_copy(update={"kmeans": study.kmeans.model_copy(update={"engine": "deployment"})})
    runner.run(deployed, [])
    assert capsys.readouterr().out == "", "a deployment's server has a part of the speech"
    with monkeypatch.context() as unreadable:
        unreadable.setattr(identity, "listings", lambda p: os.listdir(tmp_path / "not there"))
        assert told() == "", "nor is a folder that cannot be read a reason to stop"
    assert told() != ""
    shutil.rmtree(root)
    assert told() == "", "of a run that was copied here without its audio"


def test_a_notebook_without_a_parameters_cell_starts_nothing(project):
    path = project.root / "notebooks/03_pretrain.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    result = project()
    assert result.returncode == runner.USAGE
    assert "03_pretrain.ipynb: 0 cells are tagged 'parameters'" in result.stderr
    assert not project.run.exists()


@pytest.mark.slow
def test_a_stage_whose_files_were_changed_starts_anew(project):
    project.environment["FEDHUBERT_OUTPUTS"] = "elsewhere"  # a relative path counts from the project
    project.run = project.root / "elsewhere" / "study"
    assert project("--until", "kmeans").returncode == runner.OK
    made = project.folder("partition") / "made.bin"
    before = made.read_bytes()
    made.write_bytes(b"something else")
    (project.folder("kmeans") / "made.bin").unlink()
    result = project("--until", "kmeans")
    assert lines(result) == [
        "00_corpus: unchanged, skipped",
        f"01_partition: {runs.DAMAGED}: starts anew",
        f"02_kmeans: {runs.DAMAGED}: starts anew",
    ]
    assert made.read_bytes() == before and (project.folder("kmeans") / "made.bin").exists()


def test_one_stage_then_nothing_then_what_has_changed(project):
    assert lines(project("--until", "corpus")) == ["00_corpus: not run yet"]
    executed = nbformat.read(project.run / "00_corpus.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    assert not list(project.run.glob("*unfinished*"))
    record = json.loads((project.run / "run.json").read_text())
    assert {"study", "seed", "git", "versions", "hardware", "data"} <= record.keys()
    assert {"seconds", "peak_memory_bytes", "headline"} <= runs.state(project.run, "corpus").keys()
    assert lines(project("--until", "corpus")) == ["00_corpus: unchanged, skipped"]
    (project.run / "00_corpus.ipynb").rename(project.run / "00_corpus.unfinished.ipynb")  # killed just before that
    (line,) = lines(project("--until", "corpus"))
    assert "its notebook was not saved" in line and "its results are kept" in line
    result = project("--until", "corpus", "--set", "corpus.seed=5")
    assert lines(result) == ["00_corpus: parameters changed: seed 0 -> 5: starts anew"]
    aside = project.run / ".previous/00_corpus-1"
    assert (aside / "made.bin").read_bytes() == b"10" and (aside / "00_corpus.ipynb").exists()
    (aside / "00_corpus.html").write_text("its page")
    result = project("--until", "corpus")
    assert lines(result) == [
        f"00_corpus: parameters changed: seed 5 -> 0: taken back from {aside}",
        "00_corpus: unchanged, skipped",
    ]
    assert (project.folder("corpus") / "made.bin").read_bytes() == b"10" and not aside.exists()
    assert project.state("corpus") == "done" and (project.run / "00_corpus.ipynb").exists()
    assert (project.run / "00_corpus.html").read_text() == "its page"


def test_a_clock_that_was_set_back_costs_no_results(outputs, monkeypatch):
    p, run = params.Corpus(run="toy"), outputs / "toy"
    done = {"identity": identity.of("corpus", p, run), "outputs": "", "files": {}, "finished": time.time() + 3600}
    files.write_json(run / "00_corpus/done.json", done)
    runs.forced(run, "corpus").touch()

    def dies(*_: object) -> None:
        raise runner.StageError("its kernel died", runner.DIED)

    monkeypatch.setattr(runner, "_execute", dies)
    with pytest.raises(runner.StageError, match="its kernel died"):
        runner._stage("corpus", p, run, (), runner._Stop(True))
    assert runs.state(run, "corpus")["state"] == "done"


def test_a_page_of_a_notebook_fetches_nothing(tmp_path):
    output = nbformat.v4.new_output("display_data", {"text/html": "<b>table</b>"})
    cell = nbformat.v4.new_code_cell("1 + 1", outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "05_evaluate.ipynb")
    page = runner.save_page(tmp_path / "05_evaluate.ipynb").read_text(encoding="utf-8")
    assert "<b>table</b>" in page
    assert "<script" not in page and 'src="http' not in page and "url(http" not in page


@pytest.mark.slow
def test_the_whole_chain_and_what_each_change_runs_again(project):
    assert len(lines(project())) == 6
    assert (project.run / "05_evaluate.html").exists()

    # Code alone: nothing is made again, unless it is asked for.
    project.library("RESULT = 1  # the same\n")
    (project.folder("kmeans") / "left.over").touch()
    assert all("library changed: work.py" in line and "skipped" in line for line in lines(project("--until", "kmeans")))
    assert (project.folder("kmeans") / "left.over").exists()

    # Other results: those after it see other inputs, and only they.
    project.library("RESULT = 1\n")
    assert [line.split(": ", 1)[1] for line in lines(project("--set", "distill.seed=3"))] == [
        *["unchanged, skipped"] * 4,
        "parameters changed: seed 0 -> 3: starts anew",
        "inputs changed: 04_distill: starts anew",
    ]

    # Prose and figures: run again, but results stay.
    (project.folder("evaluate") / "kept").touch()
    project.notebook("evaluate", "# a remark\n" + WORK)
    result = project("--from", "evaluate", "--set", "distill.seed=3")
    assert lines(result) == ["05_evaluate: notebook changed: its results are kept"]
    assert (project.folder("evaluate") / "kept").exists()
    # With code that changed, too, what is there could be overwritten with something else.
    project.library("RESULT = 1  # other\n")
    project.notebook("evaluate", "# another remark\n" + WORK)
    (line,) = lines(project("--from", "evaluate", "--set", "distill.seed=3"))
    assert "library changed: work.py" in line and "skipped" in line
    project.library("RESULT = 1\n")
    result = project("--from", "evaluate", "--force", "--set", "distill.seed=3")
    assert lines(result) == ["05_evaluate: forced: starts anew"]
    assert (project.run / ".previous/05_evaluate-2/kept").exists()

    # Results that rest on older ones are stale.
    result = project("--until", "pretrain", "--set", "pretrain.seed=4", "--set", "distill.seed=3")
    assert result.returncode == runner.OK
    listing = project.begin("ls").communicate()[0]
    assert "04_distill stale; 05_evaluate stale" in listing and "1.5 (stale)" in listing


@pytest.mark.parametrize(
    ("work", "end", "message"),
    [
        ("with stage.working():\n    sys.exit(0)", "", "sys.exit"),
        pytest.param(WORK, "runs.finish(stage, {})\nsys.exit(0)", "sys.exit", marks=pytest.mark.slow),
        pytest.param(WORK, "", "without runs.finish", marks=pytest.mark.slow),
        pytest.param(
            "with stage.working():\n    1 / 0",
            "",
            "failed in cell [4]: ZeroDivisionError: division by zero",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_notebook_that_does_not_reach_its_end_has_failed(project, work, end, message):
    project.notebook("corpus", work, end)
    result = project()
    assert result.returncode == runner.FAILED
    assert message in result.stderr
    if "ERROR:tornado" not in result.stderr:  # Jupyter's own, where a kernel goes while it is asked
        assert "Traceback" not in result.stderr
    assert project.state("corpus") == "failed"
    assert not (project.folder("corpus") / "done.json").exists()
    assert not (project.run / "00_corpus.ipynb").exists()
    assert not runs.is_held(project.run / ".lock")
    assert (project.run / "00_corpus.unfinished.ipynb").exists()
    assert not project.folder("partition").exists()


@pytest.mark.slow
def test_a_parameter_overridden_in_the_notebook_has_failed(project):
    path = project.root / "notebooks/00_corpus.ipynb"
    path.write_text(path.read_text().replace("stage = runs.start", "minutes = 7.0\\nstage = runs.start"))
    result = project()
    assert result.returncode == runner.FAILED and "overridden a parameter" in result.stderr


@pytest.mark.slow
def test_a_stage_that_is_refused_leaves_its_results(project):
    refusal = "with stage.working():\n    if stage.p.seed: raise ValueError('no noise')\n"
    project.notebook("corpus", refusal + WORK.split("\n", 1)[1])
    assert project("--until", "corpus").returncode == runner.OK
    made = project.folder("corpus") / "made.bin"
    before = made.read_bytes(), (project.run / "00_corpus.ipynb").read_bytes()
    result = project("--until", "corpus", "--set", "corpus.seed=5")
    assert result.returncode == runner.FAILED and "no noise" in result.stderr
    assert (made.read_bytes(), (project.run / "00_corpus.ipynb").read_bytes()) == before
    assert project.state("corpus") == "done" and not any((project.run / ".previous").iterdir())
    assert lines(project("--until", "corpus")) == ["00_corpus: unchanged, skipped"]
    project.notebook("corpus", "raise ValueError('before it begins')")
    assert project("--until", "corpus", "--force").returncode == runner.FAILED
    project.notebook("corpus", refusal + WORK.split("\n", 1)[1])
    assert lines(project("--until", "corpus")) == ["00_corpus: unchanged, skipped"], "not forced any more"


@pytest.mark.slow
def test_a_killed_kernel_has_its_exit_code_and_the_stage_resumes(project):
    kill = "            if not done[1:]: os.kill(os.getpid(), signal.SIGKILL)\n"
    project.notebook("corpus", ROUNDS.replace("            row = {", kill + "            row = {"))
    result = project("--until", "corpus")
    assert result.returncode == runner.DIED and "its kernel died" in result.stderr
    assert project.state("corpus") == "died" and project.rounds() == [1]
    assert not (project.folder("corpus") / "done.json").exists()
    project.notebook("corpus", ROUNDS)
    result = project("--until", "corpus")
    assert result.returncode == runner.OK
    assert "was not finished: resumes (notebook changed)" in result.stdout
    assert (project.folder("corpus") / "made.bin").read_bytes() == b"[1, 2, 3, 4, 5, 6]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_before_the_first_stage_is_one_to_requeue_on(monkeypatch, number):
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)}
    monkeypatch.setattr(cli, "_ls", lambda options: os.kill(os.getpid(), number))
    try:
        for kind in before:
            signal.signal(kind, signal.SIG_DFL)
        assert cli.main(["ls"]) == runner.INTERRUPTED
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def test_a_terminal_that_is_closed_stops_no_line_of_work():
    """It fails as a full disk does, of which the system has a device."""
    work = "import sys; from fedhubert_lib import progress\nfor to in (None, sys.stderr): progress.say('a', to)"
    with Path("/dev/full").open("w") as full:
        again = "\nprogress.say('b'); print('c', flush=True)"
        assert subprocess.run([sys.executable, "-c", work + again], stdout=full, stderr=full, cwd=ROOT).returncode == 0


def test_a_signal_reaches_the_kernel_before_a_terminal_that_may_be_gone(monkeypatch):
    done: list[object] = []
    monkeypatch.setattr(runner.os, "kill", lambda *signalled: done.append(signalled))
    monkeypatch.setattr(progress, "say", lambda line: done.append("said"))
    stop = runner._Stop(False)
    stop.kernel = SimpleNamespace(has_kernel=True, provisioner=SimpleNamespace(pid=7))
    stop(signal.SIGHUP, None)
    assert done == [(7, signal.SIGINT), "said"]


@pytest.mark.parametrize("stage", ["corpus", "partition"])
def test_what_was_forced_and_interrupted_is_asked_for_still(outputs, monkeypatch, stage):
    """Before the stage wrote anything: its earlier results are back, and the same command resumes without --force."""
    study, stages, stop_in, made = studies.load(ROOT / "params/toy.yaml"), ["corpus", "partition"], "", []

    def execute(name: str, p: params.Section, output: Path, stop: object) -> None:
        begun = runs.start(name, p.model_dump())
        if name == stop_in:
            with pytest.raises(KeyboardInterrupt), begun.working():
                raise KeyboardInterrupt
            raise runner.StageError("stopped", runner.INTERRUPTED)
        with begun.working():
            (begun.folder / "made.bin").write_text(name)
            made.append(name)
        runs.finish(begun, {})
        output.write_text("{}")

    monkeypatch.setattr(runner, "_execute", execute)
    monkeypatch.setattr(preflight, "study", lambda *_: None)
    runner.run(study, stages)
    assert made == stages
    stop_in = stage
    with pytest.raises(runner.StageError):
        runner.run(study, stages, force=True)
    assert all((outputs / "toy" / params.FOLDERS[name] / "done.json").exists() for name in stages), "as they were"
    stop_in = ""
    runner.run(study, stages)
    assert made == [*stages, *stages]
    runner.run(study, stages)
    assert made == [*stages, *stages]


def test_a_failure_takes_back_what_was_forced(outputs, monkeypatch):
    study = studies.load(ROOT / "params/toy.yaml")
    for error in (runner.StageError("failed", runner.FAILED), runs.RunError("refused"), OSError("full")):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(runner, "_execute", fails)
        monkeypatch.setattr(preflight, "study", lambda *_: None)
        (outputs / "toy").mkdir()
        (mark := runs.forced(outputs / "toy", "kmeans")).touch()  # of a call before, which a signal has ended
        with pytest.raises(type(error)):
            runner.run(study, ["corpus", "partition"], force=True)
        assert mark.exists() and not runs.forced(outputs / "toy", "partition").exists()
        shutil.rmtree(outputs / "toy")


def test_all_seeds_that_were_forced_are_made_anew_after_a_signal(outputs, monkeypatch):
    (outputs / "toy-1").mkdir()

    words = ["run", str(ROOT / "params/toy.yaml"), "--seeds", "0", "1", "--force", "--until", "corpus"]
    for code in (runner.INTERRUPTED, runner.FAILED):

        def ends(*_: object, code: int = code) -> None:
            raise runner.StageError("ended", code)

        monkeypatch.setattr(runner, "run", ends)
        assert cli.main(words) == code
        assert runs.forced(outputs / "toy-1", "corpus").exists() == (code == runner.INTERRUPTED)
    assert not (outputs / "toy-0").exists()


def test_a_seed_that_cannot_be_is_refused_before_the_first_run(outputs, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("it ran"))
    assert cli.main(["run", str(ROOT / "params/toy.yaml"), "--seeds", "0", "-1"]) == runner.USAGE
    assert "pretrain.seed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_lets_the_checkpoint_finish_and_the_same_command_resumes(project, number):
    before = signal.signal(number, signal.default_int_handler)  # ignored behind nohup, and so in what starts from there
    try:
        process = project.until_round_3("--until", "partition")
    finally:
        signal.signal(number, before)
    process.send_signal(number)
    out, error = process.communicate(timeout=600)
    assert process.returncode == runner.INTERRUPTED, (out, error)
    assert f"stopped by {number.name}" in error
    assert json.loads((project.folder("corpus") / "checkpoint.json").read_text()) == [1, 2, 3]
    assert project.state("corpus") == "interrupted"
    project.gate.unlink()
    result = project("--until", "partition")
    assert result.returncode == runner.OK
    assert "00_corpus: was not finished: resumes" in result.stdout
    assert (project.folder("corpus") / "made.bin").read_bytes() == b"[1, 2, 3, 4, 5, 6]"


def test_a_line_says_how_far_a_training_is_and_who_is_at_work():
    rows = [{"kind": "plan", "rounds": 9, "time": 0.0}]
    assert progress.last_round(rows) == progress.at_work(rows) == ""
    rows.append({"kind": "cohort", "round": 1, "clients": ["a", "b", "c"], "time": 1.0})
    assert progress.at_work(rows) == "round 1: a at work, 0 of 3 clients done"
    rows.append({"kind": "client", "round": 1, "client": "a", "time": 2.0})
    rows.append({"kind": "failure", "round": 1, "client": "b", "reason": "AudioError: b.flac: gone", "time": 2.0})
    assert progress.at_work(rows) == "round 1: c at work, 2 of 3 clients done"
    assert progress.at_work(rows, since=1.5) == "", "of an earlier start"
    row = {"kind": "round", "round": 1, "loss": 2.5, "audio_seconds_per_second": 80.0, "seconds": 60.0, "time": 3.0}
    rows.append(row)
    assert progress.at_work(rows) == ""
    words = "round 1 of 9, loss 2.5, 80 audio s/s, 0:08:00 left"
    assert progress.last_round(rows) == f"{words}; left out: b (AudioError: b.flac: gone)"
    more = [{**rows[3], "client": client, "reason": "x" * 999} for client in ("b", "c", "d")]
    assert progress.last_round([*rows, *more]) == f"{words}; left out: b (AudioError: b.flac: gone) and 2 more"
    assert progress.last_round([*rows, *more[1:], {**more[0], "client": ""}]) == words, "of an attempt before"
    assert progress.last_round(rows, since=3.5) == ""
    rows.append({"kind": "answers", "action": "features", "clients": 2, "of": 9, "time": 4.0})
    assert progress.at_work(rows, since=3.5) == "features: 2 of 9 clients done" and not progress.at_work(rows, since=5)


@pytest.mark.slow
def test_training_seeds_share_what_they_do_not_change_and_resume_where_they_stopped(project):
    project.notebook("pretrain", ROUNDS)
    project.gate.parent.mkdir()
    project.gate.touch()
    arguments = ("--seeds", "3", "5", "--until", "pretrain")
    process = project.begin("run", "study.yaml", *arguments)
    folders = [project.root / f"outputs/study-{seed}" for seed in (3, 5)]
    rounds = folders[0] / "03_pretrain/rounds.json"
    wait_for(lambda: rounds.exists() and len(json.loads(rounds.read_text())) == 3, process)
    process.send_signal(signal.SIGTERM)
    project.gate.unlink()
    assert process.wait() == runner.INTERRUPTED and not folders[1].exists()
    result = project(*arguments)
    assert result.returncode == runner.OK, result.stderr
    assert [line for line in lines(result) if "round " not in line] == [
        *[f"{params.FOLDERS[stage]}: unchanged, skipped" for stage in list(params.SECTIONS)[:3]],
        "03_pretrain: was not finished: resumes",
        *[f"{params.FOLDERS[stage]}: taken from {folders[0]}" for stage in list(params.SECTIONS)[:3]],
        "03_pretrain: differs from study-3 (parameters changed: seed 3 -> 5)",
        "03_pretrain: not run yet",
    ]
    assert [line[3:] for line in lines(project(*arguments))] == 2 * [
        f"{stage}: unchanged, skipped" for stage in list(params.SECTIONS)[:4]
    ]
    assert (folders[0] / "02_kmeans/made.bin").samefile(folders[1] / "02_kmeans/made.bin")
    assert not (folders[0] / "03_pretrain/made.bin").samefile(folders[1] / "03_pretrain/made.bin")


def test_a_round_is_printed_once_however_many_rows_follow(tmp_path, monkeypatch):
    shown, rows = [], tmp_path / "metrics.jsonl"
    monkeypatch.setattr(progress, "say", shown.append)  # what a thread prints while output is captured can be lost
    with runner._progress(tmp_path, every=0.01):
        for number in (1, 2):  # once the second is shown, the client's row was seen, too
            files.append_row(rows, {"kind": "round", "round": number, "time": time.time()})
            for _ in range(6000):
                if len(shown) == number:
                    break
                time.sleep(0.01)
            files.append_row(rows, {"kind": "client", "time": time.time()})
            time.sleep(0.1)
    assert shown == [f"{tmp_path.name}: round 1", f"{tmp_path.name}: round 2"]


def test_a_round_is_printed_once_when_rows_before_it_are_not_read_any_more(tmp_path, monkeypatch):
    """The time left is then another one."""
    shown, rows = [], tmp_path / "metrics.jsonl"
    monkeypatch.setattr(progress, "say", shown.append)
    monkeypatch.setattr(runner, "TAIL", 200)  # bytes: three rows
    files.append_row(rows, {"kind": "plan", "rounds": 9, "time": time.time()})
    for number, seconds in ((1, 60), (2, 600)):
        files.append_row(rows, {"kind": "round", "round": number, "seconds": seconds, "time": time.time() + 60})
    with runner._progress(tmp_path, every=0.01):
        for _ in range(6000):
            if shown:
                break
            time.sleep(0.01)
        for _ in range(4):
            files.append_row(rows, {"kind": "client", "client": "a", "time": time.time()})
            time.sleep(0.1)
    assert [line.split(",")[0] for line in shown] == [f"{tmp_path.name}: round 2 of 9"]


def test_a_look_reads_the_plan_and_the_last_rows(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    assert runner._recent(path) == []
    rows = [{"kind": "plan", "rounds": 9, "time": 1}]
    for number in range(1, 5):
        rows.append({"kind": "cohort", "round": number, "clients": ["a", "b"], "time": 1})
        rows.append({"kind": "client", "client": "a", "round": number, "time": 1})
    for row in rows:
        files.append_row(path, row)
    with path.open("ab") as stream:
        stream.write(b'\n{"kind": "cl')  # a blank line, and one that is not all there yet
    assert runner._recent(path) == rows
    last = sum(len(json.dumps(row)) + 1 for row in rows[-2:]) + len(b'\n{"kind": "cl')
    monkeypatch.setattr(runner, "TAIL", last + 5)
    assert runner._recent(path) == [rows[0], *rows[-2:]], "of the row before them only a part was looked at"
    assert progress.at_work(runner._recent(path)) == "round 4: b at work, 1 of 2 clients done"
    path.write_bytes(path.read_bytes()[:1])
    assert runner._recent(path) == []


@pytest.mark.slow
def test_progress_is_shown_a_second_runner_refused_and_a_killed_one_replaced(project):
    process = project.until_round_3("--until", "corpus")
    result = project("--until", "corpus")
    assert result.returncode == runner.USAGE and "in use by fedhubert run, process" in result.stderr
    shown = next(line for line in process.stdout if "round 3 of 6" in line)
    assert shown == "00_corpus: round 3 of 6, loss 4.25, masked accuracy 0.125, 99 audio s/s, 0:00:03 left\n"
    process.kill()
    process.communicate()
    project.gate.unlink()
    result = project("--until", "corpus")  # the old kernel takes a moment to notice that its parent has ended
    assert result.returncode == runner.OK, result.stderr
    assert (project.folder("corpus") / "made.bin").read_bytes() == b"[1, 2, 3, 4, 5, 6]"


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(project):
    full = """\
with stage.working():
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
    assert {path.name for path in project.folder("corpus").iterdir()} == {"params.yaml", "begun.json", "figures"}
