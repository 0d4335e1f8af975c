"""Reading a LibriSpeech folder: SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac, transcripts, SPEAKERS.TXT.

Any subset name will do: train-clean-100 … test-other, Mini LibriSpeech's train-clean-5 and dev-clean-2, your own.
"""

import re
from pathlib import Path

import pandas as pd

from fedhubert_lib import files

COLUMNS = [
    "utterance", "path", "speaker", "chapter", "subset", "sex", "samples", "sample_rate", "text", "fingerprint",
]  # fmt: skip
_FILE = re.compile(
    r"^(?P<subset>[^/]+)/(?P<speaker>[^/]+)/(?P<chapter>[^/]+)/"
    r"(?P<utterance>(?P=speaker)-(?P=chapter)-[^/]*)\.(?i:flac|wav)$"
)


class CorpusError(ValueError):
    """A corpus that is missing or cannot be used as asked."""


def home(root: Path, subsets: list[str]) -> Path:
    """The folder that holds the subsets: ``root`` or ``root/LibriSpeech``. Missing or empty ones are an error."""
    if not root.is_dir():
        raise CorpusError(f"corpus.root: there is no folder {root}; name the folder that holds {', '.join(subsets)}")
    places = [place for place in (root / "LibriSpeech", root) if place.is_dir()]
    root = next((place for place in places if all((place / subset).is_dir() for subset in subsets)), places[0])
    for subset in subsets:
        if not (root / subset).is_dir():
            folders = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folder at all"
            remedy = f"give {root.parent}" if root.name in subsets else f"it has {folders}"
            raise CorpusError(f"{root} has no subset {subset}; {remedy}")
        if not any((root / subset).iterdir()):
            raise CorpusError(f"{root / subset} is empty; unpack the subset there, or leave it out")
    return root


def sexes(speakers_txt: Path) -> dict[str, str]:
    """Speaker to 'F' or 'M' from SPEAKERS.TXT; empty where there is no such file. Raises CorpusError at a bad line."""
    if not speakers_txt.exists():
        return {}
    table: dict[str, str] = {}
    try:
        text = files.read_text(speakers_txt)
    except UnicodeDecodeError:  # in the names, which are not read: all else is ASCII
        text = speakers_txt.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith(";"):
            continue
        speaker, sex, *_ = [field.strip() for field in line.split("|")] + [""]
        if not speaker or sex not in ("F", "M") or table.get(speaker, sex) != sex:
            raise CorpusError(
                f"{speakers_txt}, line {number}: {line[:60]!r} does not give a speaker's sex (ID | F or M | SUBSET …), "
                "or another than before; unpack the archive again, or remove the file: then all sexes are unknown"
            )
        table[speaker] = sex
    return table


def utterances(root: Path, subsets: list[str], scanned: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per usable utterance below ``root`` (COLUMNS, in order of utterance), and (path, reason) of the others.

    ``scanned`` is what scan.scan returns of the subsets. Left out, beside what the scan refused: a file whose name
    does not fit its folders, and the second copy of an utterance or of a recording. A transcript that is not text is
    left out, too, and its utterances stay. Every file that was scanned is used or left out.
    """
    table = scanned.join(scanned["path"].str.slice(len(str(root.absolute())) + 1).str.extract(_FILE))
    misplaced = (table["reason"] == "") & table["utterance"].isna()
    table.loc[misplaced, "reason"] = "not SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN"

    # The first in the order of the subsets stays, so that a smaller subset inside a larger one costs nothing.
    table["order"] = table["subset"].map({subset: i for i, subset in enumerate(subsets)})
    table = without_copies(table.sort_values(["order", "utterance"], kind="stable"))
    sex = sexes(root / "SPEAKERS.TXT")
    accepted = table[table["reason"] == ""].sort_values("utterance")
    texts, opened = transcripts(accepted["path"])
    accepted["sex"] = pd.Series([sex.get(speaker, "") for speaker in accepted["speaker"]], accepted.index, dtype="str")
    accepted["text"] = accepted["utterance"].map(texts).astype("str")
    table["reason"] = table["path"].map(pd.Series(opened, dtype="str")).fillna(table["reason"])
    return accepted[COLUMNS].reset_index(drop=True), table.loc[table["reason"] != "", ["path", "reason"]]


def without_copies(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with a reason at each later row of an utterance, or of a recording, that an earlier usable row has."""
    table = table.copy()
    for column, words in ("utterance", "its utterance is already there:"), ("fingerprint", "same audio as"):
        usable = table[(table["reason"] == "") & ~table[column].isin(["", "0" * 32])]
        first = usable.drop_duplicates(column).set_index(column)["path"]
        copies = usable[usable[column].duplicated()]
        table.loc[copies.index, "reason"] = words + " " + copies[column].map(first).astype("str")
    return table


def transcripts(paths: pd.Series) -> tuple[dict[str, str], dict[str, str]]:
    """Texts of the .trans.txt files beside the audio files ``paths``, by utterance; and of each of these files the
    reason why it cannot be read, or nothing."""
    texts: dict[str, str] = {}
    opened: dict[str, str] = {}
    for folder in sorted(set(paths.str.rsplit("/", n=1).str[0])):
        speaker, chapter = folder.rsplit("/", 2)[1:]
        file = f"{folder}/{speaker}-{chapter}.trans.txt"
        try:
            lines = files.read_text(file).splitlines()
        except FileNotFoundError:
            continue
        except (UnicodeDecodeError, OSError) as error:
            opened[file] = f"transcript cannot be read ({error}); its utterances have no text"
        else:
            opened[file] = ""
            texts |= dict(line.strip().split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)
    return texts, opened
