"""A stage begins with checked parameters in a folder of its own, and is done only when it says so."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from fedhubert_lib import identity, index, params, runs


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
    with pytest.raises(params.ParameterError, match="did you mean minutes"):
        begin(minute=2.0)
    assert not list(outputs.iterdir())


def test_run_all_again_in_a_warm_kernel():
    namespace = params.Corpus().model_dump()
    runs.finish(runs.start("corpus", namespace), {})
    namespace["hours"] = 3  # what a later cell has set
    namespace["minutes"] = 2.5
    assert runs.start("corpus", namespace).p.minutes == 2.5


def test_stages_come_in_order(outputs):
    with pytest.raises(runs.RunError, match="00_corpus: not done yet; run notebook 00_corpus first"):
        begin("partition")
    do("corpus", "a")
    do("partition", "b")
    begin("kmeans")
    do("corpus", "other")
    with pytest.raises(runs.RunError, match="01_partition: made from another 00_corpus than is there now"):
        begin("kmeans")


def test_the_same_work_goes_on_and_other_work_starts_from_nothing():
    stage = begin()
    (stage.folder / "checkpoint").write_text("round 3")
    (stage.folder / ".model.123.partial.bin").write_text("half")
    again = begin()
    assert (again.folder / "checkpoint").exists()
    assert not (again.folder / ".model.123.partial.bin").exists()
    other = begin(minutes=2.0)
    assert not (other.folder / "checkpoint").exists()
    (other.folder / "checkpoint").write_text("round 3")
    (other.folder / "begun.json").unlink()
    assert not (begin(minutes=2.0).folder / "checkpoint").exists()


def test_done_is_taken_back_when_a_stage_begins_again():
    folder = do("corpus")
    assert (folder / "done.json").exists()
    begin()
    assert not (folder / "done.json").exists()


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
    (checkpoint / "model.safetensors").write_text("other weights")
    assert identity.changes(one, identity.of("pretrain", p, run)) == ["inputs changed: initial"]
    do("kmeans", "other labels")
    assert identity.changes(one, identity.of("pretrain", p, run)) == ["inputs changed: 02_kmeans, initial"]
    faster = identity.of("pretrain", p.model_copy(update={"learning_rate": 0.5}), run)
    assert "parameters changed: learning_rate 0.001 -> 0.5" in identity.changes(one, faster)


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


def test_library_is_what_a_notebook_imports_and_what_that_imports():
    code = "%load_ext autoreload\n!ls\nfrom fedhubert_lib import audio, partition\n"
    found = identity.library(code, Path("x.ipynb"))
    assert {"audio.py", "partition.py", "seeds.py", "files.py"} <= found.keys()
    assert not {"hubert.py", "cli.py", "runner.py"} & found.keys()
    shown = identity.library("from fedhubert_lib import runs, plots", Path("x.ipynb"))
    assert {"runs.py", "plots/__init__.py", "plots/training.py"} <= shown.keys() and "hubert.py" not in shown
    package = identity.library("import fedhubert_lib.federated.protocol", Path("x.ipynb"))
    assert {"federated/__init__.py", "federated/protocol.py"} <= package.keys()
    with pytest.raises(runs.RunError, match=r"x\.ipynb: Python cannot read it"):
        identity.library("def", Path("x.ipynb"))


def test_results_rest_on_nothing_that_only_shows_them():
    one = {"parameters": {}, "inputs": {}, "library": {"plots.py": "a", "kmeans.py": "a"}, "notebook": "a"}
    shown = one | {"library": {"plots.py": "b", "kmeans.py": "a"}, "notebook": "b"}
    assert identity.changes(one, shown) == ["library changed: plots.py", "notebook changed"]
    assert identity.same_work(one, shown)
    assert not identity.same_work(one, one | {"library": {"plots.py": "a", "kmeans.py": "b"}})
    assert not identity.same_work(one, one | {"library": {"plots.py": "a"}})


def test_git_is_that_of_the_project_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert runs.git()["commit"] == (expected.stdout.strip() or None)


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


def test_a_run_whose_own_speech_lies_elsewhere_says_so(outputs):
    folder = do("corpus")
    (folder / "synthetic").mkdir()
    pd.DataFrame({"path": [str(outputs / "before" / "a.flac")]}).to_parquet(folder / "manifest.parquet")
    with pytest.raises(runs.RunError, match=r"a\.flac: is not there; this run was made at another place"):
        begin("partition")


def test_results_are_a_table_and_where_they_lie(outputs):
    measures = ("accuracy", "pnmi")
    report = {
        "systems": [{"system": name, "title": name.title()} for name in ("student", "mfcc")],
        "measures": [{"measure": name, "title": name.upper()} for name in (*measures, "unmeasured")],
        "figures": [
            {"system": "student", "measure": "accuracy", "layer": None, "value": 0.5, "low": 0.375, "high": 0.625},
            {"system": "student", "measure": "accuracy", "layer": 3, "value": 0.9, "low": None, "high": None},
            {"system": "mfcc", "measure": "pnmi", "layer": None, "value": 0.25, "low": None, "high": None},
        ],
    }
    folder = outputs / "toy/05_evaluate"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures/layers.png").touch()
    (folder / "report.json").write_text(json.dumps(report))
    shown = index.results(outputs / "toy").splitlines()
    assert shown[:3] == ["           ACCURACY  PNMI", "Student  0.5 ±0.125     -", "Mfcc              -  0.25"]
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
