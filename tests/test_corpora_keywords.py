"""Speech Commands as found in the field: lists of other systems, parts of the corpus, lists that do not fit."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from fedhubert_lib.corpora import CorpusError, scan, speech_commands
from fedhubert_lib.evaluation import keywords

VOICES = {"train": ["0a", "0b", "0c"], "validation": ["1a"], "test": ["2a"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three words by five voices, with the lists as published."""
    rng = np.random.default_rng(0)
    lines: dict[str, list[str]] = {split: [] for split in VOICES}
    for word in ("yes", "no", "bed"):
        (tmp_path / word).mkdir()
        for split, voices in VOICES.items():
            for voice in voices:
                clip = f"{word}/{voice}_nohash_0.wav"
                soundfile.write(tmp_path / clip, rng.normal(0, 0.1, 8_000), 16_000)
                lines[split].append(clip)
    for split, name in speech_commands.LISTS.items():
        (tmp_path / name).write_text("\n".join(lines[split]) + "\n")
    return tmp_path


def read(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return speech_commands.clips(root, scan.scan(speech_commands.words(root)))


def splits(clips: pd.DataFrame) -> dict[str, list[str]]:
    return clips.groupby("split").speaker.unique().map(sorted).to_dict()


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda lines: "\n".join(f"./{line}" for line in lines),
        lambda lines: "\r\n".join(lines) + "\r\n",
        lambda lines: "\n".join(line.replace("/", "\\") for line in lines),
        lambda lines: "\ufeff" + "\n".join(lines),
        lambda lines: "\n\n".join(f"/data/speech_commands_v0.02/{line}  " for line in lines),
    ],
    ids=["dot-slash", "crlf", "backslash", "byte-order-mark", "absolute"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_clips_from_lists_of_other_systems(rewrite, encoding, root):
    for name in speech_commands.LISTS.values():
        lines = (root / name).read_text().split()
        (root / name).write_text(rewrite(lines), encoding=encoding, newline="")
    clips, excluded = read(root)
    assert splits(clips) == VOICES and excluded.empty


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("yes\n", r"testing_list\.txt, line 1: 'yes' is not WORD/FILE\.wav"),
        ("yes/1a_nohash_0.wav\n", "is in the other list, too"),
        ("yes/0a_nohash_0.wav\nno/2a_nohash_0.wav\nbed/2a_nohash_0.wav\n", "voice 0a is in .*train.*, as are 1 others"),
    ],
)
def test_clips_refuse_lists_that_do_not_fit(content, words, root):
    (root / "testing_list.txt").write_text(content)
    with pytest.raises(CorpusError, match=words):
        read(root)


def test_clips_refuse_lists_that_are_not_text(root):
    (root / "testing_list.txt").write_bytes(b"yes/\xff\x00.wav")
    with pytest.raises(CorpusError, match=r"testing_list\.txt is not text"):
        read(root)


def test_files_that_are_not_named_as_clips_make_no_word(root):
    for path in root.glob("*/*.wav"):
        path.rename(path.with_suffix(".flac"))
    with pytest.raises(CorpusError, match=r"of 0 words \(WORD/SPEAKER_nohash_TAKE\.wav\)"):
        speech_commands.usable(root)


def test_clips_that_are_cut_to_a_second_are_counted(root):
    for clip, samples in ("yes/0a", 16_000), ("yes/0b", 16_001), ("no/2a", 48_000):
        soundfile.write(root / f"{clip}_nohash_0.wav", np.linspace(0, 0.1, samples), 16_000)
    clips, excluded = read(root)
    assert len(clips) == 15 and clips.samples.max() == 48_000
    assert excluded.reason.tolist() == ["2 of 15 clips are longer than 1 s: their middle second is used"]


def test_clips_of_a_part_of_the_corpus(root):
    (root / "bed" / "2a_nohash_0.wav").unlink()
    (root / "no" / "1a_nohash_0.wav").unlink()
    clips, excluded = read(root)
    assert sorted(set(clips.word)) == ["no", "yes"] and splits(clips) == VOICES
    reasons = dict(zip(excluded.path.str.removeprefix(f"{root}/"), excluded.reason, strict=True))
    assert reasons.pop("testing_list.txt") == "1 of its 3 clips are missing, such as bed/2a_nohash_0.wav"
    assert reasons.pop("validation_list.txt") == "1 of its 3 clips are missing, such as no/1a_nohash_0.wav"
    assert set(reasons.values()) == {"word bed has no test clip here"} and len(reasons) == 4
    clips.to_parquet(root / "keywords.parquet")
    assert len(keywords.read_clips(root / "keywords.parquet")) == len(clips), "05 takes what 00 found"
    (root / "yes" / "1a_nohash_0.wav").unlink()  # which leaves those of a word that is left out
    clips, excluded = read(root)
    assert len(splits(clips)["validation"]) == 1 and set(clips.word) == {"no", "yes"}
    assert any("1 of the 3 training voices are kept" in reason for reason in excluded.reason)
    clips[clips.split != "validation"].to_parquet(root / "keywords.parquet")  # of an earlier version
    with pytest.raises(keywords.KeywordError, match="no clip of the validation split"):
        keywords.read_clips(root / "keywords.parquet")


def test_a_clip_recorded_anew_in_its_place_is_another(root):
    """Tables of clips stand for the audio: what 05 measured of other audio is not taken for this one's."""
    before, _ = read(root)
    soundfile.write(root / "yes" / "2a_nohash_0.wav", 0.001 * np.arange(8_000) % 1, 16_000)
    after, _ = read(root)
    assert before["clip"][before.fingerprint != after.fingerprint].tolist() == ["yes/2a_nohash_0.wav"]


def test_clips_without_validation_take_some_training_voices(root):
    for word in ("yes", "no", "bed"):
        (root / word / "1a_nohash_0.wav").unlink()
    clips, excluded = read(root)
    voices = splits(clips)
    assert len(voices["validation"]) == 1 and len(voices["train"]) == 2 and voices["test"] == ["2a"]
    assert excluded.reason.tolist() == [
        "3 of its 3 clips are missing, such as bed/1a_nohash_0.wav",
        "none of its clips can be used: 1 of the 3 training voices are kept for validation",
    ]
    pd.testing.assert_frame_equal(read(root)[0], clips)
