"""Reading a Speech Commands v0.02 folder: WORD/SPEAKER_nohash_TAKE.wav, validation_list.txt, testing_list.txt.

A clip in neither list is for training. The lists keep each speaker in one of the three (Warden, "Speech Commands: a
dataset for limited-vocabulary speech recognition", 2018). A part of the corpus will do: what is missing is noted, and a
word is used if it has a clip to train and one to test on.
"""

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

import pandas as pd

from fedhubert_lib import files
from fedhubert_lib.audio import SAMPLE_RATE
from fedhubert_lib.corpora.librispeech import CorpusError

COLUMNS = ["clip", "path", "word", "speaker", "split", "samples", "sample_rate", "fingerprint"]
_CLIP = re.compile(r"^(?P<word>[^/]+)/(?P<speaker>[^/.][^/]*)_nohash_\d+\.wav$")
_FORM = "WORD/SPEAKER_nohash_TAKE.wav"
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}


def homes(root: Path) -> list[Path]:
    """Folders with both lists: the root itself, or what the archive and torchaudio make below it."""
    places = [root, root / "speech_commands_v0.02", root / "SpeechCommands" / "speech_commands_v0.02"]
    return [place for place in places if all((place / name).is_file() for name in LISTS.values())]


def home(root: Path) -> Path:
    """The folder that holds the words and the lists: ``root``, or one below it."""
    for place in homes(root):
        return place
    raise CorpusError(
        f"corpus.keywords_root: {root} holds no Speech Commands folder "
        f"(a folder per word, {' and '.join(LISTS.values())}); name its folder or its archive's, or set corpus.download"
    )


def words(root: Path) -> list[Path]:
    """The folders of the words, without _background_noise_ and the like."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))


def lists(root: Path) -> dict[str, str]:
    """Clip (WORD/FILE.wav) to split, of the clips that the two lists name, whether or not they exist.

    Lists written on other systems are read, too: ``./`` or a folder before the word, backslashes, any line end, a byte
    order mark. Raises CorpusError at a line that names no clip, and at a clip in both lists.
    """
    split: dict[str, str] = {}
    for name, file in LISTS.items():
        try:
            lines = files.read_text(root / file).splitlines()
        except UnicodeDecodeError as error:
            raise CorpusError(f"{root / file} is not text ({error}); unpack it from the archive again") from error
        for number, line in enumerate(lines, start=1):
            clip = "/".join(PurePosixPath(line.strip().replace("\\", "/")).parts[-2:])
            if not clip:
                continue
            if "/" not in clip:
                raise CorpusError(f"{root / file}, line {number}: {line[:60]!r} is not WORD/FILE.wav; unpack it again")
            if split.setdefault(clip, name) != name:
                raise CorpusError(f"{root / file}, line {number}: {clip} is in the other list, too; unpack them again")
    return split


def usable(root: Path) -> set[str]:
    """The words that have a clip to train and one to test on, by the names of their files alone.

    Raises CorpusError when there are fewer than two.
    """
    split = lists(root)
    names = set()
    for folder in words(root):
        clips = [clip for name in os.listdir(folder) if _CLIP.fullmatch(clip := f"{folder.name}/{name}")]
        if {"train", "test"} <= {split.get(clip, "train") for clip in clips}:
            names.add(folder.name)
    if len(names) < 2:
        raise CorpusError(
            f"corpus.keywords_root: {root} has a training and a test clip of {len(names)} words ({_FORM}), and its"
            f" lists name {len(split):,} clips; unpack whole folders of words, and both lists, from one archive"
        )
    return names


def clips(root: Path, scanned: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per usable clip below ``root`` (COLUMNS, in order of clip), and (path, reason) of all else.

    The reasons also list what a part of the corpus lacks: entries of the lists, words without a training or test clip,
    validation clips altogether (then some voices move from training to validation); and how many clips exceed a second.
    Raises CorpusError when a voice is in two splits.
    """
    table = scanned.assign(clip=scanned["path"].str.slice(len(str(root.absolute())) + 1))
    table = table.join(table["clip"].str.extract(_CLIP))
    table.loc[table["word"].isna() & (table["reason"] == ""), "reason"] = f"not {_FORM}"
    split = lists(root)
    table["split"] = table["clip"].map(split).fillna("train")
    notes = _missing(root, split, set(table["clip"]))
    splits = table[table["reason"] == ""].groupby("speaker")["split"].unique()
    if len(both := splits[splits.str.len() > 1]):
        raise CorpusError(
            f"{root}: voice {both.index[0]} is in {' and in '.join(both.iloc[0])}, as are {len(both) - 1} others; a"
            " metric would not be that of unseen voices. Unpack the official lists again"
        )
    good = _of_whole_words(table)
    if not (table.loc[good, "split"] == "validation").any():
        notes.append((str(root / LISTS["validation"]), _choose_validation(table, good)))
        good = _of_whole_words(table)
    if long := (table.loc[good, "samples"] > SAMPLE_RATE).sum():  # see keywords.one_second
        notes.append((str(root), f"{long:,} of {good.sum():,} clips are longer than 1 s: their middle second is used"))
    excluded = pd.concat([table.loc[~good, ["path", "reason"]], pd.DataFrame(notes, columns=["path", "reason"])])
    return table.loc[good, COLUMNS].sort_values("clip").reset_index(drop=True), excluded.reset_index(drop=True)


def _of_whole_words(table: pd.DataFrame) -> pd.Series:
    """Give a reason to the clips of words without a training or a test clip; True for each clip that has none."""
    for word, rows in table[table["reason"] == ""].groupby("word"):
        if missing := {"train", "test"} - set(rows["split"]):
            table.loc[rows.index, "reason"] = f"word {word} has no {' and no '.join(sorted(missing))} clip here"
    return table["reason"] == ""


def _missing(root: Path, split: dict[str, str], clips: set[str]) -> list[tuple[str, str]]:
    """Each list of which a clip is missing, with their number."""
    notes = []
    for name, file in LISTS.items():
        entries = {clip for clip, entry in split.items() if entry == name}
        if missing := sorted(entries - clips):
            text = f"{len(missing):,} of its {len(entries):,} clips are missing, such as {missing[0]}"
            notes.append((str(root / file), text))
    return notes


def _choose_validation(table: pd.DataFrame, good: pd.Series) -> str:
    """Move an eighth of the training voices to validation; returns a note of it."""
    train = good & (table["split"] == "train")
    voices = sorted(set(table.loc[train, "speaker"]), key=lambda voice: hashlib.sha256(voice.encode()).digest())
    chosen = voices[: max(1, len(voices) // 8)]
    table.loc[train & table["speaker"].isin(chosen), "split"] = "validation"
    return f"none of its clips can be used: {len(chosen)} of the {len(voices)} training voices are kept for validation"
