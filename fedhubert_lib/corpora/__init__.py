"""Which speech there is: LibriSpeech and Speech Commands folders, or the built-in synthetic corpus, in one manifest.

``prepare`` is what 00_corpus calls. It writes, in the run's folder ``00_corpus``:

* ``manifest.parquet``: a row per usable utterance, in order of utterance
* ``excluded.parquet``: path and reason of every file or alignment left out
* ``keywords.parquet``: a row per keyword clip, with its train, validation or test list
* ``phones.parquet``: phone times, where they are known
* ``synthetic/``: the generated audio, in the layouts of LibriSpeech and Speech Commands
"""

from pathlib import Path

import pandas as pd

from fedhubert_lib import files, params
from fedhubert_lib.corpora import alignments, archives, librispeech, scan, speech_commands, synthetic
from fedhubert_lib.corpora.librispeech import CorpusError
from fedhubert_lib.corpora.synthetic import Progress

PHONE_COLUMNS = {"utterance": "str", "start_sample": "int64", "end_sample": "int64", "phone": "str"}


def prepare(run: Path, p: params.Corpus, on_progress: Progress | None = None) -> None:
    """Find or generate the speech that ``p`` names and write its manifest below ``run/00_corpus``.

    ``on_progress(what, done, total)`` is called during synthesis and scanning. Raises CorpusError when a folder is
    missing or empty, when nothing in it can be used, or when a speaker is both in a training and in a test subset.
    """
    folder = run / "00_corpus"
    phones = pd.DataFrame(columns=list(PHONE_COLUMNS)).astype(PHONE_COLUMNS)  # with types, or readers cannot filter
    if p.kind == "synthetic":
        root = folder / "synthetic" / "LibriSpeech"
        synthetic.speech(root, p, on_progress)
        train, test = [synthetic.TRAIN_SUBSET], [synthetic.TEST_SUBSET]
        phones = pd.read_parquet(root / "phones.parquet")
    else:
        train, test = p.train_subsets, p.test_subsets
        for subset in train + test:
            archives.provide(
                Path(p.root),
                subset,
                archives.LIBRISPEECH,
                p.mirror,
                download=p.download,
                inside="LibriSpeech",
                on_progress=on_progress,
            )
        root = librispeech.home(Path(p.root), train + test)
    places = [root / subset for subset in train + test]
    scanned = scan.scan(places, folder / "scan.parquet", on_progress, decode=p.decode_check)
    manifest, excluded = librispeech.utterances(root, train + test, scanned)
    manifest["split"] = manifest["subset"].isin(test).map({True: "test", False: "train"})
    _check(manifest, root, excluded, p)
    refused = pd.DataFrame(columns=["path", "reason"])
    if p.alignments:
        phones, refused = alignments.read(Path(p.alignments), manifest)

    if p.keywords == "synthetic":
        keywords_root = folder / "synthetic" / "SpeechCommands" / "speech_commands_v0.02"
        synthetic.keywords(keywords_root, p, on_progress)
    else:
        archives.provide(
            Path(p.keywords_root),
            "speech_commands_v0.02",
            archives.KEYWORDS,
            p.keywords_mirror,
            download=p.download and not speech_commands.is_home(Path(p.keywords_root)),
            inside="",
            on_progress=on_progress,
        )
        keywords_root = speech_commands.home(Path(p.keywords_root))
    scanned = scan.scan(
        speech_commands.words(keywords_root),
        folder / "scan_keywords.parquet",
        on_progress,
    )
    keywords, excluded_clips = speech_commands.clips(keywords_root, scanned)
    if keywords.empty:
        raise CorpusError(f"{keywords_root}: no usable clip among {len(scanned)} files; {_reasons(excluded_clips)}")

    phones = phones[phones["utterance"].isin(manifest["utterance"])]
    excluded = pd.concat([excluded, excluded_clips, refused], ignore_index=True).sort_values("path")
    for name, table in (
        ("phones", phones),
        ("keywords", keywords),
        ("excluded", excluded),
        ("manifest", manifest),
    ):
        with files.atomic(folder / f"{name}.parquet") as temporary:
            table.to_parquet(temporary, index=False)


def _check(manifest: pd.DataFrame, root: Path, excluded: pd.DataFrame, p: params.Corpus) -> None:
    speakers = {split: set(manifest.loc[manifest["split"] == split, "speaker"]) for split in ("train", "test")}
    for split, wanted in (("train", True), ("test", p.kind == "synthetic" or p.test_subsets)):
        if wanted and not speakers[split]:
            raise CorpusError(f"{root}: no usable utterance to {split} on; {_reasons(excluded)}")
    both = speakers["train"] & speakers["test"]
    if both:
        raise CorpusError(f"{root}: speakers {sorted(both)} are in a training and in a test subset; choose others")


def _reasons(excluded: pd.DataFrame) -> str:
    counts = excluded["reason"].value_counts()
    return "; ".join(f"{count} x {reason}" for reason, count in counts.items()) or "there is no audio file"
