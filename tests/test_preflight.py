"""What a later stage needs is looked at before the first: each fault is named with its parameter, all at once."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import ROOT

from fedhubert_lib import cli, files, hubert, identity, params, preflight, pretrained, runner, runs, studies


def problems(run: Path, *settings: str, first: str = "corpus") -> str:
    """What keeps the toy study with ``settings`` from running from stage ``first`` on; empty: nothing."""
    study = studies.load(ROOT / "params" / "toy.yaml", settings)
    stages = list(params.SECTIONS)
    try:
        preflight.study(study, stages[stages.index(first) :], run)
    except runs.RunError as error:
        return str(error)
    return ""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small HuBERT of three layers without a head, as public ones are."""
    folder = tmp_path / "checkpoint"
    pretrained.save(folder, hubert.Hubert(hubert.preset("tiny", num_hidden_layers=3)))
    return folder


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_nothing_keeps_the_toy_study_from_running(tmp_path):
    assert problems(tmp_path) == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "wav2vec2"}, "model_type is 'wav2vec2'; only HuBERT"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 1]}, "labels need 400 per 320"),
        ({"num_hidden_layers": 4}, "does not fit its config"),
    ],
)
def test_another_kind_of_model_is_refused_before_any_stage(values, words, checkpoint, tmp_path):
    change(checkpoint, **values)
    places = ("kmeans.features", "pretrain.initial", "distill.teacher")
    told = problems(tmp_path, *(f"{place}={checkpoint}" for place in places), "distill.objectives=[hubert]")
    assert [line.split(": ")[0] for line in told.splitlines()] == list(places)
    assert all(words in line for line in told.splitlines())


def test_a_layer_or_head_that_the_checkpoint_lacks_is_found(checkpoint, tmp_path):
    for layer in ("auto", "3"):
        assert not problems(tmp_path, f"kmeans.features={checkpoint}", f"kmeans.layer={layer}")
    assert "layer 4 given, but" in problems(tmp_path, f"kmeans.features={checkpoint}", "kmeans.layer=4")
    teacher = f"distill.teacher={checkpoint}"
    assert "has no head.safetensors" in problems(tmp_path, teacher, "distill.soft_weight=0.5")
    assert not problems(tmp_path, teacher), "labels and layers need no head"
    assert not problems(tmp_path, teacher, "distill.objectives=[hubert]", "distill.teacher_layer=3")
    assert "teacher_layer is 4" in problems(tmp_path, teacher, "distill.objectives=[hubert]", "distill.teacher_layer=4")


def test_heads_that_do_not_divide_the_width_are_refused_before_any_stage(tmp_path):
    for width in ((), ("pretrain.hidden_size=96",)):
        told = problems(tmp_path, "pretrain.attention_heads=5", *width)
        assert "pretrain.attention_heads: hidden_size" in told
        assert "must be a multiple of num_attention_heads 5" in told


def test_the_teacher_to_come_is_judged_by_the_parameters_of_pretraining(tmp_path):
    told = problems(tmp_path, "distill.initial=teacher")
    assert told.startswith("distill.teacher: ") and "in the student and" in told
    same = [f"{stage}.{name}" for stage in ("pretrain", "distill") for name in ("hidden_size=96", "attention_heads=3")]
    assert not problems(tmp_path, "distill.initial=teacher", *same)
    shape = hubert.preset("tiny", "logmel", hidden_size=96, num_attention_heads=3, intermediate_size=384)
    pretrained.save(tmp_path / "03_pretrain/checkpoint", hubert.Hubert(shape))
    others = ("pretrain.attention_heads=2", "distill.attention_heads=3", "distill.initial=teacher")
    assert "heads" in problems(tmp_path, *same, *others)
    assert not problems(tmp_path, *same, *others, first="distill"), "one that is there is judged as it is"


def test_a_checkpoint_of_other_sizes_than_are_set_is_refused(tmp_path):
    small = hubert.preset("small", num_hidden_layers=2, hidden_size=64, num_attention_heads=2)
    pretrained.save(tmp_path / "checkpoint", hubert.Hubert(small))
    start = f"pretrain.initial={tmp_path / 'checkpoint'}"
    wanted = ["pretrain.layers=2", "pretrain.hidden_size=64", "pretrain.attention_heads=null"]
    wanted += ["pretrain.feed_forward_size=null", "pretrain.conv_width=null"]
    assert not problems(tmp_path, start, *wanted)
    assert "has layers 2, but 6 is given; set it to 2, or null" in problems(
        tmp_path, start, *wanted, "pretrain.layers=6"
    )


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = problems(tmp_path, "kmeans.device=cuda", "evaluate.device=cuda:1", "distill.device=cpu")
    lines = dict(line.split(": ", 1) for line in told.splitlines())
    assert lines.keys() == {"kmeans.device", "evaluate.device"}
    assert "sees 0 GPUs" in lines["kmeans.device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "'cuda:1': this process sees 1 GPUs" in problems(tmp_path, "evaluate.device=cuda:1")
    cluster = ("pretrain.device=cuda:1", "pretrain.engine=ray")
    assert "pretrain.device: device 'cuda:1'" in problems(tmp_path, *cluster), "on which pooled data are trained, too"
    assert not problems(tmp_path, *cluster, "pretrain.centralised=false"), "a cluster may have others"
    clients = ("pretrain.device=cuda:1", "pretrain.engine=deployment")
    assert "'cuda:1'" in problems(tmp_path, *clients)
    assert "'cuda:1'" not in problems(tmp_path, *clients, "pretrain.centralised=false"), "nodes choose theirs"
    assert not problems(tmp_path, "evaluate.device=cuda:0", "kmeans.device=cuda")


def test_packages_that_are_not_installed_are_named_with_the_line_that_works(tmp_path, monkeypatch):
    find = preflight.importlib.util.find_spec
    absent = {"ray", "espeakng_loader"}
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    told = problems(tmp_path, "kmeans.engine=ray")
    assert "kmeans.engine: ray given, but it is not installed; run: make ray" in told
    assert "corpus.root: the speech synthesiser espeakng-loader is not installed; run: make install" in told


def test_the_cohort_is_compared_with_the_clients_that_there_are(tmp_path):
    (tmp_path / "01_partition").mkdir()
    pd.DataFrame({"client": ["a", "b"]}).to_parquet(tmp_path / "01_partition" / "clients.parquet")
    told = problems(tmp_path, first="kmeans")
    assert "pretrain.cohort: 3 given, but 01_partition made 2 clients; give that or fewer" in told
    assert not problems(tmp_path, "pretrain.cohort=2", first="kmeans")


def test_the_disk_holds_what_clients_keep_between_rounds(tmp_path, monkeypatch):
    (tmp_path / "01_partition").mkdir()
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**9))
    large = ("pretrain.model=base", "pretrain.hidden_size=768", "pretrain.layers=12", "pretrain.rounds=1000")
    assert not problems(tmp_path, *large), "01_partition is to come"
    pd.DataFrame({"client": [*"abcdef"]}).to_parquet(tmp_path / "01_partition" / "clients.parquet")
    told = problems(tmp_path, *large, first="kmeans")
    assert told.startswith("pretrain.local_state: clients keep 8.6 GB between rounds, and 1.0 GB are free; give local")
    told = problems(tmp_path, *large, "pretrain.cohort=6", "partition.clients=6", "corpus.speakers=7", first="kmeans")
    assert "clients keep 12.9 GB" in told, "of a client in every round those that a resumed run may need, too"
    for less in ("pretrain.local_state=cohort", "pretrain.engine=deployment"):
        assert not problems(tmp_path, *large, less, "distill.local_state=keep", first="kmeans")
    told = problems(tmp_path, *large, "pretrain.local_state=reset", "pretrain.server=scaffold", first="kmeans")
    assert told == "pretrain.local_state: clients keep 4.3 GB between rounds, and 1.0 GB are free; make room"
    told = problems(tmp_path, *large, "pretrain.local_state=reset", "pretrain.compression=int8", first="kmeans")
    assert told == "pretrain.local_state: clients keep 4.3 GB between rounds, and 1.0 GB are free; make room", "lost"
    kept = tmp_path / "03_pretrain/clients/a/session-0/moments-000001.safetensors"
    kept.parent.mkdir(parents=True)
    with kept.open("wb") as stream:
        stream.truncate(8 * 10**9)  # what is there already needs no more room
    assert not problems(tmp_path, *large, first="kmeans")


def test_clients_of_whole_speakers_are_no_more_than_the_synthetic_ones_left(tmp_path):
    told = problems(tmp_path, "partition.clients=6")
    assert told == "partition.clients: 6, but corpus.speakers less heldout_speakers are 5; give that or fewer"
    assert not problems(tmp_path, "partition.clients=5")
    assert not problems(tmp_path, "partition.clients=12", "partition.scheme=iid")
    assert not problems(tmp_path, "partition.clients=12", first="kmeans"), "a partition from another site"


def test_clusters_are_compared_with_the_frames_that_there_are(tmp_path):
    for stage in ("00_corpus", "01_partition"):
        (tmp_path / stage).mkdir()
    row = {"utterance": "a", "path": "a.flac", "speaker": "s", "samples": 4_000, "split": "test"}
    pd.DataFrame([row]).to_parquet(tmp_path / "00_corpus" / "manifest.parquet")
    pd.DataFrame([row])[:0].to_parquet(tmp_path / "01_partition" / "heldout.parquet")
    assert not problems(tmp_path, "evaluate.clusters=13", first="evaluate"), "no phones, no units"
    segment = {"utterance": "a", "start_sample": 0, "end_sample": 4_000, "phone": "AH"}
    pd.DataFrame([segment]).to_parquet(tmp_path / "00_corpus" / "phones.parquet")
    told = problems(tmp_path, "evaluate.clusters=13", first="evaluate")
    assert told.startswith("evaluate.clusters: 13 given, ") and "12 frames" in told
    assert not problems(tmp_path, "evaluate.clusters=12", first="evaluate")


def test_phones_that_cover_no_unheard_speech_are_told_of_before_the_training(tmp_path, capsys):
    for stage in ("00_corpus", "01_partition"):
        (tmp_path / stage).mkdir()
    speech = pd.DataFrame(
        {"utterance": ["a", "b"], "speaker": ["s", "t"], "samples": 4_000, "split": ["test", "train"]}
    )
    speech.to_parquet(tmp_path / "00_corpus" / "manifest.parquet")
    speech[:0].to_parquet(tmp_path / "01_partition" / "heldout.parquet")
    for name in speech.utterance[::-1]:
        phones = {"utterance": name, "start_sample": [0, 2_000], "end_sample": [2_000, 4_000], "phone": ["AH", "S"]}
        pd.DataFrame(phones).to_parquet(tmp_path / "00_corpus" / "phones.parquet")
        assert not problems(tmp_path, "evaluate.clusters=12", first="kmeans"), "words can be measured all the same"
        told = capsys.readouterr().out
        assert ("05_evaluate measures neither PNMI" in told and told.count("\n") == 1) if name == "b" else not told


def test_what_an_earlier_start_left_is_no_reason_where_its_stage_comes_again(words, tmp_path):
    """More clients, or words that were missing: the same command must make what it would otherwise be refused for."""
    settings = "corpus.keywords=speech-commands", f"corpus.keywords_root={words}", "evaluate.task=superb"
    for stage in ("00_corpus", "01_partition", "02_kmeans/codebooks/federated"):
        (tmp_path / stage).mkdir(parents=True)
    for name in ("00_corpus/keywords", "00_corpus/manifest", "01_partition/heldout"):
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    pd.DataFrame({"client": ["a", "b"]}).to_parquet(tmp_path / "01_partition" / "clients.parquet")
    (tmp_path / "02_kmeans" / "codebooks" / "federated" / "codebook.json").write_text('{"labelled": ["a"]}')
    assert not problems(tmp_path, *settings)
    told = problems(tmp_path, *settings, first="partition")
    assert told.startswith("evaluate.task: ") and "keywords.parquet" in told and "cohort" not in told
    assert "01_partition made 2 clients" in problems(tmp_path, *settings, first="kmeans")
    assert "01_partition made 1 clients" in problems(tmp_path, *settings, first="pretrain")


def test_what_superb_needs_is_looked_at_once_the_words_are_there(tmp_path):
    rows = [{"clip": f"{word}/a", "path": f"{word}/a", "word": word} for word in ("yes", "no")]
    clips = pd.DataFrame(rows).assign(speaker="a", split="validation")
    (tmp_path / "00_corpus").mkdir()
    clips.to_parquet(tmp_path / "00_corpus" / "keywords.parquet")
    settings = "corpus.keywords=speech-commands", f"corpus.keywords_root={tmp_path}", "evaluate.task=superb"
    told = problems(tmp_path, *settings, first="partition")
    assert told.startswith("evaluate.task: no clip of down, go, ") and "other words" in told
    assert not problems(tmp_path, *settings[:2], first="partition")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Speech Commands with two words."""
    root = tmp_path / "words"
    for word in ("yes", "no"):
        (root / word).mkdir(parents=True)
        for voice in ("0a", "0b", "0c"):
            soundfile.write(root / word / f"{voice}_nohash_0.wav", np.zeros(8_000), 16_000)
    for name, voice in (("validation_list.txt", "0b"), ("testing_list.txt", "0c")):
        (root / name).write_text("".join(f"./{word}/{voice}_nohash_0.wav\r\n" for word in ("yes", "no")))
    return root


def test_lists_and_folders_of_words_that_do_not_fit_are_refused_at_once(words, tmp_path):
    (words / "testing_list.txt").write_text("yes/9z_nohash_0.wav\n")
    told = problems(tmp_path, "corpus.keywords=speech-commands", f"corpus.keywords_root={words}")
    assert told.startswith("corpus.keywords_root: ") and "a training and a test clip of 0 words" in told
    (words / "testing_list.txt").unlink()
    told = problems(tmp_path, "corpus.keywords=speech-commands", f"corpus.keywords_root={words}")
    assert "holds no Speech Commands folder" in told


def test_a_corpus_without_a_subset_is_refused_unless_its_archive_or_a_download_will_bring_it(tmp_path):
    (tmp_path / "train-clean-100" / "1").mkdir(parents=True)
    settings = ["corpus.kind=librispeech", f"corpus.root={tmp_path}"]
    assert "has no subset test-clean; it has train-clean-100" in problems(tmp_path, *settings)
    assert not problems(tmp_path, *settings, "corpus.download=true")
    (tmp_path / "test-clean.tar.gz").write_bytes(b"")
    assert not problems(tmp_path, *settings)


def test_a_missing_place_and_one_that_the_run_will_make_are_refused(checkpoint, tmp_path):
    run = tmp_path / "outputs" / "toy"
    (run / "03_pretrain" / "checkpoint").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    places = [("initial", run / "03_pretrain/checkpoint"), ("initial", tmp_path / "link/03_pretrain/checkpoint")]
    for name, place in [*places, ("initial", tmp_path / "nowhere")]:
        p = params.Pretrain(**{name: str(place)})
        with pytest.raises(
            runs.RunError, match=f"pretrain.{name}: {place}: (lies in what this run makes|no such file)"
        ):
            preflight.check("pretrain", p, run)
    told = problems(run, f"kmeans.features={run / '03_pretrain/checkpoint'}")
    assert told.startswith("kmeans.features: ") and "lies in what this run makes" in told
    preflight.check("kmeans", params.Kmeans(features=str(checkpoint)), run)


def test_a_teacher_that_has_changed_since_is_not_measured_as_the_students(checkpoint, tmp_path):
    run = tmp_path / "run"
    (run / "04_distill").mkdir(parents=True)
    (run / "04_distill/params.yaml").write_text(f"teacher: {checkpoint}\n")
    then = identity.listings(params.Distill(teacher=str(checkpoint)))["teacher"]
    files.write_json(run / "04_distill/done.json", {"identity": {"inputs": {"teacher": then}}})
    preflight.check("evaluate", params.Evaluate(), run)
    change(checkpoint, hidden_dropout=0.5)
    with pytest.raises(runs.RunError, match="has changed since it taught the student"):
        preflight.check("evaluate", params.Evaluate(), run)
    files.write_json(run / "03_pretrain/done.json", {"identity": {"inputs": {}}, "outputs": "now"})
    older = {"identity": {"inputs": {"teacher": then, "03_pretrain": "then"}}}
    files.write_json(run / "04_distill/done.json", older)
    preflight.check("evaluate", params.Evaluate(), run)  # a stale student is left out of the table


def test_a_notebook_checks_its_stage_alone(checkpoint, tmp_path):
    p = params.Distill(teacher=str(checkpoint), soft_weight=0.5)
    with pytest.raises(runs.RunError, match=r"distill\.teacher: .* has no head\.safetensors"):
        preflight.check("distill", p, tmp_path)
    preflight.check("distill", params.Distill(teacher=str(checkpoint), objectives=["hubert"]), tmp_path)


def test_fedhubert_run_starts_nothing_that_could_not_end(checkpoint, outputs, capsys):
    change(checkpoint, model_type="wavlm")
    study = ROOT / "params" / "toy.yaml"
    assert cli.main(["run", str(study), "--set", f"distill.teacher={checkpoint}"]) == runner.USAGE
    assert "distill.teacher: " in (told := capsys.readouterr().err) and "model_type is 'wavlm'" in told
    assert not any(outputs.iterdir())


@pytest.mark.parametrize("stage", params.SECTIONS)
def test_each_notebook_checks_its_stage_before_it_works(stage):
    source = (ROOT / "notebooks" / f"{params.FOLDERS[stage]}.ipynb").read_text(encoding="utf-8")
    start, check, work = (source.find(text) for text in ("runs.start(", "preflight.check(stage.name", "working()"))
    assert 0 < start < check < work
