"""A run takes from another what does not differ, shares no file that is written to, and does without the other."""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT

from fedhubert_lib import cli, files, identity, index, params, records, runner, runs, sharing

STAGES = list(params.SECTIONS)[:5]


def do(stage: str, run: str, **changes: object) -> Path:
    """A stage of ``run`` from start to finish, with a file of each kind that the real one leaves; its folder."""
    begun = runs.start(stage, params.SECTIONS[stage](run=run, **changes).model_dump())
    with begun.working():
        folder = begun.folder
        if stage == "corpus":
            (folder / "synthetic").mkdir()
            (folder / "synthetic/u.flac").write_bytes(b"speech")
        if stage in ("corpus", "partition"):
            audio = begun.run / "00_corpus/synthetic/u.flac"
            rows = {"utterance": ["u", "v"], "path": [str(audio), "/data/v.flac"], "samples": [6, 8]}
            (folder / "clients/c").mkdir(parents=True)
            pd.DataFrame(rows).to_parquet(folder / "clients/c/train.parquet")
            pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")
        else:
            (folder / "codebooks/federated").mkdir(parents=True)
            np.save(folder / "codebooks/federated/weights.npy", np.arange(3) + len(changes))
            files.append_row(folder / "metrics.jsonl", {"kind": "round", "round": 1})
            (folder / ".lock").touch()
    runs.finish(begun, {"figure": 1.0})
    (begun.run / f"{folder.name}.ipynb").write_text("{}")
    return folder


@pytest.fixture
def other(outputs: Path) -> Path:
    for stage in STAGES:
        do(stage, "a")
    return outputs / "a"


def take(run: Path, *others: Path, **changes: dict[str, object]) -> list[str]:
    """Take stages until one cannot be; the names of those that were."""
    taken = []
    for stage in STAGES:
        p = params.SECTIONS[stage](run=run.name, **changes.get(stage, {}))
        if not sharing.take(stage, p, run, others, runs.outlook(stage, p, run).identity):
            break
        taken.append(stage)
    return taken


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stages_that_do_not_differ_are_links_that_outlive_the_other_run(other, capsys):
    run, before = other.with_name("b"), contents(other)
    capsys.readouterr()
    assert take(run, other, distill={"temperature": 2.0}) == STAGES[:4]
    assert "04_distill: differs from a (parameters changed: temperature 4.0 -> 2.0)" in capsys.readouterr().out
    assert contents(other) == before
    for name in (
        "00_corpus/synthetic/u.flac",
        "02_kmeans/codebooks/federated/weights.npy",
        "03_pretrain/codebooks/federated/weights.npy",
    ):
        assert os.path.samefile(run / name, other / name)
    assert not list(run.rglob(".lock")) and not list(run.glob(".*.partial"))
    # What says whose it is, or is appended to, is the run's.
    files.append_row(run / "03_pretrain/metrics.jsonl", {"kind": "round", "round": 2})
    assert contents(other) == before
    assert yaml.safe_load((run / "03_pretrain/params.yaml").read_text())["run"] == "b"
    for table in ("00_corpus/manifest", "00_corpus/clients/c/train", "01_partition/clients/c/train"):
        paths = pd.read_parquet(run / f"{table}.parquet").path.tolist()
        assert paths == [str(run / "00_corpus/synthetic/u.flac"), "/data/v.flac"]
    done = json.loads((run / "01_partition/done.json").read_text())
    assert done["taken_from"]["run"] == str(other) and done["git"] == identity.git()
    assert done["taken_from"]["outputs"] == json.loads((other / "01_partition/done.json").read_text())["outputs"]
    assert json.loads((run / "run.json").read_text())["data"] == done["speech"][:16]
    # The other may go, or do other work: here all is done as before, and the next stage can begin.
    shutil.rmtree(other)
    assert not records.stale(run) and runs.lost_audio(run) is None
    for stage in STAGES[:4]:
        future = runs.outlook(stage, params.SECTIONS[stage](run="b"), run)
        assert future.kind == "done" and not any(future.changes)
        assert runner.needed(future, run / f"{params.FOLDERS[stage]}.ipynb") == (False, "unchanged, skipped")
    assert runs.outlook("distill", params.Distill(run="b", temperature=2.0), run).kind == "anew"


def test_a_stage_that_differs_moves_aside_what_the_run_holds(other, capsys):
    held = do("corpus", "b", minutes=2.0)
    assert take(other.with_name("b"), other, kmeans={"clusters": 9}) == STAGES[:2]
    assert (held.parent / ".previous/00_corpus-1/done.json").exists() and runs.state(held.parent, "corpus")
    # The second of two runs has what the first has not; a chain of runs is no different.
    do("kmeans", "b", clusters=9)
    capsys.readouterr()
    run = other.with_name("c")
    assert take(run, other, other.with_name("b"), kmeans={"clusters": 9}) == STAGES[:3]
    out = capsys.readouterr().out
    assert "02_kmeans: differs from a (parameters changed: clusters 20 -> 9)" in out
    assert f"02_kmeans: taken from {other.with_name('b')}" in out
    assert "03_pretrain: differs from a (inputs changed: 02_kmeans)" in out and "03_pretrain: not done in b" in out


def test_lists_that_name_another_copy_of_the_speech_are_not_taken(outputs, tmp_path):
    for name in ("slow", "fast"):
        (tmp_path / name).mkdir()
    of_run = {"a": str(tmp_path / "slow"), "b": str(tmp_path / "fast")}
    for run, root in of_run.items():
        do("corpus", run, kind="librispeech", root=root)
    do("partition", "a")
    run, p = outputs / "b", params.Partition(run="b")
    assert not sharing.take("partition", p, run, [outputs / "a"], runs.outlook("partition", p, run).identity)


def test_half_a_copy_of_a_killed_start_goes(other, capsys):
    left = other.parent / "new/.00_corpus.4242.partial"
    left.mkdir(parents=True)
    take(other.parent / "new", other)
    assert not left.exists()


def test_stages_of_a_run_that_was_made_read_only_can_be_written(other):
    places = [path for path in (other, *other.rglob("*")) if path.is_dir() or path.suffix == ".json"]
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert take(other.parent / "new", other) == list(STAGES)
    finally:
        for path in places:
            path.chmod(0o755)
    taken = [path for path in (other.parent / "new").rglob("*") if path.is_dir() or path.suffix == ".json"]
    assert taken and all(path.stat().st_mode & 0o200 for path in taken)


def test_a_baseline_is_added_to_a_stage_that_was_taken(outputs):
    for stage in STAGES[:4]:
        do(stage, "a", **({"centralised": False} if stage == "pretrain" else {}))
    assert take(outputs / "b", outputs / "a") == STAGES[:4]
    future = runs.outlook("pretrain", params.Pretrain(run="b"), outputs / "b")
    assert future.kind == "done" and "centralised False -> True" in future.changes.additions


def test_damage_is_not_shared_and_a_real_federation_neither(other, outputs, capsys):
    assert take(outputs / "b", other, kmeans={"engine": "deployment"}) == STAGES[:2]
    assert "real federation" in capsys.readouterr().out
    np.save(other / "02_kmeans/mine.npy", np.arange(4))  # somebody's copy beside the results is no damage
    assert take(outputs / "c", other) == STAGES
    (other / "03_pretrain/metrics.jsonl").unlink()
    with pytest.raises(runs.RunError, match="03_pretrain: files that it made are missing"):
        take(outputs / "d", other)
    np.save(other / "02_kmeans/codebooks/federated/weights.npy", np.arange(4))
    with pytest.raises(runs.RunError, match="02_kmeans: files that it made are missing or were changed"):
        take(outputs / "b", other)
    assert not (outputs / "b/02_kmeans").exists() and not list((outputs / "b").glob(".*partial*"))


def test_a_stage_that_the_other_run_begins_again_meanwhile_is_refused(other, monkeypatch):
    def begins(*_: object) -> str:
        (other / "02_kmeans/done.json").unlink(missing_ok=True)
        return ""

    assert take(other.with_name("b"), other, kmeans={"clusters": 9}) == STAGES[:2]
    monkeypatch.setattr(sharing, "_differs", begins)
    with pytest.raises(runs.RunError, match="02_kmeans: is being worked on"):
        take(other.with_name("b"), other)


def test_without_hard_links_results_are_copied(other, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    private = other / "02_kmeans/codebooks/federated/weights.npy"
    private.chmod(0o600)
    assert take(other.with_name("b"), other) == STAGES
    copied = other.with_name("b") / "02_kmeans/codebooks/federated/weights.npy"
    assert copied.stat().st_mode & 0o777 == 0o600 and copied.stat().st_mtime == private.stat().st_mtime
    assert not os.path.samefile(private, copied)


def test_listing_and_sizes_tell_what_is_shared_and_from_where(other):
    run = other.with_name("b")
    take(run, other)
    assert "00 01 02 03 04 from a" in index.listing(run.parent)
    assert "shared" in index.size(run / "02_kmeans") and f"taken from {other}" in index.previous(run)
    shutil.rmtree(other)
    assert "shared" not in index.size(run / "02_kmeans")


@pytest.mark.slow
def test_a_real_run_like_another_equals_one_made_alone_and_outlives_the_other(outputs, capsys):
    short = ["pretrain.rounds=1", "distill.rounds=1", "pretrain.centralised=false", "distill.centralised=false"]
    short += ["kmeans.codebooks=[federated]"]

    def run(name: str, *more: str, changes: Sequence[str] = ()) -> Path:
        words = [word for change in (*short, *changes) for word in ("--set", change)]
        assert cli.main(["run", str(ROOT / "params/toy.yaml"), "--run", name, *words, *more]) == runner.OK
        return outputs / name

    def results(folder: Path) -> dict[str, bytes]:
        kept = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".npy", ".bin")]
        names = {path: str(path.relative_to(folder)) for path in kept}
        return {name: path.read_bytes() for path, name in names.items() if "session-" not in name}  # drawn anew

    other, changed = run("a", "--until", "pretrain"), ["pretrain.local_steps=3"]
    capsys.readouterr()
    run("b", "--like", "a", "--until", "pretrain", changes=changed)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "taken from" in line] == ["00_corpus", "01_partition", "02_kmeans"]
    assert any(line.startswith("03_pretrain: differs from a (parameters changed: local_steps 2 -> 3") for line in lines)
    shutil.rmtree(other)
    like, alone = (run(name, "--until", "distill", changes=changed) for name in ("b", "alone"))
    for stage in ("02_kmeans", "03_pretrain", "04_distill"):
        assert results(like / stage) == results(alone / stage) != {}
