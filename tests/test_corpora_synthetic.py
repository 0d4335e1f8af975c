"""The built-in corpus: the same bytes for the same seed, voices kept apart, and phone times that fit the sound."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedhubert_lib import audio, corpora, features, params
from fedhubert_lib.corpora import sentences, synthetic

pytest.importorskip("espeakng_loader", reason="needs the extra fedhubert[synthetic]")

P = params.Corpus(speakers=4, minutes=0.8, test_speakers=2, test_minutes=0.2, keyword_voices=4, keyword_takes=1, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    corpora.prepare(run, P)
    return run / "00_corpus"


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / f"{name}.parquet")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_prepare_makes_the_same_bytes_again(folder, tmp_path):
    first = contents(folder / "synthetic")
    corpora.prepare(tmp_path / "a longer name for the folder that holds the run", P)
    again = contents(tmp_path / "a longer name for the folder that holds the run" / "00_corpus" / "synthetic")
    assert first.keys() == again.keys() and len(first) > 150
    assert [name for name in first if first[name] != again[name]] == []


def test_speech_of_another_seed_has_other_voices(folder, tmp_path):
    synthetic.speech(tmp_path / "speech", P.model_copy(update={"seed": 4, "minutes": 0.2}))
    other = {p.read_bytes() for p in (tmp_path / "speech" / "_voices").glob("*.txt")}
    mine = {p.read_bytes() for p in (folder / "synthetic").rglob("_voices/*.txt")}
    assert len(mine) == 4 + 2 + 4 and not mine & other


def test_prepare_keeps_an_existing_corpus(folder):
    before = {p: p.stat().st_mtime_ns for p in (folder / "synthetic").rglob("*")}
    corpora.prepare(folder.parent, P)
    assert {p: p.stat().st_mtime_ns for p in (folder / "synthetic").rglob("*")} == before


def test_prepare_makes_the_requested_amounts_and_lists(folder):
    manifest, keywords = table(folder, "manifest"), table(folder, "keywords")
    assert table(folder, "excluded").empty
    assert manifest.groupby("split").speaker.nunique().to_dict() == {"test": 2, "train": 4}
    minutes = manifest.groupby("split").samples.sum() / audio.SAMPLE_RATE / 60
    assert minutes["train"] == pytest.approx(0.8, rel=0.7) and minutes["train"] >= 0.8 and minutes["test"] >= 0.2
    assert set(manifest.sex) == {"F", "M"}
    assert sorted(keywords.word.unique()) == sorted(synthetic.KEYWORDS) and len(synthetic.KEYWORDS) == 35
    assert (keywords.samples == audio.SAMPLE_RATE).all() and len(keywords) == 4 * 35
    voices = keywords.groupby("split").speaker.unique()
    assert {split: len(speakers) for split, speakers in voices.items()} == {"test": 1, "train": 2, "validation": 1}
    assert keywords.groupby("speaker").split.nunique().eq(1).all(), "each voice is in one list"
    assert not set(keywords.speaker) & set(manifest.speaker)


def test_clips_and_utterances_are_speech(folder):
    for row in table(folder, "keywords").itertuples():
        samples = audio.read(row.path)
        assert 0.2 < samples.abs().max() < 0.85, row.path
        assert samples[:200].abs().max() < 0.1
    for row in table(folder, "manifest").itertuples():
        assert 0.2 < audio.read(row.path).abs().max() < 0.85, row.path


def test_phones_cover_their_utterances(folder):
    phones, manifest = table(folder, "phones"), table(folder, "manifest").set_index("utterance")
    assert set(phones.utterance) == set(manifest.index)
    for utterance, spans in phones.groupby("utterance"):
        assert spans.start_sample.iloc[0] == 0 and spans.end_sample.iloc[-1] == manifest.samples[utterance]
        assert (spans.start_sample.to_numpy()[1:] == spans.end_sample.to_numpy()[:-1]).all()
        assert (spans.end_sample > spans.start_sample).all()
    assert 35 <= phones.phone.nunique() <= 40 and not phones.phone.isin(["", "_"]).any()


def test_phone_times_fit_the_sound(folder):
    """Sibilants are brighter than vowels; the contrast must be largest where the phones are said to be."""
    phones, manifest = table(folder, "phones"), table(folder, "manifest")
    contrast = {}
    by_utterance = dict(list(phones.groupby("utterance")))
    for shift in (-4_800, 0, 4_800):
        bright: dict[str, list[float]] = {"S": [], "V": []}
        for row in manifest.itertuples():
            wave = audio.read(row.path).numpy()
            for span in by_utterance[row.utterance].itertuples():
                kind = (
                    "S"
                    if span.phone in ("S", "Z", "SH")
                    else "V"
                    if span.phone in ("AA", "AO", "OW", "IY", "ER")
                    else ""
                )
                piece = wave[max(0, span.start_sample + shift) : span.end_sample + shift]
                if kind and len(piece) > 400:
                    crossings = np.mean(np.diff(np.sign(piece)) != 0)
                    bright[kind].append(float(crossings))
        contrast[shift] = np.median(bright["S"]) - np.median(bright["V"])
    assert contrast[0] > 0.15
    assert contrast[0] > 2 * max(contrast[-4_800], contrast[4_800])


def test_voices_of_speakers_differ(folder):
    """Two halves of one speaker sound more alike than two speakers, for nearly all of them."""
    manifest = table(folder, "manifest")
    means = {}
    for speaker, rows in manifest.groupby("speaker"):
        frames = [features.mfcc([audio.read(path)])[0][:, :13].numpy() for path in rows.path]
        frames = np.concatenate(frames)
        means[speaker] = frames[: len(frames) // 2].mean(0), frames[len(frames) // 2 :].mean(0)
    closest = [min(means, key=lambda other: np.linalg.norm(means[speaker][0] - means[other][1])) for speaker in means]
    assert np.mean([a == b for a, b in zip(means, closest, strict=True)]) >= 0.8


def test_utterance_is_not_predictable_from_context():
    assert len(sentences.VOCABULARY) > 1_000
    rng = np.random.default_rng(0)
    texts = [sentences.utterance(rng) for _ in range(600)]
    assert len(set(texts)) > 590
    known = [sum(word in sentences.VOCABULARY for word in text.split()) / len(text.split()) for text in texts]
    assert np.mean(np.array(known) < 0.5) == pytest.approx(1 / 3, abs=0.1), "a third are pseudo-words"
    pairs = {pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)}
    assert len(pairs) > 0.85 * sum(len(text.split()) - 1 for text in texts), "hardly any pair of words comes twice"


def test_speech_names_why_the_synthesiser_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "ACCENTS", {"none": "language xx\nphonemes nonsense"})
    with pytest.raises(RuntimeError, match=r"(?s)synthesiser failed \(exit status .*nonsense"):
        synthetic.speech(tmp_path / "speech", P)
    assert not list(tmp_path.iterdir())


def test_the_library_does_not_load_the_synthesiser(folder):
    assert not any("espeak" in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert json.loads((folder / "synthetic" / "LibriSpeech" / "plan.json").read_text())[0]["seconds"] > 0
