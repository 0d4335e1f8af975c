"""A run's stages: checked before anything moves, done only when they say so, and nothing that cost time is deleted."""

import itertools
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

from fedhubert_lib import cli, files, identity, index, params, records, runs, studies


def begin(stage: str = "corpus", **changes: object) -> runs.Stage:
    return runs.start(stage, params.SECTIONS[stage]().model_dump() | changes)


def do(stage: str, content: str = "", name: str = "made.bin", **changes: object) -> Path:
    """A stage that writes ``content``, from start to finish; returns its folder."""
    begun = begin(stage, **changes)
    with begun.working():
        (begun.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (begun.folder / name).write_text(content)
    runs.finish(begun, {"figure": 1.0})
    return begun.folder


def test_what_only_measures_is_no_input_of_training(tmp_path):
    """Phone times, files left out, words and the pooled model may come later: 03 and 04 have their inputs."""

    def table(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"utterance": ["u"], "path": [name]}).to_parquet(tmp_path / name)

    def parts(stage: str) -> dict:
        return identity.results(stage, params.SECTIONS[stage](), tmp_path)

    table("manifest.parquet")
    first = parts("corpus")
    table("excluded.parquet")
    assert {name: parts("corpus")[name] == first[name] for name in ("heard", "training", "lists")} == {
        "heard": True, "training": True, "lists": True
    }  # fmt: skip
    # Other test speech: what clients learn from stands in 01.
    pd.DataFrame({"utterance": ["u", "test"], "path": ["u", "t"]}).to_parquet(tmp_path / "manifest.parquet")
    assert parts("corpus")["learnt"] == first["learnt"] and parts("corpus")["lists"] != first["lists"]
    table("manifest.parquet")
    table("phones.parquet")
    table("keywords.parquet")
    second = parts("corpus")
    assert {name: second[name] == first[name] for name in ("heard", "training", "lists")} == {
        "heard": False, "training": False, "lists": True
    }  # fmt: skip
    table("codebooks/federated/counts.parquet")
    first = parts("kmeans")
    table("codebooks/federated/phones.parquet")
    second = parts("kmeans")
    assert first["targets"] == second["targets"] and first["outputs"] != second["outputs"]
    first = parts("pretrain")
    table("centralised/checkpoint/model.parquet")
    second = parts("pretrain")
    assert first["federated"] == first["outputs"] == second["federated"] != second["outputs"]
    for place in ("hf", "checkpoint-old", "centralised/hf", "clients/c/.previous/federated-0"):
        table(f"{place}/model.parquet")
    assert parts("pretrain") == second, "a copy or an export beside them is none of them"
    old = {"files": second["files"] | {"onnx/model.bin": "what an earlier version counted, and somebody removed"}}
    assert identity.damaged(tmp_path, old) == []


def state(run: Path, stage: str = "corpus") -> dict:
    return runs.state(run, stage)


def test_start_working_and_finish(outputs):
    stage = begin(minutes=2.0)
    assert stage.folder == outputs / "toy/00_corpus" and not any(outputs.iterdir()), "the start alone writes nothing"
    assert stage.p == params.Corpus(minutes=2.0)
    assert {"study", "run", "seed", "git", "versions", "hardware", "data", "started"} <= stage.provenance.keys()
    with stage.working():
        assert yaml.safe_load((stage.folder / "params.yaml").read_text()) == stage.p.model_dump()
        assert state(stage.run)["state"] == "running"
    assert not (stage.folder / "done.json").exists()
    facts = runs.finish(stage, {"hours": 0.5, "speakers": 6})
    assert facts["seconds"] >= 0 and facts["peak_memory_bytes"] > 2**20
    assert state(stage.run)["state"] == "done" and state(stage.run)["headline"] == {"hours": 0.5, "speakers": 6}
    assert (stage.folder / "done.json").exists()


def test_finish_needs_work_of_these_parameters_and_finite_figures(outputs):
    with pytest.raises(runs.RunError, match="holds no work"):
        runs.finish(begin(), {})
    do("corpus")
    with pytest.raises(runs.RunError, match="holds no work of these parameters"):
        runs.finish(begin(minutes=2.0), {})
    stage = begin()
    with stage.working():
        pass
    with pytest.raises(runs.RunError, match="headline figure accuracy"):
        runs.finish(stage, {"accuracy": float("nan")})
    assert not (stage.folder / "done.json").exists()


# ---------------------------------------------------------------------------------------------- parameters of a kernel

PARAMETERS = 'run = "toy"  # folder\nseed = 0\nminutes = 2.0\n'


class Kernel(dict):
    """The variables of a notebook, with the cells that were executed, as IPython keeps them."""

    def __init__(self) -> None:
        super().__init__(In=[""])
        self.cell("".join(f"{name} = {value!r}\n" for name, value in params.Corpus().model_dump().items()))

    def cell(self, source: str) -> None:
        self["In"].append(source)
        exec(source, self)

    def start(self) -> runs.Stage:
        self["In"].append('stage = runs.start("corpus", globals())')
        return runs.start("corpus", self)


def test_parameters_are_those_of_the_cell_as_executed_last(outputs):
    kernel = Kernel()
    kernel.start()
    kernel.cell("hours = 3\nprint(hours)")
    kernel.cell(PARAMETERS + "minuts = 4.0")
    with pytest.raises(studies.ParameterError, match="minutes"):
        kernel.start()
    kernel.cell(PARAMETERS)
    assert kernel.start().p.minutes == 2.0, "a typo that was corrected"
    kernel.cell("# Parameters\nminutes = 3.0\n")  # papermill's cell, or one that a person adds
    assert kernel.start().p.minutes == 3.0
    kernel.cell("# my study, beginning anew\n" + PARAMETERS.replace("minutes = 2.0\n", ""))
    assert kernel.start().p.minutes == 1.5, "a remark does not make it papermill's"
    kernel.cell("# Parameters\nminutes = float('inf')\nspeekers = 3\n")  # no literal, as papermill writes it
    with pytest.raises(studies.ParameterError, match="speekers"):
        kernel.start()
    kernel.cell(PARAMETERS)
    kernel.cell("sped = 7")
    with pytest.raises(studies.ParameterError, match="sped"):
        kernel.start()
    kernel.cell("import pathlib\nspeakers = pathlib")
    kernel.cell("takes: int")
    kernel["In"].append("takes = {[]: 1}")  # IPython keeps a cell that failed
    kernel.cell('run = "toy"\nseed = int("3")')
    assert kernel.start().p == params.Corpus(seed=3), "all others have their defaults"
    assert not any(outputs.iterdir())


def test_parameters_changed_after_the_start_are_not_ignored(outputs):
    kernel = Kernel()
    stage = kernel.start()
    kernel.cell(PARAMETERS)
    with pytest.raises(runs.RunError, match=r"minutes is 2\.0 now and was 1\.5"), stage.working():
        pytest.fail("it must not begin")
    assert not list(outputs.iterdir())


def test_ipython_shows_refusals_and_interrupts_in_one_line(outputs, capsys):
    shell = InteractiveShell()
    start = 'from fedhubert_lib import runs\nstage = runs.start("corpus", globals())'

    def run(*sources: str) -> str:
        for source in sources:
            shell.run_cell(source, store_history=True)
        streams = capsys.readouterr()
        return (streams.out + streams.err).strip()

    assert run(PARAMETERS, start, "hours = 3\nother = [hours]\nprint(other)") == "[3]"
    assert "minuts" in run(PARAMETERS + "minuts = 4.0", start)
    assert run(PARAMETERS, start) == ""
    text = run(PARAMETERS.replace("2.0", "3.0"), "with stage.working():\n    print('works')")
    assert text.startswith("parameters have changed") and "\n" not in text
    text = run(start, "with stage.working():\n    stage.folder.joinpath('a.bin').touch()\n    raise KeyboardInterrupt")
    assert text == "00_corpus: interrupted; run the cell again to resume"
    assert state(outputs / "toy")["state"] == "interrupted"
    assert run("with stage.working():\n    print(stage.folder.joinpath('a.bin').exists())") == "True"


# ------------------------------------------------------------------------------------------------ the fate of results


def test_the_same_work_resumes_and_other_work_moves_it_aside(outputs, capsys):
    stage, aside = begin(), outputs / "toy/.previous/00_corpus-1"
    with stage.working():
        (stage.folder / "checkpoint").write_text("round 3")
        (stage.folder / ".model.123.partial.bin").write_text("half")
    with begin().working():
        assert (stage.folder / "checkpoint").exists()
        assert not (stage.folder / ".model.123.partial.bin").exists()
    (outputs / "toy/00_corpus.ipynb").write_text("executed")
    capsys.readouterr()
    other = begin(minutes=2.0)
    assert "minutes 1.5 -> 2.0" in (text := capsys.readouterr().out) and str(aside) in text
    assert (stage.folder / "checkpoint").exists() and not aside.exists(), "the start alone moves nothing"
    with other.working():
        assert not (other.folder / "checkpoint").exists()
        (other.folder / "checkpoint").write_text("round 5")
    assert f"moved: {other.folder} -> {aside}" in capsys.readouterr().out
    assert (aside / "checkpoint").read_text() == "round 3" and (aside / "00_corpus.ipynb").exists()
    with begin().working():
        assert (stage.folder / "checkpoint").read_text() == "round 3", "taken back when asked for again"
    assert (outputs / "toy/00_corpus.ipynb").exists() and not aside.exists()
    assert (outputs / "toy/.previous/00_corpus-2/checkpoint").read_text() == "round 5"


def work_until_rename(number: int, **changes: object) -> None:
    """Work in 00_corpus, in a process of its own that dies before it renames for the time ``number``."""
    count = itertools.count()
    for name in ("rename", "replace"):
        rename = getattr(os, name)
        setattr(os, name, lambda *a, do=rename, **k: os._exit(9) if next(count) == number else do(*a, **k))
    begun = begin(**changes)
    with begun.working():
        (begun.folder / "made.bin").write_text("new")
    runs.finish(begun, {})


@pytest.mark.parametrize("changes", [{}, {"minutes": 3.0}])
def test_a_kill_before_any_rename_loses_nothing(outputs, tmp_path, changes):
    """Neither where results move aside nor where earlier ones come back for them; and the same work goes on then."""
    for content, minutes in (("a", 1.5), ("b", 2.0)):
        do("corpus", content, minutes=minutes)
        (outputs / "toy/00_corpus.ipynb").write_text(content)
    shutil.copytree(outputs / "toy", tmp_path / "before")
    for number in itertools.count():
        shutil.rmtree(outputs / "toy")
        shutil.copytree(tmp_path / "before", outputs / "toy")
        process = multiprocessing.get_context("fork").Process(target=work_until_rename, args=(number,), kwargs=changes)
        process.start()
        process.join()
        again = begin(**changes)
        with again.working():
            (again.folder / "made.bin").write_text("new")
        runs.finish(again, {})
        for name, expected in (("made.bin", {"b", "new"}), ("00_corpus.ipynb", {"a", "b"})):
            expected = expected | ({"a"} if changes else set())  # else it is what came back and was worked on
            assert {path.read_text() for path in (outputs / "toy").rglob(name)} >= expected, number
        assert state(outputs / "toy")["state"] == "done"
        if process.exitcode == 0:
            break
    assert number > 5


def test_results_without_a_record_move_aside_too(outputs):
    folder = do("corpus", "a")
    for name in ("begun", "done"):
        (folder / f"{name}.json").unlink()
    with begin().working():
        assert not (folder / "made.bin").exists()
    assert (outputs / "toy/.previous/00_corpus-1/made.bin").read_text() == "a"


def test_a_file_beside_the_results_is_no_reason_to_make_them_anew(outputs):
    """Such as an export of a model into its stage's folder, or moments of a client that somebody removes; a result that
    is missing, or was changed, is."""
    folder = do("corpus", "m", name="clients/client-000/session-1/moments-000001.safetensors")
    with begin().working():
        (folder / "made.bin").write_text("a")
    runs.finish(begin(), {})
    shutil.rmtree(folder / "clients")
    (folder / "exported").mkdir()
    (folder / "exported" / "model.safetensors").write_text("a copy")
    assert runs.outlook("corpus", params.Corpus(), outputs / "toy").kind == "done"
    (folder / "made.bin").write_text("b")
    assert runs.outlook("corpus", params.Corpus(), outputs / "toy").changes.results == runs.DAMAGED
    (folder / "made.bin").unlink()
    assert runs.outlook("corpus", params.Corpus(), outputs / "toy").changes.results == runs.DAMAGED


def test_a_damaged_model_is_made_again_from_the_last_round(outputs):
    for stage in ("corpus", "partition", "kmeans"):
        do(stage)
    kept = ("checkpoints/round-00002/state.json", "centralised/checkpoints/round-00002/state.json")
    with begin("pretrain").working():
        for name in ("clients/made.bin", "centralised/checkpoint/model.safetensors", *kept):
            (outputs / "toy/03_pretrain" / name).parent.mkdir(parents=True)
            (outputs / "toy/03_pretrain" / name).write_text("{}")
    folder = do("pretrain", "a", name="checkpoint/model.safetensors")
    for place in (".", "centralised"):
        (folder / place / "checkpoint/model.safetensors").unlink()
        assert runs.outlook("pretrain", params.Pretrain(), outputs / "toy").kind == "resume"
    shutil.rmtree(folder / "centralised/checkpoints")
    assert runs.outlook("pretrain", params.Pretrain(), outputs / "toy").kind == "anew", (
        "no round is left to resume from"
    )
    (folder / "centralised/checkpoint/model.safetensors").write_text("{}")
    assert runs.outlook("pretrain", params.Pretrain(), outputs / "toy").kind == "resume"
    (folder / "clients/made.bin").write_text("{")
    assert runs.outlook("pretrain", params.Pretrain(), outputs / "toy").kind == "anew"


def test_done_until_it_works_again(outputs):
    folder = do("corpus")
    for changes in ({}, {"minutes": 2.0}):
        begin(**changes)
        assert (folder / "done.json").exists() and state(outputs / "toy")["state"] == "done"
        assert not runs.is_held(outputs / "toy/.lock")
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
        if changes:  # else the earlier work is written to
            (folder / identity.READ).write_text("{}")  # no result: what 00 is about to read
        raise ValueError("no such teacher")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert after[folder / "made.bin"] == b"a"
    assert json.loads(after[folder / "done.json"]) == json.loads(before[folder / "done.json"])
    assert (outputs / "toy/00_corpus.ipynb").exists() and not any((outputs / "toy/.previous").glob("*"))
    record = state(outputs / "toy")
    assert record["state"] == "done" and record["headline"] == {"figure": 1.0}
    assert runs.read_json(folder / "begun.json")["reason"] == "ValueError: no such teacher"
    assert not runs.is_held(outputs / "toy/.lock")
    begin("partition")
    do("corpus", "b", minutes=3.0)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no such teacher"), begin(minutes=4.0).working():
        raise ValueError("no such teacher")
    assert not (folder / "made.bin").exists(), "nothing of this attempt's had moved aside"


def test_a_failure_releases_the_lock_and_is_recorded(outputs):
    stage = begin()
    with pytest.raises(ValueError, match="diverged"), stage.working():
        (stage.folder / "checkpoint").write_text("round 3")
        raise ValueError("diverged")
    assert not runs.is_held(outputs / "toy/.lock")
    assert index.summary(outputs / "toy")["state"] == "00_corpus failed"
    with stage.working():  # the same cell again
        assert (stage.folder / "checkpoint").exists()
    assert index.summary(outputs / "toy")["state"] == "00_corpus not finished"


def test_stages_come_in_order(outputs):
    with pytest.raises(runs.RunError, match="run notebook 00_corpus first"):
        begin("partition")
    assert not list(outputs.iterdir())
    do("corpus", "a")
    do("partition", "b")
    begin("kmeans")
    do("corpus", "other")
    with pytest.raises(runs.RunError, match="run notebook 01_partition again"):
        begin("kmeans")


def _hold(path: Path, held: multiprocessing.Event, over: multiprocessing.Event) -> None:
    with runs.holding(path, "notebook 03_pretrain"):
        held.set()
        over.wait(60)


def test_two_at_once_in_one_folder(outputs, monkeypatch):
    context = multiprocessing.get_context("spawn")
    held, over = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(outputs / "toy/.lock", held, over))
    other.start()
    assert held.wait(60)
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.1)
    with pytest.raises(runs.RunError, match=f"in use by notebook 03_pretrain, process {other.pid} on"):
        begin()
    assert not (outputs / "toy/00_corpus").exists()
    over.set()
    other.join()
    begin()


# -------------------------------------------------------------------------------------------------------------- identit


def test_identity_is_content(tmp_path, outputs):
    checkpoint, moved = tmp_path / "checkpoint", tmp_path / "moved"
    for folder in (checkpoint, moved):
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
    for stage in ("corpus", "partition", "kmeans"):
        do(stage)
    p, run = params.Pretrain(initial=str(checkpoint)), outputs / "toy"
    one = identity.of("pretrain", p, run)
    assert identity.of("pretrain", p.model_copy(update={"run": "other"}), run) == one
    assert not any(identity.compare(one, identity.of("pretrain", params.Pretrain(initial=str(moved)), run)))
    (checkpoint / "model.safetensors").write_text("other weights")
    assert identity.compare(one, identity.of("pretrain", p, run)).results == "inputs changed: initial"
    do("kmeans", "other labels")
    do("kmeans", "other labels", "codebooks/federated/made.bin")
    assert identity.compare(one, identity.of("pretrain", p, run)).results == "inputs changed: 02_kmeans, initial"


def test_what_an_earlier_version_recorded_of_the_same_inputs_counts(outputs):
    """Hashes of more than a stage reads: of what was left out of the corpus, of phones, of a pooled model."""
    for name in ("manifest.parquet", "excluded.parquet", "phones.parquet"):
        begun = begin("corpus", minutes=1.0)
        with begun.working():
            pd.DataFrame({"utterance": ["u"], "path": [name]}).to_parquet(begun.folder / name)
        runs.finish(begun, {})
    do("partition")
    do("kmeans", "labels", "codebooks/federated/phones.parquet")
    do("pretrain", "weights", "centralised/checkpoint/made.bin")
    recorded = {name: records.read_json(outputs / "toy" / name / "done.json") for name in params.FOLDERS.values()}
    codebook = recorded["02_kmeans"]["codebooks"]["federated"]
    before = {"00_corpus": recorded["00_corpus"]["training"], "02_kmeans": codebook}
    before |= {"03_pretrain": recorded["03_pretrain"]["outputs"]}
    clustered = identity.of("kmeans", params.Kmeans(), outputs / "toy")["inputs"]
    assert clustered["00_corpus"] == before["00_corpus"], "phones, by which units are measured, are read, too"
    now = identity.of("distill", params.Distill(), outputs / "toy")
    assert all(now["inputs"][name] != hash for name, hash in before.items())
    assert identity.compare(now | {"inputs": now["inputs"] | before}, now).results == ""
    other = now | {"inputs": now["inputs"] | {"00_corpus": "of other speech"}}
    assert identity.compare(other, now).results == "inputs changed: 00_corpus"


def test_other_words_to_evaluate_on_leave_training_as_it_is(outputs):
    for takes in (1, 2):
        corpus = begin(keyword_takes=takes)
        with corpus.working():
            pd.DataFrame({"utterance": ["u"], "path": ["u.flac"]}).to_parquet(corpus.folder / "manifest.parquet")
            pd.DataFrame({"word": ["yes"] * takes}).to_parquet(corpus.folder / "keywords.parquet")
        runs.finish(corpus, {})
        do("partition")
        for stage in ("kmeans", "pretrain", "distill", "evaluate") if takes == 1 else ():
            do(stage)
    assert records.stale(outputs / "toy") == {"evaluate": "made from an older 00_corpus"}
    kinds = {name: runs.outlook(name, params.SECTIONS[name](), outputs / "toy").kind for name in params.FOLDERS}
    assert {name for name, kind in kinds.items() if kind != "done"} == {"corpus", "evaluate"}  # here by other takes


def test_a_codebook_that_is_added_leaves_a_teacher_of_another_as_it_is(outputs):
    for stage in ("corpus", "partition"):
        do(stage)
    do("kmeans", "a", "clients/c/federated/labels.bin", codebooks=["federated"])
    teacher = do("pretrain", "weights", codebook="federated")
    for stage in ("distill", "evaluate"):
        do(stage)
    stage = begin("kmeans", codebooks=["federated", "client"])
    with stage.working():
        for kind, labels in (("federated", "a"), ("client", "b")):
            (stage.folder / f"clients/c/{kind}").mkdir(parents=True)
            (stage.folder / f"clients/c/{kind}/labels.bin").write_text(labels)
    runs.finish(stage, {})
    assert not records.stale(outputs / "toy")
    for name in ("pretrain", "distill", "evaluate"):
        p = params.SECTIONS[name]()
        assert runs.outlook(name, p, outputs / "toy").kind == "done"
    do("kmeans", "other", "clients/c/federated/labels.bin", codebooks=["federated", "client"])
    older = dict.fromkeys(("pretrain", "distill"), "made from an older 02_kmeans")
    assert records.stale(outputs / "toy") == older | {
        "evaluate": "of 03_pretrain, which is made from an older 02_kmeans"
    }
    with begin("pretrain").working():
        assert not (teacher / "made.bin").exists()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"device": "cpu", "engine": "pool", "deadline_seconds": 5.0, "gradient_checkpointing": True}, None),
        ({"centralised": False}, "additions"),
        ({"quorum": 0.25}, "additions"),
        ({"rounds": 3}, "results"),
        ({"learning_rate": 0.5}, "results"),
    ],
)
def test_which_parameters_decide_the_results(change, kind):
    values = params.Pretrain().model_dump()
    one = {"stage": "pretrain", "parameters": values, "inputs": {}, "library": {}, "notebook": "", "versions": {}}
    changes = identity.compare(one, one | {"parameters": values | change})._asdict()
    assert {name for name, words in changes.items() if words} == ({kind} if kind else set())


def test_parameters_that_only_another_version_has_count_as_their_defaults():
    values = params.Pretrain().model_dump()
    one = {"stage": "pretrain", "parameters": values, "inputs": {}, "library": {}, "notebook": ""}
    older = one | {"parameters": {k: v for k, v in values.items() if k != "proximal"} | {"width": 96}}
    now = one | {"versions": {"torch": "1.0"}}
    assert not any(identity.compare(older, now))
    assert "proximal 0.0 -> 0.1" in identity.compare(older, now | {"parameters": values | {"proximal": 0.1}}).results


def test_a_removed_parameter_that_changed_something_makes_other_work():
    values = params.Pretrain().model_dump()
    now = {"stage": "pretrain", "parameters": values, "inputs": {}, "library": {}, "notebook": "", "versions": {}}
    for name, as_now, otherwise in (("cohort_fraction", 1.0, 0.3), ("patience", 0, 5)):
        older = [now | {"parameters": values | {name: value}} for value in (as_now, otherwise)]
        assert not any(identity.compare(older[0], now))
        assert f"{name} {otherwise} -> removed" in identity.compare(older[1], now).results


def test_code_and_versions_are_shown_and_results_kept(monkeypatch, outputs, capsys):
    folder = do("corpus")
    library, versions = identity.library(), identity.versions()
    monkeypatch.setattr(identity, "library", lambda: library | {"federated/keys.py": "other"})
    monkeypatch.setattr(identity, "versions", lambda: versions | {"torch": "1.0"})
    stage = begin()
    text = capsys.readouterr().out
    assert "federated/keys.py" in text and f"torch {versions['torch']} -> 1.0" in text and "results are kept" in text
    with stage.working():
        assert (folder / "made.bin").exists()
    runs.finish(stage, {})
    (note,) = json.loads((folder / "done.json").read_text())["resumed"]
    assert "federated/keys.py" in note["changes"] and "torch" in note["changes"]
    assert (
        f"copied: {folder}" in capsys.readouterr().out and (outputs / "toy/.previous/00_corpus-1/made.bin").exists()
    ), "as it was before"


def test_a_record_that_is_gone_is_made_again_or_asked_for(outputs):
    """Its absence is no change of data; a training would have to be repeated."""
    told = {"kmeans": "quality.json", "pretrain": "metrics.jsonl", "evaluate": "report.json"}
    for stage in ("corpus", "partition", "kmeans", "pretrain", "evaluate"):
        do(stage, name=told.get(stage, "made.bin"))
    folders = {stage: outputs / "toy" / params.FOLDERS[stage] for stage in told}

    def outlook(stage: str) -> str:
        return runs.outlook(stage, params.SECTIONS[stage](), outputs / "toy").kind

    assert {outlook(stage) for stage in told} == {"done"}
    for stage, name in told.items():
        (folders[stage] / name).unlink()
    assert outlook("kmeans") == outlook("evaluate") == "resume"
    with pytest.raises(runs.RunError, match=r"metrics.jsonl: gone; put it back"):
        outlook("pretrain")


def test_a_damaged_table_of_the_corpus_is_made_anew(outputs):
    for content in (b"", b"PAR1"):
        stage = begin()
        with stage.working():
            (stage.folder / "synthetic").mkdir(exist_ok=True)
            pd.DataFrame({"utterance": ["u"], "path": ["/u.flac"]}).to_parquet(stage.folder / "manifest.parquet")
        runs.finish(stage, {})
        (stage.folder / "manifest.parquet").write_bytes(content)
        future = runs.outlook("corpus", params.Corpus(), outputs / "toy")
        assert future.kind == "anew" and runs.DAMAGED in future.words


def test_files_of_an_editor_are_no_part_of_the_library(tmp_path, monkeypatch):
    (package := tmp_path / "fedhubert_lib/.ipynb_checkpoints").mkdir(parents=True)
    (package / "a-checkpoint.py").touch()
    (package.parent / "a.py").touch()
    (package.parent / ".#a.py").symlink_to("somebody@here.1234")
    monkeypatch.setattr(params, "ROOT", tmp_path)
    assert identity.library().keys() == {"a.py"}


@pytest.mark.parametrize("done", [True, False])
def test_features_of_other_code_are_computed_again(monkeypatch, outputs, done, capsys):
    for stage in ("corpus", "partition", "kmeans", "pretrain"):
        do(stage)
    stage = begin("evaluate")
    kept = stage.folder / "features"
    with stage.working():
        kept.mkdir()
    if done:
        runs.finish(stage, {})
    with begin("evaluate").working():
        assert kept.is_dir()
    library = identity.library()
    monkeypatch.setattr(identity, "library", lambda: library | {"features.py": "other"})
    with begin("evaluate").working():
        assert not kept.exists() and f"removed: {kept}" in capsys.readouterr().out


def test_features_of_other_code_are_computed_again_where_earlier_work_is_taken_back(monkeypatch, outputs):
    for stage in ("corpus", "partition", "kmeans", "pretrain"):
        do(stage)
    kept = do("evaluate", name="features/a.npy").parent / "05_evaluate/features"
    do("evaluate", name="features/b.npy", seed=1)
    assert [path.name for path in kept.iterdir()] == ["b.npy"]
    library = identity.library()
    monkeypatch.setattr(identity, "library", lambda: library | {"features.py": "other"})
    with begin("evaluate").working():
        assert not kept.exists()
    (aside,) = runs.previous(outputs / "toy", "evaluate")
    assert (aside / "features/b.npy").exists(), "of its code, as long as nobody asks for it"


def test_a_missing_report_under_other_code_is_made_again_beside_a_copy(monkeypatch, outputs):
    for stage in ("corpus", "partition", "kmeans"):
        do(stage, name="quality.json")
    library = identity.library()
    monkeypatch.setattr(identity, "library", lambda: library | {"features.py": "other"})
    (outputs / "toy/02_kmeans/quality.json").unlink()
    future = runs.outlook("kmeans", params.Kmeans(), outputs / "toy")
    assert future.kind == "resume" and "library changed" in future.words
    with begin("kmeans").working():
        pass
    assert [path.name for path in runs.previous(outputs / "toy", "kmeans")] == ["02_kmeans-1"]


def test_a_copy_of_what_other_code_works_on_is_made_once_and_is_no_stage(monkeypatch, outputs):
    folder, library = do("corpus"), identity.library()
    monkeypatch.setattr(identity, "library", lambda: library | {"federated/keys.py": "other"})
    (folder / "dangling").symlink_to("nowhere")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), begin().working():
            raise KeyboardInterrupt
    assert [path.name for path in runs.previous(outputs / "toy", "corpus")] == ["00_corpus-1"]
    shutil.rmtree(folder)
    assert runs.outlook("corpus", params.Corpus(), outputs / "toy").kind == "anew", "the copy lacks audio"


def test_a_changed_file_behind_a_link_is_seen(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.flac").write_text("a")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/train").symlink_to(tmp_path / "real")
    p = params.Corpus(kind="librispeech", root=str(tmp_path / "root"))
    before = identity.listings(p)
    (tmp_path / "real/a.flac").unlink()
    assert identity.listings(p) != before


def test_a_readme_in_a_checkpoint_is_no_other_checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    (folder / "config.json").write_text("{}")
    p = params.Pretrain(initial=str(folder))
    before = identity.listings(p)["initial"]
    (folder / "README.md").write_text("a card")
    assert identity.listings(p)["initial"] == before
    (folder / "config.json").write_text("{ }")
    assert identity.listings(p)["initial"] != before


def test_the_evaluation_does_without_a_student_of_an_older_teacher(outputs):
    for stage in params.SECTIONS:
        do(stage)
    do("pretrain", "longer")
    inputs = begin("evaluate").identity["inputs"]
    assert "03_pretrain" in inputs and "04_distill" not in inputs


def test_a_student_of_a_teacher_from_elsewhere_needs_no_pretraining(outputs, tmp_path):
    teacher = str(tmp_path / "teacher")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text("{}")
    for stage in ("corpus", "partition", "kmeans"):
        do(stage)
    with pytest.raises(runs.RunError, match="03_pretrain: not done yet"):
        begin("distill")
    do("distill", "student", teacher=teacher)
    do("pretrain", "that nobody learned from")
    assert not records.stale(outputs / "toy")
    assert runs.outlook("distill", params.Distill(teacher=teacher), outputs / "toy").words == ""


def test_a_download_is_no_change_of_inputs(tmp_path, outputs):
    place = tmp_path / "LibriSpeech"
    stage = begin(kind="librispeech", root=str(place), download=True)
    with stage.working():
        place.mkdir()
        (place / "archive").touch()
        files.write_json(stage.folder / identity.READ, identity.listings(stage.p))  # as corpora.prepare does
    runs.finish(stage, {})
    now = identity.of("corpus", stage.p, stage.run)
    assert runs.read_json(stage.folder / "done.json")["identity"] == now


def test_recordings_that_arrive_while_a_folder_is_read_are_another_input(tmp_path, outputs):
    place = tmp_path / "recordings"
    place.mkdir()
    stage = begin(kind="folder", root=str(place))
    with stage.working():
        (place / "late.wav").touch()
    runs.finish(stage, {})
    assert runs.outlook("corpus", stage.p, stage.run).kind == "anew"


def test_a_teacher_that_is_replaced_while_its_student_learns_is_another(outputs, tmp_path):
    for stage in ("corpus", "partition", "kmeans", "pretrain"):
        do(stage)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    begun = begin("distill", teacher=str(teacher))
    with begun.working():
        (begun.folder / "made.bin").touch()
    (teacher / "config.json").write_text('{"other": 1}')
    runs.finish(begun, {})
    future = runs.outlook("distill", params.Distill(teacher=str(teacher)), outputs / "toy")
    assert future.changes.results == "inputs changed: teacher"


def test_results_that_rest_on_older_ones_are_stale_everywhere(outputs):
    for stage in params.SECTIONS:
        do(stage)
    assert index.summary(outputs / "toy")["state"] == "done" and "stale" not in index.listing(outputs)
    do("pretrain", "longer")
    assert records.stale(outputs / "toy") == dict.fromkeys(("distill", "evaluate"), "made from an older 03_pretrain")
    shutil.copytree(outputs / "toy/04_distill", outputs / "toy/04_distill-old")
    assert "1.0 (stale)" in (text := index.listing(outputs)) and "04_distill stale; 05_evaluate stale" in text
    assert not [key for key in records.all_parameters(outputs / "toy") if "-old" in key], "a copy is no stage"


def test_the_evaluation_runs_without_a_student_and_sees_one_that_comes(outputs):
    for stage in ("corpus", "partition", "kmeans", "pretrain"):
        do(stage)
    folder = do("evaluate")
    assert not records.stale(outputs / "toy")
    do("distill")
    begun = json.loads((folder / "begun.json").read_text())["identity"]
    assert identity.compare(begun, begin("evaluate").identity).results == "inputs changed: 04_distill"


def _speak(folder: Path, audio: Path) -> None:
    """The table of 00_corpus and 01_partition, which names audio by its place."""
    audio.parent.mkdir(parents=True, exist_ok=True)
    audio.touch()
    table = pd.DataFrame({"utterance": ["a"], "path": [str(audio)], "fingerprint": ["1"]})
    table.to_parquet(folder / "manifest.parquet")


def test_a_run_that_was_moved_writes_its_tables_again_and_keeps_the_rest(outputs):
    for stage in ("corpus", "partition"):
        begun = begin(stage)
        with begun.working():
            _speak(begun.folder, outputs / "toy/00_corpus/synthetic/a.flac")
        runs.finish(begun, {})
    do("kmeans")
    (outputs / "toy").rename(outputs / "moved")
    run, moved = outputs / "moved", {"run": "moved"}
    with pytest.raises(runs.RunError, match=r"a\.flac: no such file; was this run moved"):
        begin("kmeans", **moved)
    assert "the run was moved" in runs.outlook("corpus", params.Corpus(**moved), run).words
    for stage in ("corpus", "partition"):
        begun = begin(stage, **moved)
        with begun.working():
            _speak(begun.folder, run / "00_corpus/synthetic/a.flac")
        runs.finish(begun, {})
    assert not records.stale(run)
    assert runs.outlook("kmeans", params.Kmeans(**moved), run).kind == "done"
    (run / "00_corpus/synthetic/a.flac").unlink()
    assert runs.outlook("corpus", params.Corpus(**moved), run).changes.results == runs.DAMAGED, "removed, not moved"
    table = pd.DataFrame({"path": [str(outputs / "LibriSpeech" / "a.flac")]})
    table.to_parquet(run / "00_corpus/manifest.parquet")
    assert runs.lost_audio(run) is None, "a missing file of another corpus tells nothing of the run"
    word = outputs / "toy/00_corpus/synthetic/yes.wav"
    pd.DataFrame({"path": [str(word)]}).to_parquet(run / "00_corpus/keywords.parquet")
    assert runs.lost_audio(run) == word, "of other speech, with built-in words"


def test_git_is_the_projects_and_saved_outputs_are_no_change(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        nobody = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        subprocess.run(["git", "-C", tmp_path, *nobody, *arguments], check=True, capture_output=True)

    path = tmp_path / "project/notebooks/00 körper.ipynb"
    path.parent.mkdir(parents=True)
    cell = {"cell_type": "code", "source": ["1 + 1"], "metadata": {}, "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}}))
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(params, "ROOT", tmp_path / "project")
    assert identity.git()["commit"] and identity.git()["dirty"] is False
    path.write_text(json.dumps({"cells": [cell | {"outputs": ["2"], "execution_count": 7}], "metadata": {"x": 1}}))
    assert identity.git()["dirty"] is False
    path.write_text(json.dumps({"cells": [cell | {"source": ["1 + 2"]}], "metadata": {}}))
    assert identity.git()["dirty"] is True
    git("checkout", ".")
    (tmp_path / "more.py").touch()
    assert identity.git()["dirty"] is False, "not the project's"
    (path.parent / "new.ipynb").write_text("{}")
    git("add", ".")
    (path.parent / "new.ipynb").write_text("{}\n")
    assert identity.git()["dirty"] is True


# ------------------------------------------------------------------------------------------------------- the command


def test_listing_shows_runs_side_by_side_and_where_they_differ(outputs):
    assert "no runs" in index.listing(outputs) and index.results(outputs / "toy") == ""
    do("corpus")
    do("corpus", run="other", minutes=2.5)
    (outputs / "not a run").mkdir()
    (outputs / "toy/00_corpus.ipynb").touch()
    text = index.listing(outputs)
    assert all(word in text for word in ("toy", "other", "00_corpus done", "corpus.minutes"))
    assert "corpus.speakers" not in text and "not a run" not in text
    (outputs / "other/03_pretrain").mkdir()
    (outputs / "other/03_pretrain/params.yaml").write_text("seed: 7\n")
    assert index.summary(outputs / "other")["seed"] == 7, "of training, whatever the last stage's is"


def test_a_run_with_a_broken_record_hides_no_other(outputs):
    do("corpus")
    for number, record in enumerate(("{", "[]", '{"stages": []}')):
        (outputs / f"broken{number}").mkdir()
        (outputs / f"broken{number}/run.json").write_text(record)
    for number, values in enumerate((b"a: [", b"- a", b"\xff\xfe")):
        (outputs / f"odd{number}/00_corpus").mkdir(parents=True)
        (outputs / f"odd{number}/run.json").write_text("{}")
        (outputs / f"odd{number}/00_corpus/params.yaml").write_bytes(values)
    begun = outputs / "locked/00_corpus/begun.json"
    begun.parent.mkdir(parents=True)
    begun.write_text('{"started": 0}')
    (outputs / "locked/run.json").write_text("{}")
    (outputs / "locked/.lock").mkdir()  # cannot be opened, as one that is another user's
    text = index.listing(outputs)
    assert all(f"{name}: cannot be read" in text for name in ("broken0/run.json", "broken1/run.json", "params.yaml"))
    assert "00_corpus done" in text and "odd2" in text and "locked/.lock" in text
    (outputs / "toy/00_corpus/done.json").write_text('{"identity": ')
    with pytest.raises(runs.RunError, match=r"done\.json: cannot be read"):
        begin()


def test_outputs_are_the_projects_by_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDHUBERT_OUTPUTS", raising=False)
    assert runs.outputs() == ROOT / "outputs"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDHUBERT_OUTPUTS", "~/runs")
    assert runs.outputs() == tmp_path / "runs"


def test_run_help_lists_exit_codes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {code}" in text for code in ("0 ", "1 ", "2 ", "3 ", "75 "))


def test_clean_shows_sizes_and_removes_what_is_named(outputs, capsys):
    for minutes in (1.5, 2.0, 2.5):
        do("corpus", "x" * (3 << 20), minutes=minutes)
    capsys.readouterr()
    assert cli.main(["clean", "toy"]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]]
    names = ("00_corpus", ".previous/00_corpus-1", ".previous/00_corpus-2")
    assert rows == [[name, "3.0", "MiB"] for name in names]
    assert cli.main(["clean", str(outputs / "toy"), "00_corpus"]) == 2, "the stage itself is not removed"
    assert cli.main(["clean", "toy", ".previous/00_corpus-1", "../../other"]) == 2
    assert (outputs / "toy/.previous/00_corpus-1").exists()
    assert cli.main(["clean", "toy", *[".previous/00_corpus-1"] * 2]) == 0
    (outputs / "toy/.previous/00_corpus-9old").mkdir()
    do("corpus", minutes=3.0)
    names = sorted(path.name for path in (outputs / "toy/.previous").iterdir())
    assert names == ["00_corpus-2", "00_corpus-3", "00_corpus-9old"], "numbered upwards: the last is the latest"
    assert cli.main(["clean", "nothing"]) == 2


def test_a_closed_pipe_is_quiet(outputs):
    do("corpus")
    command = f"{sys.executable} -m fedhubert_lib.cli ls | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


PARTS = dict.fromkeys(["outputs", "speech", "heard", "training", "lists", "learnt", "federated"], "now")
PARTS |= {"codebooks": {"federated": "now"}, "targets": {"federated": "now"}}


@pytest.mark.parametrize("part", PARTS)
def test_a_stage_may_rest_on_any_part_of_an_earlier_one(tmp_path, part):
    """A later stage stays valid when the part that it used is the same, whatever else was added."""
    files.write_json(tmp_path / "03_pretrain/done.json", {part: PARTS[part], "identity": {"inputs": {}}})
    for rests, states in (("now", []), ("then", ["distill"])):
        inputs = {"identity": {"inputs": {"03_pretrain": rests}}, "outputs": "student"}
        files.write_json(tmp_path / "04_distill/done.json", inputs)
        assert list(records.stale(tmp_path)) == states
