"""Reading a plain folder of speakers: SPEAKER/…/FILE.wav or .flac, 16 kHz mono, of any length, without transcripts.

The first folder below the root is the speaker; files lie in it at any depth. All of it is speech to train on; speakers
to validate on are held out by 01_partition.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedhubert_lib import folders
from fedhubert_lib.corpora.librispeech import COLUMNS, CorpusError, without_copies
from fedhubert_lib.corpora.scan import SUFFIXES, flac_md5


def speakers(root: Path, subsets: Sequence[str] = ()) -> list[str]:
    """The folders of ``root`` with a .wav or .flac in them, by names alone.

    Raises CorpusError where there is none, or where one has the name of a subset: that is another kind of corpus.
    """
    below = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    names = [path.name for path in below if any(entry.name.lower().endswith(SUFFIXES) for entry in folders.walk(path))]
    if not names:
        raise CorpusError(
            f"corpus.root: {root} has no folder of a speaker with a .wav or .flac in it; lay the files out as "
            f"{root / 'SPEAKER' / 'FILE.wav'}"
        )
    if subset := sorted(set(names) & set(subsets)):
        raise CorpusError(
            f"corpus.root: of kind folder each folder of {root} is a speaker to train on, {', '.join(subset)} too,"
            " which train_subsets or test_subsets names; give kind: librispeech, or rename the folder"
        )
    return names


def utterances(root: Path, scanned: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per usable file below ``root`` (COLUMNS, in order of utterance), and (path, reason) of the others.

    ``scanned`` is what scan.scan returns of ``root``. An utterance is named by its path from ``root``, without suffix;
    its chapter is the folders between speaker and file. Sex and text are unknown. Left out, beside what the scan
    refused: a file outside of any speaker's folder, one that is hidden or in a hidden folder, and the second copy of an
    utterance or of a recording. Every file that was scanned is used or left out.
    """
    inner = scanned["path"].str.slice(len(str(root.absolute())) + 1)
    parts = inner.str.split("/")
    fine = scanned["reason"] == ""
    table = scanned.assign(
        utterance=inner.str.replace(r"(?i)\.(?:flac|wav)$", "", regex=True),
        speaker=parts.str[0],
        chapter=parts.str[1:-1].str.join("/"),
        subset="recordings",
        sex="",
        text=pd.Series(None, scanned.index, dtype="str"),
        reason=scanned["reason"].mask(fine & (parts.str.len() < 2), "lies in no speaker's folder: not SPEAKER/…/FILE")
        .mask(fine & inner.str.contains(r"(?:^|/)\."), "hidden, or in a hidden folder"),
    )  # fmt: skip
    table = table.sort_values("utterance", kind="stable")
    flac = table["path"].str.lower().str.endswith(".flac")
    wide = ~flac & (table["size"] > 2.5 * table["samples"])  # WAV of more than 16 bits
    formats = (flac + 2 * wide).groupby(table["samples"]).transform("nunique")  # whose fingerprints differ
    twins = ~flac & (table["reason"] == "") & (formats > 1)  # perhaps
    audio = table["fingerprint"].mask(twins, table.loc[twins, "path"].map(flac_md5))
    table = without_copies(table.assign(fingerprint=audio)).assign(fingerprint=table["fingerprint"])
    good = table["reason"] == ""
    return table.loc[good, COLUMNS].reset_index(drop=True), table.loc[~good, ["path", "reason"]].reset_index(drop=True)
