"""A stage begins with checked parameters in a folder of its own, and is done only when it says so."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT
from IPython.core.interactiveshell import InteractiveShell

from fedhubert_lib import cli, identity, index, params, provenance, records, runner, runs, studies


def begin(stage: str = "corpus", **changes: object) -> runs.Stage:
    return runs.start(stage, params.SECTIONS[stage]().model_dump() | changes)


def do(stage: str, content: str = "") -> Path:
    """A stage that writes ``content``, from start to finish."""
    begun = begin(stage)
    (begun.folder / "made.bin").write_text(content)
    runs.finish(begun, {"figure": 1.0})
    return begun.folder


@pytest.fixture(autouse=True)
def give_back(outputs: Path):
    yield
    for path in list(runs._held):
        runs.release(path)


def test_a_stage_is_done_only_when_it_says_so(outputs):
    stage = begin(minutes=2.0)
    assert stage.run == outputs / "toy" and stage.folder == outputs / "toy/00_corpus"
    assert stage.p == params.Corpus(minutes=2.0)
    assert yaml.safe_load((stage.folder / "params.yaml").read_text()) == stage.p.model_dump()
    assert {"study", "run", "seed", "git", "versions", "hardware", "data", "started"} <= stage.provenance.keys()
    assert json.loads((stage.run / "run.json").read_text())["stages"]["corpus"]["state"] == "running"
    assert not (stage.folder / "done.json").exists()
    facts = runs.finish(stage, {"hours": 0.5, "speakers": 6})
    assert facts["seconds"] >= 0 and facts["peak_memory_bytes"] > 2**20
    record = json.loads((stage.run / "run.json").read_text())
    assert record["stages"]["corpus"]["state"] == "done"
    assert record["stages"]["corpus"]["headline"] == {"hours": 0.5, "speakers": 6}
    assert (stage.folder / "done.json").exists()


def test_wrong_parameters_touch_nothing(outputs):
    with pytest.raises(studies.ParameterError, match="did you mean minutes"):
        begin(minute=2.0)
    assert not list(outputs.iterdir())


def test_run_all_again_in_a_warm_kernel():
    namespace = params.Corpus().model_dump()
    runs.finish(runs.start("corpus", namespace), {})
    namespace["hours"] = 3  # what a later cell has set
    namespace["minutes"] = 2.5
    assert runs.start("corpus", namespace).p.minutes == 2.5


class Kernel(dict):
    """The variables of a notebook, which like IPython's tell of the cells that were executed."""

    def __init__(self) -> None:
        super().__init__(In=[""])
        self.cell("".join(f"{name} = {value!r}\n" for name, value in params.Corpus().model_dump().items()))

    def cell(self, source: str) -> None:
        self["In"].append(source)
        exec(source, self)

    def start(self) -> params.Corpus:
        self["In"].append('stage = runs.start("corpus", globals())')
        return runs.start("corpus", self)


PARAMETERS = 'run = "toy"  # folder\nseed = 0\nminutes = 2.0\n'


def test_parameters_are_those_of_the_cell_as_it_was_executed_last():
    kernel = Kernel()
    kernel.start()
    kernel.cell("hours = 3\nprint(hours)")
    kernel.cell(PARAMETERS + "minuts = 4.0")
    with pytest.raises(studies.ParameterError, match="did you mean minutes"):
        kernel.start()
    kernel.cell(PARAMETERS)
    assert kernel.start().p.minutes == 2.0, "a typo that was corrected"
    kernel.cell("# Parameters\nminutes = 3.0\n")  # papermill's cell, or one that a person adds
    assert kernel.start().p.minutes == 3.0
    kernel.cell("sped = 7")
    with pytest.raises(studies.ParameterError, match="sped"):
        kernel.start()
    kernel.cell("import pathlib\nspeakers = pathlib")
    kernel.cell('run = "toy"\nseed = int("3")')
    p = kernel.start().p
    assert (p.minutes, p.seed, p.speakers) == (params.Corpus().minutes, 3, params.Corpus().speakers), (
        "all others: default"
    )


def test_parameters_changed_after_the_start_do_not_train_with_the_old_ones(outputs):
    kernel = Kernel()
    stage = kernel.start()
    kernel.cell(PARAMETERS)
    with (
        pytest.raises(runs.RunError, match=r"minutes is 2\.0 now and was 1\.5 then.*run that cell again"),
        stage.working(),
    ):
        pytest.fail("it must not begin")
    assert not list(outputs.iterdir())


def test_stages_come_in_order(outputs):
    with pytest.raises(runs.RunError, match="00_corpus: not done yet; run notebook 00_corpus first"):
        begin("partition")
    do("corpus", "a")
    do("partition", "b")
    begin("kmeans")
    do("corpus", "other")
    with pytest.raises(runs.RunError, match="01_partition: made from another 00_corpus than is there now"):
        begin("kmeans")


def test_the_same_work_resumes_and_other_work_moves_it_aside(outputs, capsys):
    stage = begin()
    (stage.folder / "checkpoint").write_text("round 3")
    (stage.folder / ".model.123.partial.bin").write_text("half")
    again = begin()
    assert (again.folder / "checkpoint").exists()
    assert not (again.folder / ".model.123.partial.bin").exists()
    (outputs / "toy/00_corpus.ipynb").write_text("executed")
    capsys.readouterr()
    other = begin(minutes=2.0)
    said = capsys.readouterr().out
    aside = outputs / "toy/.previous/00_corpus-1"
    assert "minutes 1.5 -> 2.0: starts anew" in said and f"what is there moves to {aside}" in said
    assert (stage.folder / "checkpoint").exists() and not aside.exists(), "the start alone moves nothing"
    assert not (other.folder / "checkpoint").exists()
    assert f"moved: {other.folder} -> {aside}" in capsys.readouterr().out
    assert (aside / "checkpoint").read_text() == "round 3" and (aside / "00_corpus.ipynb").exists()
    (other.folder / "checkpoint").write_text("round 5")
    back = begin()
    assert (back.folder / "checkpoint").read_text() == "round 3", "what is asked for again is taken back"
    assert (outputs / "toy/00_corpus.ipynb").exists() and not aside.exists()
    assert (outputs / "toy/.previous/00_corpus-2/checkpoint").read_text() == "round 5"


def test_what_has_no_record_moves_aside_too(outputs):
    stage = begin()
    (stage.folder / "checkpoint").write_text("round 3")
    (stage.folder / "begun.json").unlink()
    assert not (begin().folder / "checkpoint").exists()
    assert (outputs / "toy/.previous/00_corpus-1/checkpoint").exists()


def test_a_start_alone_leaves_what_is_done(outputs):
    folder = do("corpus")
    for changes in ({}, {"minutes": 2.0}):
        begin(**changes)
        assert (folder / "done.json").exists() and (folder / "made.bin").exists()
        assert json.loads((outputs / "toy/run.json").read_text())["stages"]["corpus"]["state"] == "done"
        assert not runs.is_held(outputs / "toy/.lock"), "another notebook may work"
    assert begin().figures.is_dir() and (folder / "done.json").exists(), "nor does a look at its pictures"


def test_done_is_taken_back_when_a_stage_works_again():
    folder = do("corpus")
    with begin().working():
        assert not (folder / "done.json").exists()
        (folder / "made.bin").write_text("something else")
    assert not (folder / "done.json").exists()


@pytest.mark.parametrize("changes", [{}, {"minutes": 2.0}])
def test_a_refusal_leaves_everything_as_it_was(outputs, changes):
    folder = do("corpus", "a")
    (outputs / "toy/00_corpus.ipynb").write_text("executed")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="no such teacher"), begin(**changes).working():
        raise ValueError("no such teacher")
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert kept.keys() == before.keys()
    assert kept[folder / "made.bin"] == b"a" and kept[folder / "done.json"] == before[folder / "done.json"]
    assert (outputs / "toy/00_corpus.ipynb").exists() and not any((outputs / "toy/.previous").glob("*"))
    record = json.loads((outputs / "toy/run.json").read_text())["stages"]["corpus"]
    assert record["state"] == "done" and record["headline"] == {"figure": 1.0}
    assert record["last_attempt"] == {"state": "failed", "reason": "ValueError: no such teacher"}
    assert not runs.is_held(outputs / "toy/.lock")
    begin("partition")


def test_a_failure_gives_the_lock_back_and_says_failed(outputs):
    stage = begin()
    with pytest.raises(ValueError, match="diverged"), stage.working():
        (stage.folder / "checkpoint").write_text("round 3")
        raise ValueError("diverged")
    assert not runs.is_held(outputs / "toy/.lock")
    assert index.read(outputs)[0].state == "00_corpus failed"
    with stage.working():  # the same cell again
        assert (stage.folder / "checkpoint").exists()
    assert index.read(outputs)[0].state == "00_corpus not finished"


def test_an_interrupt_is_one_line(outputs):
    stage = begin()
    with pytest.raises(KeyboardInterrupt) as caught, stage.working():
        raise KeyboardInterrupt
    assert caught.value._render_traceback_() == ["00_corpus: interrupted; run the cell again to resume"]
    assert json.loads((outputs / "toy/run.json").read_text())["stages"]["corpus"]["state"] == "interrupted"


def test_in_a_kernel_of_ipython(outputs, capsys):
    """Parameters by their cell's latest execution, an interrupt in one line: as a person works in JupyterLab."""
    shell = InteractiveShell()
    start = 'from fedhubert_lib import runs\nstage = runs.start("corpus", globals())'

    def run(*sources: str) -> str:
        for source in sources:
            shell.run_cell(source, store_history=True)
        streams = capsys.readouterr()
        return streams.out + streams.err

    assert run(PARAMETERS, start, "hours = 3\nother = [hours]\nprint(other)") == "[3]\n"
    assert "corpus.minuts: no such parameter" in run(PARAMETERS + "minuts = 4.0", start)
    assert run(PARAMETERS, start) == ""
    said = run(PARAMETERS.replace("2.0", "3.0"), "with stage.working():\n    print('works')")
    assert said.strip() == (
        "parameters have changed since runs.start (minutes is 3.0 now and was 2.0 then): run that cell again"
    )
    said = run(start, "with stage.working():\n    stage.folder.joinpath('a.bin').touch()\n    raise KeyboardInterrupt")
    assert said.strip() == "00_corpus: interrupted; run the cell again to resume"
    assert run("with stage.working():\n    print(stage.folder.joinpath('a.bin').exists())") == "True\n"


def test_a_failed_start_leaves_no_empty_run(outputs):
    for stage, changes in (("partition", {}), ("corpus", {"kind": "librispeech", "root": str(outputs / "nowhere")})):
        with pytest.raises(runs.RunError):
            begin(stage, **changes)
    begin()
    assert not list(outputs.iterdir())


def test_an_input_in_the_folder_that_is_made_from_it_is_refused_before_anything_moves(outputs):
    for stage in ("corpus", "partition", "kmeans", "pretrain"):
        do(stage)
    run = outputs / "toy"
    (outputs / "link").symlink_to(run)
    for stage, name, place in (
        ("pretrain", "initial", run / "03_pretrain"),
        ("pretrain", "initial", outputs / "link/03_pretrain"),
        ("kmeans", "features", run / "03_pretrain"),
    ):
        with pytest.raises(runs.RunError, match=f"{stage}.{name}: .*lies in what this run makes from it"):
            begin(stage, **{name: str(place)})
        assert (run / "03_pretrain/done.json").exists() and (run / "02_kmeans/done.json").exists()
    begin("distill", teacher=str(run / "03_pretrain"))


def test_code_and_versions_are_shown_and_nothing_is_made_again(monkeypatch, capsys):
    folder = do("corpus")
    library, versions = identity.library(), identity.versions()
    monkeypatch.setattr(identity, "library", lambda: library | {"federated/keys.py": "other"})
    monkeypatch.setattr(identity, "versions", lambda: versions | {"torch": "1.0"})
    stage = begin()
    said = capsys.readouterr().out
    assert "library changed: federated/keys.py" in said and f"torch {versions['torch']} -> 1.0" in said
    assert "its results are kept" in said
    with stage.working():
        assert (folder / "made.bin").exists()
    runs.finish(stage, {})
    (note,) = json.loads((folder / "done.json").read_text())["resumed"]
    assert "federated/keys.py" in note["changes"] and "torch" in note["changes"]


def test_headline_figures_are_numbers_that_json_can_hold():
    stage = begin()
    with pytest.raises(runs.RunError, match="headline figure accuracy is NaN"):
        runs.finish(stage, {"accuracy": float("nan")})
    assert not (stage.folder / "done.json").exists()


def _hold(path: Path, held: multiprocessing.Event, over: multiprocessing.Event) -> None:
    runs.hold(path, "notebook 03_pretrain")
    held.set()
    over.wait(60)


def test_two_at_once_in_one_folder(outputs, monkeypatch):
    context = multiprocessing.get_context("spawn")
    held, over = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(outputs / "toy/.lock", held, over))
    other.start()
    assert held.wait(60)
    monkeypatch.setattr(runs, "PATIENCE", 0.1)
    with pytest.raises(runs.RunError, match=f"in use by notebook 03_pretrain, process {other.pid} on"):
        begin()
    assert not (outputs / "toy/00_corpus").exists()
    over.set()
    other.join()
    begin()


def test_a_record_that_cannot_be_read_is_named(outputs):
    folder = do("corpus")
    (folder / "begun.json").write_text('{"identity": ')
    with pytest.raises(runs.RunError, match=r"begun\.json: cannot be read"):
        begin()


def test_identity_is_content(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_text("weights")
    for stage in ("corpus", "partition", "kmeans"):
        do(stage)
    p = params.Pretrain(initial=str(checkpoint))
    run = runs.outputs() / "toy"
    one = identity.of("pretrain", p, run)
    assert identity.of("pretrain", p.model_copy(update={"run": "other"}), run) == one
    shutil.copytree(checkpoint, tmp_path / "moved")
    moved = identity.of("pretrain", params.Pretrain(initial=str(tmp_path / "moved")), run)
    assert not any(identity.compare(one, moved)), "a copy of a checkpoint is that checkpoint"
    (checkpoint / "model.safetensors").write_text("other weights")
    assert identity.compare(one, identity.of("pretrain", p, run)).results == "inputs changed: initial"
    do("kmeans", "other labels")
    assert identity.compare(one, identity.of("pretrain", p, run)).results == "inputs changed: 02_kmeans, initial"
    faster = identity.of("pretrain", p.model_copy(update={"learning_rate": 0.5}), run)
    assert "parameters changed: learning_rate 0.001 -> 0.5" in identity.compare(one, faster).results


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"device": "cpu", "engine": "pool", "deadline_seconds": 5.0}, None),
        ({"patience": 5}, "additions"),
        ({"patience": 0}, "additions"),
        ({"patience": 2}, "results"),
        ({"centralised": False}, "additions"),
        ({"rounds": 3}, "results"),
        ({"learning_rate": 0.5}, "results"),
    ],
)
def test_which_parameters_decide_the_results(change, kind):
    p = params.Pretrain(patience=3)
    one = {
        "stage": "pretrain",
        "parameters": p.model_dump(),
        "inputs": {},
        "library": {},
        "notebook": "",
        "versions": {},
    }
    changes = identity.compare(one, one | {"parameters": p.model_dump() | change})._asdict()
    assert {name for name, words in changes.items() if words} == ({kind} if kind else set())
    if "rounds" in change:
        assert "learning rate falls over all rounds" in changes["results"]


def test_parameters_that_only_another_version_knows_are_a_change_of_code():
    values = params.Pretrain().model_dump()
    one = {"stage": "pretrain", "parameters": values, "inputs": {}, "library": {}, "notebook": ""}
    older = one | {"parameters": {k: v for k, v in values.items() if k != "proximal"} | {"width": 96}}
    now = one | {"versions": {"torch": "1.0"}}
    assert identity.compare(older, now) == ("", "", "", "parameters of another version: proximal, width")
    assert "proximal None -> 0.1" in identity.compare(older, now | {"parameters": values | {"proximal": 0.1}}).results


def test_a_changed_file_behind_a_link_is_seen(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.flac").write_text("a")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/train").symlink_to(tmp_path / "real")
    p = params.Corpus(kind="librispeech", root=str(tmp_path / "root"))
    before = identity.listings(p)
    (tmp_path / "real/a.flac").unlink()
    assert identity.listings(p) != before


def test_what_rests_on_something_older_is_stale_everywhere(outputs):
    for stage in params.SECTIONS:
        do(stage)
    report = {"systems": [], "measures": [], "figures": []}
    (outputs / "toy/05_evaluate/report.json").write_text(json.dumps(report))
    assert index.read(outputs)[0].state == "done" and not identity.stale(outputs / "toy")
    assert "stale" not in index.results(outputs / "toy") + index.listing(outputs)
    do("pretrain", "longer")
    assert identity.stale(outputs / "toy") == dict.fromkeys(("distill", "evaluate"), "made from an older 03_pretrain")
    assert "stale: made from an older 03_pretrain" in index.results(outputs / "toy")
    assert "1 (stale)" in index.listing(outputs) and "04_distill stale; 05_evaluate stale" in index.listing(outputs)
    assert "evaluate: figure</th><td>1 (stale)" in index.write(outputs).read_text(encoding="utf-8")


def test_the_evaluation_runs_without_a_student_and_notices_one_that_comes(outputs):
    for stage in ("corpus", "partition", "kmeans", "pretrain"):
        do(stage)
    do("evaluate")
    assert not identity.stale(outputs / "toy")
    do("distill")
    stage = begin("evaluate")
    begun = json.loads((outputs / "toy/05_evaluate/begun.json").read_text())["identity"]
    assert identity.compare(begun, stage.identity).results == "inputs changed: 04_distill"


def test_folders_are_there_or_are_downloaded(tmp_path):
    place = tmp_path / "LibriSpeech"
    asked = {"kind": "librispeech", "root": str(place)}
    with pytest.raises(runs.RunError, match=r"corpus.root: .*LibriSpeech: no such file or folder"):
        begin(**asked)
    stage = begin(**asked, download=True)
    place.mkdir()
    (place / "archive").touch()
    runs.finish(stage, {})
    now = identity.of("corpus", stage.p, stage.run)
    assert runs.read_json(stage.folder / "done.json")["identity"] == now, "what was downloaded is no change of inputs"


def test_git_is_that_of_the_project_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert provenance.git()["commit"] == (expected.stdout.strip() or None)


def test_a_notebook_saved_with_its_outputs_is_no_change_of_the_project(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity_of_nobody = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        subprocess.run(["git", "-C", tmp_path, *identity_of_nobody, *arguments], check=True, capture_output=True)

    path = tmp_path / "notebooks/00 corpus.ipynb"
    path.parent.mkdir()
    cell = {"cell_type": "code", "source": ["1 + 1"], "metadata": {}, "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}}))
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(params, "ROOT", tmp_path)
    assert provenance.git()["dirty"] is False
    path.write_text(json.dumps({"cells": [cell | {"outputs": ["2"], "execution_count": 7}], "metadata": {"x": 1}}))
    assert provenance.git()["dirty"] is False
    path.write_text(json.dumps({"cells": [cell | {"source": ["1 + 2"]}], "metadata": {}}))
    assert provenance.git()["dirty"] is True
    git("checkout", ".")
    (tmp_path / "more.py").touch()
    assert provenance.git()["dirty"] is True


def test_outputs_are_the_projects_unless_said_otherwise(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDHUBERT_OUTPUTS")
    assert runs.outputs() == ROOT / "outputs"


def test_runs_side_by_side(outputs):
    do("corpus")
    runs.finish(begin(run="other", minutes=2.5), {"figure <b>": 2.0})
    (outputs / "other/00_corpus/figures/hours & speakers.png").write_bytes(b"png")
    (outputs / "other/00_corpus.ipynb").write_text("{}")
    (outputs / "not a run").mkdir()
    listed = index.listing(outputs)
    assert "toy" in listed and "other" in listed and "00_corpus done" in listed
    assert index.differing(index.read(outputs)) == ["corpus.minutes"]
    page = index.write(outputs).read_text()
    assert "corpus.minutes" in page and "corpus.speakers" not in page
    assert "figure &lt;b&gt;" in page and "<b>" not in page
    assert 'href="other/00_corpus.ipynb"' in page
    assert 'src="other/00_corpus/figures/hours%20%26%20speakers.png"' in page
    assert "://" not in page and "<script" not in page, "it opens offline"


def test_a_run_with_a_broken_record_hides_no_other(outputs):
    do("corpus")
    (outputs / "broken").mkdir()
    (outputs / "broken/run.json").write_text("{")
    (outputs / "broken too/00_corpus").mkdir(parents=True)
    (outputs / "broken too/run.json").write_text("{}")
    (outputs / "broken too/00_corpus/params.yaml").write_text("a: [")
    for number, record in enumerate(("[]", '{"stages": []}')):
        (outputs / f"odd{number}").mkdir()
        (outputs / f"odd{number}/run.json").write_text(record)
    for number, values in enumerate((b"", b"\xff\xfe")):
        (outputs / f"empty{number}/00_corpus").mkdir(parents=True)
        (outputs / f"empty{number}/run.json").write_text("{}")
        (outputs / f"empty{number}/00_corpus/params.yaml").write_bytes(values)
    listed = index.listing(outputs)
    assert "broken/run.json: cannot be read" in listed and "00_corpus done" in listed
    assert "broken too" in index.write(outputs).read_text()


def test_a_run_in_the_place_of_the_page_is_not_removed(outputs):
    do("corpus").parent.rename(outputs / "index.html")
    with pytest.raises(runs.RunError, match="give it another name"):
        index.write(outputs)
    assert (outputs / "index.html/00_corpus/done.json").exists()


def _speak(folder: Path, audio: Path) -> None:
    """What 00_corpus and 01_partition write: a table that names audio by its place."""
    audio.parent.mkdir(parents=True, exist_ok=True)
    audio.touch()
    pd.DataFrame({"utterance": ["a"], "path": [str(audio)], "fingerprint": ["1"]}).to_parquet(
        folder / "manifest.parquet"
    )


def test_a_file_of_another_corpus_that_is_gone_says_nothing_of_the_run(outputs):
    folder = do("corpus")
    (folder / "synthetic").mkdir()  # its keywords
    pd.DataFrame({"path": [str(outputs / "LibriSpeech" / "a.flac")]}).to_parquet(folder / "manifest.parquet")
    assert runs.lost_audio(folder.parent) is None


def test_a_run_that_was_moved_follows_with_its_tables_alone(outputs):
    for stage in ("corpus", "partition"):
        begun = begin(stage)
        _speak(begun.folder, outputs / "toy/00_corpus/synthetic/a.flac")
        runs.finish(begun, {})
    do("kmeans")
    (outputs / "toy").rename(outputs / "moved")
    moved = {"run": "moved"}
    with pytest.raises(runs.RunError, match=r"a\.flac: is not there; was this run moved\? Run notebooks 00_corpus"):
        begin("kmeans", **moved)
    run = outputs / "moved"
    assert runner.reason("corpus", params.Corpus(**moved), run)[0]
    for stage in ("corpus", "partition"):
        begun = begin(stage, **moved)
        with begun.working():
            _speak(begun.folder, run / "00_corpus/synthetic/a.flac")
        runs.finish(begun, {})
    assert not identity.stale(run)
    now = identity.of("kmeans", params.Kmeans(**moved), run)
    assert records.prospect("kmeans", now, run).kind == "keep"
    (run / "00_corpus/synthetic/a.flac").unlink()
    assert runner.reason("corpus", params.Corpus(**moved), run) == (True, runner.DAMAGED), "removed, not moved"


def test_results_are_a_table_and_where_they_lie(outputs):
    report = {
        "systems": [{"system": name, "title": name.title()} for name in ("student", "mfcc")],
        "measures": [
            {"measure": "accuracy", "title": "ACCURACY", "better": "higher", "headline": True},
            {"measure": "error", "title": "ERROR", "better": "lower", "headline": True},
            {"measure": "unmeasured", "title": "UNMEASURED", "better": "higher", "headline": True},
            {"measure": "macs", "title": "MACS", "better": "lower", "headline": False},
        ],
        "figures": [
            {"system": "student", "measure": "accuracy", "layer": 2, "value": 0.5, "low": 0.375, "high": 0.625},
            {"system": "student", "measure": "accuracy", "layer": 3, "value": 0.4, "low": None, "high": None},
            {"system": "mfcc", "measure": "error", "layer": 1, "value": 0.75, "low": None, "high": None},
            {"system": "mfcc", "measure": "error", "layer": 0, "value": 0.25, "low": None, "high": None},
            {"system": "mfcc", "measure": "macs", "layer": None, "value": 9.0, "low": None, "high": None},
        ],
    }
    folder = outputs / "toy/05_evaluate"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures/layers.png").touch()
    (folder / "report.json").write_text(json.dumps(report))
    shown = index.results(outputs / "toy").splitlines()
    assert shown[:3] == ["           ACCURACY  ERROR", "Student  0.5 ±0.125      -", "Mfcc              -   0.25"]
    assert [line.strip() for line in shown[4:]] == [
        "results:",
        *(str(folder / f"report.{kind}") for kind in ("html", "csv", "json")),
        "figures:",
        str(folder / "figures"),
    ]


def test_no_runs_yet(outputs):
    assert "no runs" in index.listing(outputs)
    assert index.results(outputs / "toy") == ""


def test_the_command_tells_its_exit_codes():
    command = [sys.executable, "-m", "fedhubert_lib.cli", "run", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"})
    for code in ("0 ", "1 ", "2 ", "3 ", "75 "):
        assert f"\n  {code}" in said.stdout


def test_clean_shows_sizes_and_removes_what_is_named(outputs, capsys):
    for minutes in (1.5, 2.0, 2.5):
        stage = begin(minutes=minutes)
        (stage.folder / "made.bin").write_bytes(bytes(3 << 20))
        runs.finish(stage, {})
    assert cli.main(["clean", "toy"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[:3] for line in said.splitlines()[-3:]] == [
        ["00_corpus", "3.0", "MiB"],
        [".previous/00_corpus-1", "3.0", "MiB"],
        [".previous/00_corpus-2", "3.0", "MiB"],
    ]
    assert cli.main(["clean", str(outputs / "toy"), "00_corpus"]) == 2, "what is there is not removed"
    assert cli.main(["clean", "toy", ".previous/00_corpus-1", "../../other"]) == 2
    assert (outputs / "toy/.previous/00_corpus-1").exists()
    assert cli.main(["clean", "toy", ".previous/00_corpus-1"]) == 0
    assert "removed: " in capsys.readouterr().out
    assert [path.name for path in (outputs / "toy/.previous").iterdir()] == ["00_corpus-2"]
    assert cli.main(["clean", "nothing"]) == 2


def test_a_reader_who_has_seen_enough_is_no_error(outputs):
    do("corpus")
    command = f"{sys.executable} -m fedhubert_lib.cli ls | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")
