"""Scanning, reading and preparing corpora: every file is used or excluded with its reason."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from fedhubert_lib import audio, corpora, files, identity, params, runs
from fedhubert_lib.corpora import alignments, librispeech, scan

RNG = np.random.default_rng(0)


def write(path: Path, samples: int = 16_000, rate: int = 16_000, channels: int = 1, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (samples, channels) if channels > 1 else samples
    soundfile.write(path, RNG.normal(0, 0.1, shape), rate, **options)
    return path


def test_header_equals_soundfile(tmp_path):
    for samples in (400, 4096, 4097, 33_000, 560_000):
        path = write(tmp_path / f"{samples}.flac", samples)
        header = scan.header(str(path))
        assert (header.samples, header.sample_rate, header.reason) == (samples, 16_000, "")
        decoded = soundfile.read(path, dtype="int16")[0]
        assert header.fingerprint == hashlib.md5(decoded.tobytes(), usedforsecurity=False).hexdigest()
    for subtype in ("PCM_16", "PCM_24", "FLOAT"):
        assert scan.header(str(write(tmp_path / "a.wav", 1_234, subtype=subtype)))[:2] == (1_234, 16_000)
        soundfile.write(tmp_path / "silence.wav", np.zeros(1_000), 16_000, subtype=subtype)
        assert scan.header(str(tmp_path / "silence.wav")).reason == ""


def test_header_fingerprints_the_audio_alone(tmp_path):
    samples = RNG.normal(0, 0.1, 9_000)
    for name, level in (("a.flac", 0.0), ("b.flac", 1.0)):
        soundfile.write(tmp_path / name, samples, 16_000, compression_level=level)
    first, second = (scan.header(str(tmp_path / name)) for name in ("a.flac", "b.flac"))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != scan.header(str(write(tmp_path / "c.flac", 9_000))).fingerprint


@pytest.mark.parametrize("cut", [1, 2, 3, 500, 5_000, 20_000])
def test_header_finds_a_truncated_flac(cut, tmp_path):
    content = write(tmp_path / "a.flac", 40_000).read_bytes()
    (tmp_path / "a.flac").write_bytes(content[:-cut])
    assert "truncated" in scan.header(str(tmp_path / "a.flac")).reason
    flipped = bytearray(content)
    flipped[-700] ^= 4
    (tmp_path / "a.flac").write_bytes(flipped)
    assert "damaged" in scan.header(str(tmp_path / "a.flac")).reason


def nan_wav(path: Path) -> None:
    samples = RNG.normal(0, 0.1, 8_000).astype("float32")
    samples[77] = np.nan
    soundfile.write(path, samples, 16_000, subtype="FLOAT")


def integers_wav(path: Path) -> None:
    soundfile.write(path, RNG.normal(0, 3_000, 8_000).astype("float32"), 16_000, subtype="FLOAT")


def unscaled_wav(path: Path) -> None:
    soundfile.write(path, RNG.integers(-3_000, 3_000, 8_000).astype("int32"), 16_000, subtype="PCM_32")


def sized(content: bytes, size: int, samples: bytes = b"") -> bytes:
    """A WAV file whose header gives ``size`` bytes, and ``samples`` as the length of its samples."""
    content = content[:4] + (size - 8).to_bytes(4, "little") + content[8:]
    return content[:40] + samples + content[40 + len(samples) :]


BROKEN = {
    "integers.wav": (integers_wav, "not scaled to"),
    "unscaled.wav": (unscaled_wav, "e-06: not scaled to"),
    "empty.flac": (lambda path: path.write_bytes(b""), "empty file"),
    "8k.wav": (lambda path: write(path, rate=8_000), "8000 Hz, not 16000 Hz"),
    "44k.flac": (lambda path: write(path, rate=44_100), "44100 Hz"),
    "stereo.wav": (lambda path: write(path, channels=2), "2 channels, not mono"),
    "stereo.flac": (lambda path: write(path, channels=2), "2 channels, not mono"),
    "20ms.wav": (lambda path: write(path, 320), "shorter than one frame"),
    "20ms.flac": (lambda path: write(path, 320), "shorter than one frame"),
    "gsm.wav": (lambda path: write(path, subtype="GSM610"), "GSM610 cannot be read from its middle; convert it to"),
    "nan.wav": (nan_wav, "NaN or infinite"),
    "text.flac": (lambda path: path.write_text("<html>404</html>"), "neither FLAC nor WAV"),
    "head.flac": (lambda path: path.write_bytes(write(path).read_bytes()[:30]), "no complete FLAC header"),
    "half.wav": (lambda path: path.write_bytes(write(path).read_bytes()[:9_000]), "truncated: 9000 of 32044 bytes"),
    "head.wav": (lambda path: path.write_bytes(write(path).read_bytes()[:20]), "truncated: 20 of 32044 bytes"),
    "stream.wav": (lambda path: path.write_bytes(b"RIFF\xff\xff\xff\xff" + write(path).read_bytes()[8:]), "no length"),
    "cut.wav": (
        lambda path: path.write_bytes(sized(write(path).read_bytes(), 20_000)[:20_000]),
        "19956 of 32000 bytes",
    ),
    "killed.wav": (lambda path: path.write_bytes(sized(write(path).read_bytes(), 44, b"\0\0\0\0")), "no length"),
    "dangling.flac": (lambda path: path.symlink_to("nowhere"), "cannot be read: No such file"),
    "loop.flac": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels"),
    "pipe.flac": (lambda path: os.mkfifo(path), "not a plain file"),
    "zeros.wav": (lambda path: path.symlink_to("/dev/zero"), "not a plain file"),
    "speech.mp3": (lambda path: path.write_bytes(b"ID3"), "neither .flac nor .wav"),
    ".DS_Store": (lambda path: path.write_bytes(b"Bud1"), "neither .flac nor .wav"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_header_names_why_a_file_is_unusable(name, tmp_path):
    make, reason = BROKEN[name]
    make(tmp_path / name)
    assert reason in scan.header(str(tmp_path / name)).reason


@pytest.mark.parametrize("name", sorted(set(BROKEN) - {"20ms.wav", "20ms.flac", "stream.wav"}))
def test_read_refuses_what_has_become_unusable_since_the_scan(name, tmp_path):
    """Another file in the place of one that was scanned: a pipe is not waited at, half a WAV file is no clip."""
    BROKEN[name][0](tmp_path / name)
    with pytest.raises(audio.AudioError, match=name):
        audio.read(tmp_path / name, samples=16_000)


def test_read_gives_the_systems_reason_and_closes_what_it_opens(tmp_path):
    with pytest.raises(audio.AudioError, match="No such file or directory"):
        audio.read(tmp_path / "a.flac")
    (tmp_path / "a.flac").write_bytes(write(tmp_path / "b.flac").read_bytes()[:9_000])
    with pytest.raises(audio.AudioError, match=r"test_corpora\.py: cannot be read \(Format not recognised"):
        audio.read(__file__)
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a.flac", "b.flac", "c.flac", ".") * 9:
        with contextlib.suppress(audio.AudioError):
            audio.read(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_header_of_random_bytes_never_raises(tmp_path):
    whole = {end: write(tmp_path / f"a{end}", 3_000).read_bytes() for end in (".flac", ".wav")}
    for end, content in whole.items():
        for _ in range(60):
            broken = bytearray(content[: RNG.integers(1, len(content))])
            for place in RNG.integers(0, min(60, len(broken)), 3):
                broken[place] = RNG.integers(256)
            (tmp_path / f"b{end}").write_bytes(broken)
            scan.header(str(tmp_path / f"b{end}"))
    riff = b"RIFF\0\0\0\0WAVEdata" + struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "c.wav").write_bytes(riff)
    assert scan.header(str(tmp_path / "c.wav")).reason


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_scan_with_decode_finds_damage_in_the_middle(subtype, tmp_path):
    path = write(tmp_path / "a.flac", 80_000, subtype=subtype)
    assert not scan.scan([tmp_path], decode=True).reason[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    assert not scan.scan([tmp_path]).reason[0]
    assert scan.scan([tmp_path], decode=True).reason[0]


def test_scan_opens_only_what_has_changed(tmp_path, monkeypatch):
    for i in range(6):
        write(tmp_path / "tree" / str(i % 2) / f"{i}.flac", 1_000 + i)
    cache = tmp_path / "scan.parquet"
    first = scan.scan([tmp_path / "tree"], cache)
    opened = []
    header = scan.header
    monkeypatch.setattr(scan, "header", lambda path, decode: opened.append(Path(path).name) or header(path, decode))
    pd.testing.assert_frame_equal(scan.scan([tmp_path / "tree"], cache), first)
    assert not opened
    write(tmp_path / "tree" / "0" / "2.flac", 2_000)
    write(tmp_path / "tree" / "1" / "7.flac", 1_007)
    (tmp_path / "tree" / "0" / "0.flac").unlink()
    changed = scan.scan([tmp_path / "tree"], cache)
    assert sorted(opened) == ["2.flac", "7.flac"]
    assert {Path(p).name: n for p, n in zip(changed.path, changed.samples, strict=True)} == {
        "1.flac": 1_001, "2.flac": 2_000, "3.flac": 1_003, "4.flac": 1_004, "5.flac": 1_005, "7.flac": 1_007,
    }  # fmt: skip
    opened.clear()
    scan.scan([tmp_path / "tree"], cache, decode=True)
    assert len(opened) == 6, "headers alone are no decode check"
    opened.clear()
    assert scan.scan([tmp_path / "tree"], cache, decode=True).decoded.all() and not opened


@pytest.mark.parametrize("decode", [False, True])
def test_scan_resumes_after_a_kill(decode, tmp_path, monkeypatch):
    for i in range(12):
        write(tmp_path / "tree" / f"{i:02d}.flac", 1_000 + i)
    cache = tmp_path / "scan.parquet"
    monkeypatch.setattr(scan, "CHUNK", 2)
    monkeypatch.setattr(scan, "SAVE_EVERY", -1.0)
    opened = []
    header = scan.header

    def kill(task: str, done: int, total: int) -> None:
        if done == 6:  # of which four are saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan.scan([tmp_path / "tree"], cache, kill, decode=decode)
    monkeypatch.setattr(scan, "header", lambda path, decode: opened.append(Path(path).name) or header(path, decode))
    again = scan.scan([tmp_path / "tree"], cache, decode=decode)
    assert sorted(opened) == [f"{i:02d}.flac" for i in range(4, 12)]
    pd.testing.assert_frame_equal(again, scan.scan([tmp_path / "tree"], decode=decode))


def test_scan_reads_an_unreadable_file_again(tmp_path, monkeypatch):
    """Its permissions may have changed, which its size and modification time do not show."""
    write(tmp_path / "tree" / "a.flac", 1_000)

    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(files, "at_once", refuse)
        reason = scan.scan([tmp_path / "tree"], tmp_path / "scan.parquet").reason[0]
        assert reason == "cannot be read: Permission denied"
    assert scan.scan([tmp_path / "tree"], tmp_path / "scan.parquet").reason[0] == ""


def test_scan_follows_links_and_no_loops(tmp_path):
    write(tmp_path / "elsewhere" / "a.flac", 1_000)
    for name in ("inner", "other"):
        (tmp_path / "tree" / name).mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "inner" / "loop").symlink_to(tmp_path / "tree")
    (tmp_path / "tree" / "inner" / "self").symlink_to("self")
    (tmp_path / "elsewhere" / "there").symlink_to(tmp_path / "tree" / "other")
    (tmp_path / "tree" / "other" / "back").symlink_to(tmp_path / "elsewhere")
    table = scan.scan([tmp_path / "tree"])
    places = ["inner/link/a.flac", "inner/self", "other/back/a.flac"]
    assert sorted(table.path) == [str(tmp_path / "tree" / place) for place in places]
    assert table.reason.tolist() == ["", "neither .flac nor .wav", ""]


def test_scan_refuses_a_name_that_is_not_text(tmp_path):
    write(tmp_path / "a.flac", 1_000).rename(os.fsdecode(os.fsencode(tmp_path) + b"/1-2-\xff.flac"))
    with pytest.raises(corpora.CorpusError, match=r"1-2-\\xff\.flac' is not UTF-8"):
        scan.scan([tmp_path], tmp_path / "scan.parquet")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A LibriSpeech folder of two subsets with one broken file of each kind among good ones."""
    root = tmp_path / "LibriSpeech"
    for subset, speaker in (("train-clean-5", "19"), ("train-clean-5", "26"), ("dev-clean-2", "84")):
        chapter = root / subset / speaker / "7"
        for i in range(3):
            write(chapter / f"{speaker}-7-{i:04d}.flac", 8_000)
        lines = [f"{speaker}-7-{i:04d} WORDS OF {i}\n" for i in range(3)]
        (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines[:2]))
    (root / "SPEAKERS.TXT").write_text(
        "; comment\n19 | F | train-clean-5 | 1 | A | B\n26 | M | train-clean-5 | 1 | C\n"
    )
    return root


def prepare(run: Path, root: Path, **changes: object) -> dict[str, pd.DataFrame]:
    p = params.Corpus(
        kind="librispeech", root=str(root), train_subsets=["train-clean-5"], test_subsets=["dev-clean-2"],
        keywords="speech-commands", keywords_root=str(keyword_tree(run.parent / "keywords")), **changes,
    )  # fmt: skip
    corpora.prepare(run, p)
    names = ("manifest", "excluded", "keywords", "phones")
    return {name: pd.read_parquet(run / "00_corpus" / f"{name}.parquet") for name in names}


def keyword_tree(root: Path) -> Path:
    for word in ("yes", "no"):
        for voice in ("0a", "0b", "0c"):
            write(root / word / f"{voice}_nohash_0.wav")
    write(root / "_background_noise_" / "noise.wav", 64_000)
    (root / "validation_list.txt").write_text("yes/0b_nohash_0.wav\nno/0b_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("yes/0c_nohash_0.wav\nno/0c_nohash_0.wav\n")
    return root


@pytest.mark.parametrize("name", ["root", "keywords_root", "alignments"])
def test_a_file_that_comes_while_the_corpus_is_read_is_another_input(name, tree, tmp_path, outputs, monkeypatch):
    places = {name: tmp_path / name for name in ("keywords_root", "alignments")} | {"root": tree}
    places["alignments"].mkdir()
    (places["alignments"] / "19-7-0000.json").write_text(
        json.dumps({"end": 0.5, "tiers": {"phones": {"entries": [[0.0, 0.5, "AH"]]}}})
    )
    keyword_tree(places["keywords_root"])
    given = {"kind": "librispeech", "train_subsets": ["train-clean-5"], "test_subsets": ["dev-clean-2"]}
    given |= {"keywords": "speech-commands"} | {name: str(place) for name, place in places.items()}
    stage = runs.start("corpus", params.Corpus(**given).model_dump())
    read = scan.scan

    def slow(*arguments: object, **options: object) -> pd.DataFrame:
        scanned = read(*arguments, **options)
        (places[name] / "late").touch()
        return scanned

    monkeypatch.setattr(scan, "scan", slow)
    with stage.working():
        corpora.prepare(stage.run, stage.p)
    runs.finish(stage, {})
    assert runs.outlook("corpus", stage.p, stage.run).changes.results == f"inputs changed: {name}"


def test_prepare_writes_a_manifest(tree, tmp_path):
    tables = prepare(tmp_path / "run", tree)
    manifest = tables["manifest"]
    assert manifest.utterance.tolist() == [f"{s}-7-{i:04d}" for s in (19, 26, 84) for i in range(3)]
    assert manifest.columns.tolist() == [*librispeech.COLUMNS, "split"]
    assert manifest.sex.tolist() == ["F"] * 3 + ["M"] * 3 + [""] * 3
    assert manifest.split.tolist() == ["train"] * 6 + ["test"] * 3
    assert manifest.text[0] == "WORDS OF 0" and pd.isna(manifest.text[2])
    assert all(Path(path).is_absolute() for path in manifest.path)
    assert tables["excluded"].empty and len(tables["keywords"]) == 6
    assert tables["keywords"].groupby("split").speaker.unique().str[0].to_dict() == {
        "test": "0c", "train": "0a", "validation": "0b",
    }  # fmt: skip
    again = prepare(tmp_path / "again", tree.parent)
    assert again["manifest"].equals(manifest), "the folder above LibriSpeech will do as well"


def test_prepare_excludes_broken_files_with_reasons(tree, tmp_path):
    chapter = tree / "train-clean-5" / "19" / "7"
    for i, (name, (make, _)) in enumerate(BROKEN.items()):
        make(chapter / f"19-7-1{i:03d}{Path(name).suffix}")
    write(chapter / "20-7-0000.flac")
    write(tree / "train-clean-5" / "19-7-9999.flac")
    copy = chapter / "19-7-0003.flac"
    copy.write_bytes((chapter / "19-7-0000.flac").read_bytes())
    tables = prepare(tmp_path / "run", tree)
    assert len(tables["manifest"]) == 9
    reasons = tables["excluded"].reason
    for _, reason in BROKEN.values():
        assert reasons.str.contains(reason, regex=False).any(), reason
    assert reasons.str.startswith("not SUBSET/SPEAKER/CHAPTER").sum() == 2
    assert tables["excluded"].set_index("path").reason[str(copy)] == f"same audio as {chapter / '19-7-0000.flac'}"
    assert len(reasons) == len(BROKEN) + 3


def test_utterances_in_two_subsets_count_once(tree, tmp_path):
    twin = tree / "train-clean-100" / "19" / "7" / "19-7-0000.flac"
    twin.parent.mkdir(parents=True)
    twin.write_bytes((tree / "train-clean-5" / "19" / "7" / "19-7-0000.flac").read_bytes())
    subsets = ["train-clean-5", "train-clean-100"]
    manifest, excluded = librispeech.utterances(tree, subsets, scan.scan([tree / subset for subset in subsets]))
    assert manifest.utterance.is_unique and (manifest.subset == "train-clean-5").all()
    first = tree / "train-clean-5" / "19" / "7" / "19-7-0000.flac"
    assert excluded[["path", "reason"]].values.tolist() == [[str(twin), f"its utterance is already there: {first}"]]


def test_recordings_without_a_fingerprint_are_no_copies_of_each_other():
    """An encoder that writes to a pipe leaves the MD5 of a FLAC file at zero."""
    table = pd.DataFrame({"path": list("abcd"), "utterance": list("abcd"), "reason": ""})
    found = librispeech.without_copies(table.assign(fingerprint=["0" * 32, "0" * 32, "f" * 32, "f" * 32]))
    assert found.reason.tolist() == ["", "", "", "same audio as c"]


def test_prepare_uses_or_excludes_every_file(tree, tmp_path):
    chapter = tree / "train-clean-5" / "19" / "7"
    (chapter / "19-7-0000.flac").rename(chapter / "19-7-0000.FLAC")
    for name in ("19-7.txt", "26-7.trans.txt", "19-7-0005.m4a", "19-7-0000.TextGrid", ".hidden/a.flac"):
        (chapter / name).parent.mkdir(exist_ok=True)
        (chapter / name).write_text("something")
    write(chapter / "19-7-0001.wav")
    (chapter / "gone").symlink_to(tmp_path / "nowhere")
    prepared = prepare(tmp_path / "run", tree)
    manifest, excluded = prepared["manifest"], prepared["excluded"].set_index("path").reason
    assert "19-7-0000" in set(manifest.utterance) and manifest.text[0] == "WORDS OF 0"
    assert excluded[str(chapter / "19-7-0001.wav")] == f"its utterance is already there: {chapter / '19-7-0001.flac'}"
    read = {str(path) for path in tree.rglob("*/7/*7.trans.txt")} - {str(chapter / "26-7.trans.txt")}
    files = {str(path) for subset in ("train-clean-5", "dev-clean-2") for path in (tree / subset).rglob("*")
             if not path.is_dir()}  # fmt: skip
    assert set(manifest.path) | set(excluded.index) == files - read and len(read) == 3
    assert (excluded != "").all() and excluded.index.is_unique


def test_transcripts_with_other_encodings_and_line_ends(tree, tmp_path):
    lines = "19-7-0000 WORDS OF 0\r\n19-7-0001\tWORDS  OF 1 \r\n19-7-0002\r\n"
    for encoding in ("utf-8-sig", "utf-16"):
        (tree / "train-clean-5" / "19" / "7" / "19-7.trans.txt").write_text(lines, encoding=encoding, newline="")
        texts = prepare(tmp_path / encoding, tree)["manifest"].set_index("utterance").text
        assert (
            texts["19-7-0000"] == "WORDS OF 0" and texts["19-7-0001"] == "WORDS  OF 1" and pd.isna(texts["19-7-0002"])
        )


def test_listings_see_a_change_below_a_link(tree, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for subset in ("train-clean-5", "dev-clean-2"):
        (linked / subset).symlink_to(tree / subset)
    (linked / "train-clean-5" / "19" / "up").symlink_to(linked)
    p = params.Corpus(kind="librispeech", root=str(linked))
    before = identity.listings(p)["root"]
    assert before == identity.listings(p)["root"]
    (tree / "train-clean-5" / "19" / "7" / "19-7-0001.flac").unlink()
    assert before != identity.listings(p)["root"]


def test_utterances_of_an_unreadable_transcript_stay(tree, tmp_path):
    bad = tree / "train-clean-5" / "19" / "7" / "19-7.trans.txt"
    bad.write_bytes(b"19-7-0000 CAF\xc9\n")
    tables = prepare(tmp_path / "run", tree)
    assert len(tables["manifest"]) == 9
    texts = tables["manifest"].set_index("utterance").text
    assert texts[["19-7-0000", "19-7-0001"]].isna().all() and texts["26-7-0000"] == "WORDS OF 0"
    assert tables["excluded"].path.tolist() == [str(bad)]
    assert "transcript cannot be read" in tables["excluded"].reason[0] and "0xc9" in tables["excluded"].reason[0]


@pytest.mark.parametrize("line", ["19 | X | train-clean-5", "19, F, train-clean-5", "<html>", "| F | a", "26 | F | a"])
def test_sexes_names_a_bad_line(line, tree):
    speakers = tree / "SPEAKERS.TXT"
    assert librispeech.sexes(speakers) == {"19": "F", "26": "M"}
    speakers.write_text(speakers.read_text() + "\n" + line + "\n")
    with pytest.raises(corpora.CorpusError, match=r"SPEAKERS\.TXT, line 5: .* remove the file"):
        librispeech.sexes(speakers)


def test_sexes_ignores_what_is_in_names(tree):
    speakers = tree / "SPEAKERS.TXT"
    speakers.write_bytes(b"\xef\xbb\xbf;ID |SEX\n60 | M | train-clean-100 | 20.18 | |CBW|Simon\n61|F|a|1|Ren\xe9\n")
    assert librispeech.sexes(speakers) == {"60": "M", "61": "F"}


def test_prepare_names_missing_and_empty_folders(tree, tmp_path):
    with pytest.raises(corpora.CorpusError, match="there is no folder .*nowhere"):
        prepare(tmp_path / "run", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(corpora.CorpusError, match="has no subset train-clean-5; it has no folder at all"):
        prepare(tmp_path / "run", tmp_path / "empty")
    with pytest.raises(corpora.CorpusError, match="has no subset .*; it has dev-clean-2, train-clean-5"):
        librispeech.home(tree, ["train-clean-100"])
    with pytest.raises(corpora.CorpusError, match=f"has no subset train-clean-5; give {re.escape(str(tree))}$"):
        librispeech.home(tree / "train-clean-5", ["train-clean-5"])
    for folder in (tree, tree / "LibriSpeech"):  # of which one has all
        (folder / "train-other-500").mkdir(parents=True, exist_ok=True)
        (folder / "train-other-500/a").touch()
    assert librispeech.home(tree, ["train-other-500"]) == tree / "LibriSpeech"
    assert librispeech.home(tree, ["train-clean-5"]) == tree
    shutil.rmtree(tree / "LibriSpeech")
    for path in (tree / "train-clean-5").rglob("*.flac"):
        path.write_bytes(b"")
    with pytest.raises(corpora.CorpusError, match="no usable utterance to train on; 6 x empty file"):
        prepare(tmp_path / "run", tree)
    assert not (tmp_path / "run" / "00_corpus" / "manifest.parquet").exists()
    with pytest.raises(corpora.CorpusError, match="holds no Speech Commands folder"):
        corpora.speech_commands.home(tmp_path / "empty")
    for path in [path for path in (tree / "train-clean-5").rglob("*") if path.is_file()]:
        path.unlink()
    shutil.rmtree(tree / "dev-clean-2")
    (tree / "dev-clean-2/1").mkdir(parents=True)
    with pytest.raises(corpora.CorpusError, match="no usable utterance to train on; there is no audio file"):
        prepare(tmp_path / "run", tree)


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        ("no/0c*.wav", "2 x word no has no test clip"),
        ("*/*.wav", "6 x empty file"),
        ("*", "1 x 2 of its 2 clips are missing"),
        ("*/0b*.wav", "1 x none of its clips can be used"),
    ],
)
def test_prepare_refuses_too_few_keywords(spoiled, reason, tmp_path):
    words = keyword_tree(tmp_path / "words")
    for place in list(words.glob(spoiled)):
        if place.is_dir():
            shutil.rmtree(place)
        elif place.suffix == ".wav":
            place.write_bytes(b"")
    p = params.Corpus(keywords="speech-commands", keywords_root=str(words))
    with pytest.raises(corpora.CorpusError, match=f"it takes two words .*; .*{reason}"):
        corpora._keywords(tmp_path, words, p, lambda *_: None)


def test_prepare_refuses_a_speaker_in_training_and_test(tree, tmp_path):
    write(tree / "dev-clean-2" / "26" / "8" / "26-8-0000.flac")
    with pytest.raises(corpora.CorpusError, match=r"\['26'\] are in a training and in a test subset"):
        prepare(tmp_path / "run", tree)


def test_prepare_keeps_the_old_manifest_on_a_full_disk(tree, tmp_path, monkeypatch):
    first = prepare(tmp_path / "run", tree)["manifest"]
    write(tree / "train-clean-5" / "19" / "7" / "19-7-0009.flac")

    def full(self: pd.DataFrame, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(tmp_path / "run", tree)
    assert pd.read_parquet(tmp_path / "run" / "00_corpus" / "manifest.parquet").equals(first)
    assert not [p for p in (tmp_path / "run" / "00_corpus").iterdir() if "partial" in p.name]


def textgrid(seconds: float, phones: list[tuple[float, float, str]]) -> str:
    def tier(name: str, spans: list[tuple[float, float, str]], number: int) -> str:
        rows = [
            f'intervals [{i}]:\n    xmin = {a} \n    xmax = {b} \n    text = "{t}" \n'
            for i, (a, b, t) in enumerate(spans)
        ]
        return (
            f'    item [{number}]:\n        class = "IntervalTier" \n        name = "{name}" \n        xmin = 0 \n'
            f"        xmax = {seconds} \n        intervals: size = {len(spans)} \n" + "".join(rows)
        )

    head = f'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0 \nxmax = {seconds} \ntiers? <exists> \n'
    return head + "size = 2 \nitem []: \n" + tier("words", [(0.0, seconds, "hi")], 1) + tier("phones", phones, 2)


def short(textgrid: str) -> str:
    """The same TextGrid in Praat's short text format: the values alone."""
    lines = textgrid.splitlines()[3:]
    values = [line.split("=")[-1].strip() for line in lines if "=" in line]
    return "\n".join([*textgrid.splitlines()[:3], *values[:2], "<exists>", *values[2:], ""])


MANIFEST = pd.DataFrame({"utterance": ["1-2-0000", "1-2-0001"], "samples": [16_000, 8_000]})


@pytest.mark.parametrize("form", [str, short], ids=["long", "short"])
def test_read_textgrids_and_fold_phones(form, tmp_path):
    folder = tmp_path / "train" / "1" / "2"
    folder.mkdir(parents=True)
    spans = [(0.0, 0.2, "sil"), (0.2, 0.55, "HH"), (0.5499999999999999, 0.9, "AY1"), (0.9, 1.0, "")]
    (folder / "1-2-0000.TextGrid").write_text(form(textgrid(1.0, spans)))
    (folder / "9-9-0000.TextGrid").write_text("of another subset: not read")
    steps = []
    phones, refused = alignments.read(tmp_path, MANIFEST, lambda *step: steps.append(step))
    assert refused.empty and steps == [("read alignments", 1, 1)]
    assert phones.to_pandas().values.tolist() == [
        ["1-2-0000", 0, 3_200, "sil"], ["1-2-0000", 3_200, 8_800, "HH"],
        ["1-2-0000", 8_800, 14_400, "AY"], ["1-2-0000", 14_400, 16_000, "sil"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (textgrid(0.9, [(0.0, 0.9, "AA")]), "is 0.900 s long, the audio 1.000 s"),
        (textgrid(1.0, [(0.0, 0.6, "AA"), (0.5, 1.0, "B")]), "B from 0.5 to 1.0 s overlaps"),
        (textgrid(1.0, [(0.0, 1.5, "AA")]), "leaves the audio"),
        (textgrid(1.0, [(0.6, 0.5, "AA"), (0.6, 1.0, "B")]), "AA from 0.6 to 0.5"),
        (textgrid(1.0, [(-0.5, 1.0, "AA")]), "a time below 0: -0.5"),
        (textgrid(1.0, [(0.0, 0.5, "AA")]), "truncated at 0.5 of 1.0 s"),
        (short(textgrid(1.0, [(0.0, 0.5, "AA"), (0.5, 1.0, "B")]))[:-9], "truncated at 0.5 of 1.0 s"),
        (textgrid(1.0, [(0.0, 0.5, "AA"), (0.5, 1.0, "B")])[:-20], "not a complete TextGrid"),
        (textgrid(1.0, [(0.0, 1.0, "AA")]).replace('"phones"', '"Phonemes"'), "no tier phones; it has words, Phonemes"),
        ("nonsense", "not a complete TextGrid"),
        (textgrid(1.0, [(0.0, 0.5, "A\nA"), (0.5, 1.0, "B")]), r"'A\nA' is no phone"),  # a line of a message
        ("ooBinaryFile\x08TextGrid", "not a complete TextGrid"),
        (textgrid(1.0, [(0.0, 0.5, "AA"), (0.5, 1.0, "\udcff" * 9000)]), "invalid start byte)"),
        ("[" * 100_000, "not a complete TextGrid"),
        ("{}", "not a complete TextGrid"),
    ],
)
def test_read_excludes_a_textgrid_that_does_not_fit(content, reason, tmp_path):
    (tmp_path / "1-2-0000.TextGrid").write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "1-2-0001.TextGrid").write_text(textgrid(0.5, [(0.0, 0.5, "AA0")]))
    phones, refused = alignments.read(tmp_path, MANIFEST)
    assert len(refused.reason[0]) < 300, "of a file without end a few words"
    assert phones["utterance"].unique().to_pylist() == ["1-2-0001"]
    assert len(refused) == 1 and reason in refused.reason[0] and "1-2-0000" in refused.reason[0]


@pytest.mark.parametrize("phone", [None, True, ["AA"], 7])
@pytest.mark.parametrize("seconds", [1.0, 10**400])
def test_read_excludes_json_that_holds_no_phones_or_times(phone, seconds, tmp_path):
    entries = [[0, 1, phone if seconds == 1 else "AA"]]
    whole = {"end": seconds, "tiers": {"phones": {"entries": entries}}}
    (tmp_path / "1-2-0000.json").write_text(json.dumps(whole))
    (tmp_path / "1-2-0001.TextGrid").write_text(textgrid(0.5, [(0.0, 0.5, "AA0")]))
    (tmp_path / "all").write_text(json.dumps({"1-2-0000": [seconds, entries], "1-2-0001": [0.5, [[0, 0.5, "AA"]]]}))
    for place in (tmp_path, tmp_path / "all"):
        phones, refused = alignments.read(place, MANIFEST)
        assert phones["utterance"].to_pylist() == ["1-2-0001"] and "1-2-0000" in refused.reason[0]


@pytest.mark.parametrize(
    ("spoken", "expected"),
    [
        (["AH0", "ah1", "sp", "T"], ["AH", "AH", "sil", "T"]),
        (["a1", "a2", "a3", "sp"], ["A1", "A2", "A3", "sil"]),
        (["s", "S", "sp", "a"], ["s", "S", "sil", "a"]),  # SAMPA
        (["AH0_B", "B_E", "SIL_S", "AH1_I"], ["AH", "B", "sil", "AH"]),  # Kaldi
    ],
)
def test_stress_goes_and_tones_stay(spoken, expected, tmp_path):
    spans = [(0.2 * i, 0.2 * (i + 1), phone) for i, phone in enumerate(spoken)]
    (tmp_path / "1-2-0001.TextGrid").write_text(textgrid(0.8, spans))
    manifest = MANIFEST.assign(samples=12_800)
    assert alignments.read(tmp_path, manifest)[0]["phone"].to_pylist() == expected


def test_phones_that_are_numbers_stay():
    assert [alignments.fold(phone) for phone in ("AH1", " ah0 ", "1", "12", "sp")] == ["AH", "AH", "1", "12", "sil"]


def test_read_textgrids_with_points_and_quotes(tmp_path):
    content = short(textgrid(1.0, [(0.0, 0.4, "AA"), (0.4, 1.0, "B")])).replace('"hi"', '"say ""1 2"" <now> 3"')
    content = content.replace("<exists>\n2", '<exists>\n3\n"TextTier"\n"clicks"\n0\n1.0\n2\n0.3\n"a"\n0.5\n"b"')
    (tmp_path / "1-2-0000.TextGrid").write_text(content, encoding="utf-8-sig")
    phones, refused = alignments.read(tmp_path, MANIFEST)
    assert refused.empty and phones["phone"].to_pylist() == ["AA", "B"]


def test_read_excludes_a_second_alignment(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1-2-0000.TextGrid").write_text(textgrid(1.0, [(0.0, 1.0, "AA")]))
    phones, refused = alignments.read(tmp_path, MANIFEST)
    assert len(phones) == 1
    assert refused.path.tolist() == [str(tmp_path / "b" / "1-2-0000.TextGrid")] and "already" in refused.reason[0]


def test_read_refuses_alignments_without_any_phone(tmp_path):
    (tmp_path / "1-2-0000.TextGrid").write_bytes(b"\xffT\x00")
    with pytest.raises(corpora.CorpusError, match=r"no phone of any .* 1 are unusable, such as .*1-2-0000.*utf-8"):
        alignments.read(tmp_path, MANIFEST)
    (tmp_path / "1-2-0000.TextGrid").write_text(textgrid(0.9, [(0.0, 0.9, "AA")]))
    with pytest.raises(corpora.CorpusError, match=r"1 are unusable, .* is 0\.900 s long"):
        alignments.read(tmp_path, MANIFEST)


def test_read_an_alignment_that_ends_34_ms_early(tmp_path):
    (tmp_path / "1-2-0000.TextGrid").write_text(textgrid(0.966, [(0.0, 0.5, "AA"), (0.5, 0.966, "B")]))
    phones, refused = alignments.read(tmp_path, MANIFEST)
    assert refused.empty and phones.to_pandas().end_sample.tolist() == [8_000, 15_456]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_read_textgrids_in_encodings_of_praat_behind_a_link(encoding, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "train").symlink_to(tmp_path / "elsewhere")
    content = textgrid(1.0, [(0.0, 1.0, "AA1")]).replace('"hi"', '"hé"')
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    suffix = "TextGrid" if mark else "textgrid"
    (tmp_path / "elsewhere" / f"1-2-0000.{suffix}").write_text(mark + content, encoding=encoding)
    assert alignments.read(tmp_path / "grids", MANIFEST)[0]["phone"].to_pylist() == ["AA"]


def test_pipes_in_the_place_of_texts_are_not_waited_at(tree, tmp_path):
    for path in (tree / "SPEAKERS.TXT", next(tree.rglob("*.trans.txt")), tmp_path / "1-2-0000.TextGrid"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    assert set(prepare(tmp_path / "run", tree)["manifest"].sex) == {""}
    with pytest.raises(corpora.CorpusError, match="not a complete TextGrid"):
        alignments.read(tmp_path, MANIFEST)


def test_read_json_of_the_montreal_aligner(tmp_path):
    entries = [[0, 0.4, "AA1"], [0.4, 0.8, "sp"], [0.8, 1.0, "spn"]]
    tiers = {name: {"type": "interval", "entries": entries} for name in ("words", "phones")}
    (tmp_path / "1-2-0000.json").write_text(json.dumps({"start": 0, "end": 1.0, "tiers": tiers}))
    (tmp_path / "1-2-0001.json").write_text(json.dumps({"end": 0.5, "tiers": {"words": tiers["words"]}}))
    phones, refused = alignments.read(tmp_path, MANIFEST)
    assert phones.to_pandas().values.tolist() == [["1-2-0000", 0, 6_400, "AA"], ["1-2-0000", 6_400, 12_800, "sil"]]
    assert "with a tier phones" in refused.reason[0]


def test_silences_of_an_alignment_are_the_same_in_both_formats_of_the_montreal_aligner(tmp_path):
    """It writes an empty interval for each in TextGrids, and leaves them out of JSON."""
    phones, silences = [(0.2, 0.4, "AA1"), (0.6, 0.8, "T")], [(0.0, 0.2, ""), (0.4, 0.6, ""), (0.8, 1.0, "")]
    for kind in ("grid", "json"):
        (tmp_path / kind).mkdir()
    (tmp_path / "grid" / "1-2-0000.TextGrid").write_text(textgrid(1.0, sorted(phones + silences)))
    whole = {"start": 0, "end": 1.0, "tiers": {"phones": {"type": "interval", "entries": phones}}}
    (tmp_path / "json" / "1-2-0000.json").write_text(json.dumps(whole))
    grid, other = (alignments.read(tmp_path / kind, MANIFEST)[0].to_pylist() for kind in ("grid", "json"))
    assert grid == other and [row["phone"] for row in grid] == ["sil", "AA", "sil", "T", "sil"]


def test_read_one_json_file_for_all(tmp_path):
    path = tmp_path / "a.json"
    table = {
        "1-2-0000": [1.01, [[0.0, 0.5, "SIL"], [0.5, 0.51, "AH"]], -1.0],
        "1-2-0001": [0.5, [[0.0, "x", "SIL"]]],
        "3-4-0000": [1.0, []],
    }
    path.write_text(json.dumps(table))
    phones, refused = alignments.read(path, MANIFEST)
    assert phones.to_pandas().values.tolist() == [["1-2-0000", 0, 8_000, "sil"], ["1-2-0000", 8_000, 16_000, "AH"]]
    assert "1-2-0001" in refused.reason[0]
    for content, message in (("{", "is not JSON"), ("[]", "not a table"), ("{}", "no phone of any")):
        path.write_text(content)
        with pytest.raises(corpora.CorpusError, match=message):
            alignments.read(path, MANIFEST)
    with pytest.raises(corpora.CorpusError, match="no file or folder"):
        alignments.read(tmp_path / "missing", MANIFEST)


def test_prepare_real_speech(real_speech, tmp_path):
    root = real_speech / "librispeech_mini"
    p = params.Corpus(
        kind="librispeech", root=str(root), test_subsets=["test-other"], decode_check=False,
        alignments=str(root / "phone_alignments_pocketsphinx.json"), keywords="speech-commands",
        keywords_root=str(real_speech / "speech_commands_v002_excerpt"),
    )  # fmt: skip
    corpora.prepare(tmp_path, p)
    folder = tmp_path / "00_corpus"
    manifest, keywords = (pd.read_parquet(folder / f"{name}.parquet") for name in ("manifest", "keywords"))
    assert manifest.groupby("split").speaker.nunique().to_dict() == {"test": 5, "train": 22}
    assert len(manifest) == 415 and manifest.text.notna().all() and manifest.sex.isin(["F", "M"]).all()
    for row in manifest.sample(20, random_state=0).itertuples():
        with Path(row.path).open("rb") as file:
            assert soundfile.info(file).frames == row.samples
    assert keywords.groupby("split").size().to_dict() == {"test": 39, "train": 192, "validation": 19}
    phones = pd.read_parquet(folder / "phones.parquet")
    assert phones.utterance.nunique() == 224 and phones.phone.nunique() == 40
    excluded = pd.read_parquet(folder / "excluded.parquet").reason
    assert excluded.str.fullmatch(r"word \w+ has no test clip here").all() and excluded.nunique() == 10
