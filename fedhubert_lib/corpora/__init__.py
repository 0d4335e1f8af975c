"""The speech of a study: LibriSpeech, Speech Commands and plain folders, or the built-in corpus, in one manifest.

``prepare`` is what 00_corpus calls. It writes, in the run's folder ``00_corpus``:

* ``manifest.parquet``: a row per usable utterance, in order of utterance
* ``excluded.parquet``: path and reason of every file or alignment left out
* ``keywords.parquet``: a row per keyword clip, with its train, validation or test list
* ``phones.parquet``: phone times, where the corpus has them
* ``read.json``: the state of the given folders before anything was read
* ``synthetic/``: the generated audio, in the layouts of LibriSpeech and Speech Commands
"""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from fedhubert_lib import files, identity, params
from fedhubert_lib.corpora import alignments, archives, folder, librispeech, scan, speech_commands, synthetic
from fedhubert_lib.corpora.archives import Progress
from fedhubert_lib.corpora.librispeech import CorpusError


def prepare(run: Path, p: params.Corpus, on_progress: Progress = lambda *_: None) -> None:
    """Find, fetch or generate the speech that ``p`` names and write its manifest below ``run/00_corpus``.

    ``on_progress(task, done, total)`` is called while something is fetched, unpacked, synthesised or read. Raises
    CorpusError when a folder is missing or empty, when nothing in it can be used, when an archive is not the published
    one, or when a speaker is both in a training and in a test subset.
    """
    out = run / "00_corpus"
    spoken = _words(out, p, on_progress)
    root, train, test = _speech(out, p, on_progress)
    # Once all is fetched and before any is read: what comes later counts as another input (runs.finish).
    files.write_json(out / identity.READ, identity.listings(p))
    keywords, excluded_clips = _keywords(out, spoken, p, on_progress)
    places = [root / subset for subset in train + test] or [root]
    scanned = scan.scan(places, out / "scan.parquet", on_progress, decode=p.decode_check)
    if p.kind == "folder":
        manifest, excluded = folder.utterances(root, scanned)
    else:
        manifest, excluded = librispeech.utterances(root, train + test, scanned)
    manifest["split"] = manifest["subset"].isin(test).map({True: "test", False: "train"})
    _check(manifest, root, excluded, bool(test))

    phones, refused = alignments.PHONES.empty_table(), pd.DataFrame(columns=["path", "reason"])
    if p.alignments:
        phones, refused = alignments.read(Path(p.alignments), manifest, on_progress)
    elif p.kind == "synthetic":
        phones = pq.read_table(root / "phones.parquet")

    excluded = pd.concat([excluded, excluded_clips, refused], ignore_index=True).sort_values("path")
    with files.atomic(out / "phones.parquet") as temporary, pq.ParquetWriter(temporary, alignments.PHONES) as writer:
        for batch in phones.to_batches(1 << 20):
            writer.write_batch(batch.cast(alignments.PHONES))
    for name, table in (("keywords", keywords), ("excluded", excluded), ("manifest", manifest)):
        with files.atomic(out / f"{name}.parquet") as temporary:
            table.to_parquet(temporary, index=False)


def _speech(out: Path, p: params.Corpus, on_progress: Progress) -> tuple[Path, list[str], list[str]]:
    """The folder of the speech, its training subsets and its test subsets; a plain folder has none."""
    if p.kind == "folder":
        folder.speakers(Path(p.root), p.train_subsets + p.test_subsets)
        return Path(p.root), [], []
    if p.kind == "synthetic":
        root = out / "synthetic" / "LibriSpeech"
        synthetic.speech(root, p, on_progress)
        return root, [synthetic.TRAIN_SUBSET], [synthetic.TEST_SUBSET]
    subsets = p.train_subsets + p.test_subsets
    for name in subsets:
        archives.provide(Path(p.root), name, p.mirror, subsets, p.download, on_progress)
    return librispeech.home(Path(p.root), subsets), p.train_subsets, p.test_subsets


def _words(out: Path, p: params.Corpus, on_progress: Progress) -> Path:
    """The folder of the folders of words."""
    if p.keywords == "synthetic":
        root = out / "synthetic" / "SpeechCommands" / "speech_commands_v0.02"
        synthetic.keywords(root, p, on_progress)
        return root
    root = Path(p.keywords_root)
    if not speech_commands.homes(root):
        archives.provide(root, archives.KEYWORDS, p.keywords_mirror, (), p.download, on_progress)
    return speech_commands.home(root)


def _keywords(out: Path, root: Path, p: params.Corpus, on_progress: Progress) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The keyword clips below ``root``, and (path, reason) of those left out."""
    scanned = scan.scan(speech_commands.words(root), out / "scan_keywords.parquet", on_progress, decode=p.decode_check)
    keywords, excluded = speech_commands.clips(root, scanned)
    if keywords["word"].nunique() < 2 or "validation" not in set(keywords["split"]):
        raise CorpusError(
            f"{root}: too few usable clips: it takes two words with training and test clips, and another voice to"
            f" validate on; {_reasons(excluded)}"
        )
    return keywords, excluded


def _check(manifest: pd.DataFrame, root: Path, excluded: pd.DataFrame, tested: bool) -> None:
    speakers = {split: set(manifest.loc[manifest["split"] == split, "speaker"]) for split in ("train", "test")}
    for split in ("train", "test") if tested else ("train",):
        if not speakers[split]:
            raise CorpusError(f"{root}: no usable utterance to {split} on; {_reasons(excluded)}")
    if both := speakers["train"] & speakers["test"]:
        raise CorpusError(f"{root}: speakers {sorted(both)} are in a training and in a test subset; choose others")


def _reasons(excluded: pd.DataFrame) -> str:
    """The five most frequent reasons."""
    counts = excluded["reason"].value_counts()
    return "; ".join(f"{count} x {reason}" for reason, count in counts[:5].items()) or "there is no audio file"
