"""A plain folder of speakers as the corpus: nothing lost, nothing doubled; and recordings of any length."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from test_corpora import BROKEN, keyword_tree, write

from fedhubert_lib import audio, batching, corpora, params, partition, preflight, runs, studies
from fedhubert_lib.corpora import alignments, folder, scan
from fedhubert_lib.federated import handlers
from fedhubert_lib.kmeans import reading

MFCC = {"features": "mfcc", "layer": 0, "checkpoint": "", "width": 39, "seed": 0, "sample_fraction": 1.0}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three speakers: files side by side, in folders of sessions, and with a space in their names."""
    root = tmp_path / "recordings"
    for name in ("ana/1.wav", "ana/2.FLAC", "ben/monday/a/1.wav", "ben/tuesday/1.wav", "ben/x y.flac", "Zoë/1.flac"):
        write(root / name, 17_000)
    return root


def study(root: Path, *more: str):
    words = str(keyword_tree(root.parent / "words"))
    given = [f"corpus.root={root}", "corpus.keywords=speech-commands", f"corpus.keywords_root={words}", *more]
    return studies.load("params/toy.yaml", ["corpus.kind=folder", *given], "mine")


def prepare(run: Path, root: Path, *more: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    corpora.prepare(run, study(root, *more).corpus)
    return tuple(pd.read_parquet(run / "00_corpus" / f"{name}.parquet") for name in ("manifest", "excluded"))


def test_every_file_of_a_speaker_is_an_utterance(tree, tmp_path):
    manifest, excluded = prepare(tmp_path / "run", tree)
    assert manifest.utterance.tolist() == [
        "Zoë/1", "ana/1", "ana/2", "ben/monday/a/1", "ben/tuesday/1", "ben/x y",
    ]  # fmt: skip
    assert manifest.speaker.tolist() == ["Zoë", "ana", "ana", "ben", "ben", "ben"]
    assert manifest.chapter.tolist() == ["", "", "", "monday/a", "tuesday", ""]
    assert (manifest.split == "train").all() and (manifest.sex == "").all() and manifest.text.isna().all()
    assert excluded.empty
    assert not len(pd.read_parquet(tmp_path / "run" / "00_corpus" / "phones.parquet"))


def test_every_other_file_is_left_out_with_its_reason(tree, tmp_path):
    for i, (name, (make, _)) in enumerate(BROKEN.items()):
        make(tree / "ana" / f"broken{i}{Path(name).suffix}")
    copy, twin = tree / "ben" / "copy.wav", tree / "ana" / "1.flac"
    copy.write_bytes((tree / "ben" / "monday" / "a" / "1.wav").read_bytes())
    write(twin, 8_000)
    write(tree / "alone.wav")
    samples, rate = soundfile.read(tree / "ben" / "tuesday" / "1.wav", dtype="int16")
    soundfile.write(tree / "ben" / "z.flac", samples, rate)
    values = soundfile.read(write(tree / "ben" / "sixteen.wav", 9_001), dtype="int16")[0] / 2**15
    for subtype in ("PCM_24", "FLOAT"):
        soundfile.write(tree / "ben" / f"{subtype}.wav", values, rate, subtype=subtype)
    for hidden in (".trash/1.wav", "ana/.2.wav", "ana/.trash/1.wav"):
        write(tree / hidden)
    manifest, excluded = prepare(tmp_path / "run", tree)
    reasons = excluded.set_index("path").reason
    assert all(reasons.str.contains(reason, regex=False).any() for _, reason in BROKEN.values())
    assert reasons[str(tree / "alone.wav")].startswith("lies in no speaker's folder")
    assert reasons.str.startswith("hidden").sum() == 3
    assert reasons[str(tree / "ben" / "monday" / "a" / "1.wav")] == f"same audio as {copy}"
    assert reasons[str(tree / "ben" / "z.flac")] == f"same audio as {tree / 'ben' / 'tuesday' / '1.wav'}"
    same = [str(tree / "ben" / name) for name in ("FLOAT.wav", "PCM_24.wav", "sixteen.wav")]
    assert [reasons.get(path) for path in same] == [None, *[f"same audio as {same[0]}"] * 2]
    assert reasons[str(tree / "ana" / "1.wav")] == f"its utterance is already there: {twin}"
    everything = {str(path) for path in tree.rglob("*") if not path.is_dir()}
    assert set(manifest.path) | set(excluded.path) == everything
    assert len(manifest) + len(excluded) == len(everything) and manifest.utterance.is_unique


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_files_of_one_format_are_not_read_a_second_time(tmp_path, monkeypatch, subtype):
    """Only of two formats can one recording have two fingerprints."""
    monkeypatch.setattr(folder, "flac_md5", lambda path: pytest.fail(f"read again: {path}"))
    for speaker in ("ana", "ben", "cleo", "dan"):
        write(tmp_path / "one" / speaker / "1.wav", 17_000, subtype=subtype)
    manifest, _ = prepare(tmp_path / "run", tmp_path / "one")
    assert len(manifest) == 4


def test_a_folder_of_which_nothing_can_be_used_is_refused(tmp_path):
    write(tmp_path / "wide" / "ana" / "1.wav", rate=44_100)
    write(tmp_path / "wide" / "ana" / "2.wav", rate=44_100, samples=20_000)
    with pytest.raises(corpora.CorpusError, match=r"no usable utterance to train on; 2 x 44100 Hz, not 16000 Hz"):
        prepare(tmp_path / "run", tmp_path / "wide")
    write(tmp_path / "flat" / "1.wav")
    (tmp_path / "flat" / "ana").mkdir()
    with pytest.raises(corpora.CorpusError, match="no folder of a speaker"):
        prepare(tmp_path / "run", tmp_path / "flat")
    write(tmp_path / "LibriSpeech" / "test-clean" / "1.wav")  # a library's folder, taken for a plain one
    with pytest.raises(corpora.CorpusError, match="a speaker to train on, test-clean too"):
        prepare(tmp_path / "run", tmp_path / "LibriSpeech", "corpus.test_subsets=[test-clean]")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["corpus.root=nowhere"], "corpus.root: .*nowhere: no such file or folder"),
        (["corpus.test_subsets=[ben]"], "corpus.root: of kind folder .* a speaker to train on, ben too, which"),
    ],
)
def test_what_a_folder_lacks_is_found_before_it_is_read(tree, tmp_path, more, problem):
    with pytest.raises(runs.RunError, match=problem):
        preflight.study(study(tree, *more), ["corpus", "partition"], tmp_path / "run")
    preflight.study(study(tree, "partition.clients=2", "pretrain.cohort=2"), ["corpus", "partition"], tmp_path / "run")


def test_phones_lie_where_the_montreal_aligner_puts_those_of_a_folder(tree, tmp_path):
    for name in ("ana/1.json", "ben/monday/a/1.json"):
        whole = {"end": 0.5, "tiers": {"phones": {"entries": [[0.0, 0.5, "AA1"]]}}}
        (tmp_path / "times" / name).parent.mkdir(parents=True)
        (tmp_path / "times" / name).write_text(json.dumps(whole))
    samples = dict.fromkeys(("ana/1", "ben/monday/a/1", "ben/2"), 8_000)
    manifest = pd.DataFrame({"utterance": list(samples), "samples": list(samples.values())})
    phones, refused = alignments.read(tmp_path / "times", manifest)
    assert phones["utterance"].to_pylist() == ["ana/1", "ben/monday/a/1"] and refused.empty


def test_folders_of_sessions_are_chapters_and_audio_goes_to_its_client(tree, tmp_path):
    run = tmp_path / "run"
    given = ["partition.scheme=chapter", "partition.clients=5", "partition.heldout_speakers=0"]
    whole = study(tree, *given, "partition.minimum_minutes=0")
    corpora.prepare(run, whole.corpus)
    partition.assign(run, whole.partition)
    clients = [pd.read_parquet(path) for path in sorted(run.glob("01_partition/clients/*/*.parquet"))]
    assert sum(map(len, clients)) == 6
    assert all(len(rows[["speaker", "chapter"]].drop_duplicates()) <= 1 for rows in clients)
    copy = partition.export_client(run, "client-000", tmp_path / "client")
    for path in copy.glob("01_partition/clients/client-000/*.parquet"):
        for row in pd.read_parquet(path).itertuples():
            assert Path(row.path).is_relative_to(copy) and scan.header(row.path).fingerprint == row.fingerprint


# ------------------------------------------------------------------------------------------------------ long recordings


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples of every piece of audio that is read."""
    lengths: list[int] = []
    read = audio.read

    def counting(*arguments: object, **options: object) -> torch.Tensor:
        waveform = read(*arguments, **options)
        lengths.append(len(waveform))
        return waveform

    monkeypatch.setattr(audio, "read", counting)
    return lengths


def recording(path: Path, seconds: int) -> pd.DataFrame:
    """A table with one long recording and one short one."""
    write(path / "long.flac", seconds * 16_000 + 77)
    write(path / "short.wav", 50_000)
    rows = [
        ("long", str(path / "long.flac"), "a", seconds * 16_000 + 77),
        ("short", str(path / "short.wav"), "a", 50_000),
    ]
    return pd.DataFrame(rows, columns=["utterance", "path", "speaker", "samples"])


@pytest.mark.parametrize("normalise", [False, True])
def test_batches_read_slices_of_a_long_recording(tmp_path, reads, normalise):
    table = recording(tmp_path, 200)
    labels = {row.utterance: np.arange(audio.frame_count(row.samples)) for row in table.itertuples()}
    p, keys = params.LocalTraining(batch_seconds=8.0, crop_seconds=2.0), (0, 1, "client-000")
    made = list(batching.batches(table, labels, p, keys, 4, normalise=normalise))
    assert max(reads) <= (batching.LONG if normalise else 50_000)
    names = [name for batch in made for name in batch.utterances]
    assert names.count("long") / max(1, names.count("short")) > 2, "a crop for each stretch of it"
    assert [len(batch.utterances) for batch in made].count(4) >= 2, "batches are full"
    whole = dict(zip(table.utterance, map(audio.read, table.path), strict=True))
    for batch in made:
        for name, waveform, targets in zip(batch.utterances, batch.waveforms, batch.labels, strict=True):
            start = int(targets[0]) * audio.HOP
            piece = whole[name][start : start + len(waveform)]
            assert torch.allclose(audio.normalise(waveform), audio.normalise(piece), atol=1e-4)
            assert torch.equal(waveform, piece) != normalise


def test_scan_holds_a_stretch_of_a_long_file(tmp_path, monkeypatch):
    table = recording(tmp_path, 20)
    whole = [scan.header(path, decode=True) for path in table.path]
    held = []
    blocks = soundfile.SoundFile.blocks

    def counting(self: soundfile.SoundFile, *arguments: object, **options: object):
        for block in blocks(self, *arguments, **options):
            held.append(len(block))
            yield block

    monkeypatch.setattr(soundfile.SoundFile, "blocks", counting)
    monkeypatch.setattr(scan, "BLOCK", 10_000)
    assert [scan.header(path, decode=True) for path in table.path] == whole
    assert max(held) == 10_000 and sum(held) == table.samples.sum()


def test_features_of_a_long_recording_are_read_in_pieces(tmp_path, reads, monkeypatch):
    table = recording(tmp_path, 30)
    ((_, whole),) = reading.extracted({}, MFCC, table, "cpu")
    monkeypatch.setattr(reading, "BATCH_SAMPLES", 200 * audio.HOP)
    reads.clear()
    parts = [part for _, batch in reading.extracted({}, MFCC, table, "cpu") for part in batch]
    assert max(reads) <= 205 * audio.HOP
    assert all(torch.equal(one, other) for one, other in zip(parts, whole, strict=True))


def test_the_beginning_of_a_long_recording_serves_to_fit(tmp_path, monkeypatch):
    """One that is longer than what may be held is not left out: two hours of one speaker are speech to fit on."""
    monkeypatch.setattr(reading, "LONG", 100 * audio.HOP)
    monkeypatch.setattr(reading, "FIT_FRAMES", 400)
    data = tmp_path / "run" / "01_partition" / "clients" / "client-000"
    data.mkdir(parents=True)
    table = recording(tmp_path, 30)
    table.to_parquet(data / "train.parquet")
    table[:0].to_parquet(data / "validation.parquet")
    home = handlers.home(tmp_path / "run", "client-000", "kmeans", "cpu", simulated=True)
    config = {**MFCC, "normalisation": "none"}
    reading.compute(home, {}, config)
    frames = reading.in_memory(home, config)
    ((_, (long, short)),) = reading.extracted({}, config, table, "cpu")
    assert torch.equal(frames, torch.cat([long[0, :199], short[0]]))
