"""Reading a Speech Commands v0.02 folder: WORD/SPEAKER_nohash_TAKE.wav, validation_list.txt, testing_list.txt.

Whatever stands in neither list is for training. The lists keep each speaker in one of the three (Warden, "Speech
Commands: a dataset for limited-vocabulary speech recognition", 2018).
"""

from pathlib import Path

import pandas as pd

from fedhubert_lib.corpora.librispeech import CorpusError

COLUMNS = ["clip", "path", "word", "speaker", "split", "samples", "sample_rate"]
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}


def _places(root: Path) -> list[Path]:
    """Where the lists may be: the folder itself, or what the archive and torchaudio make below it."""
    places = [root, root / "speech_commands_v0.02", root / "SpeechCommands" / "speech_commands_v0.02"]
    return [place for place in places if all((place / name).is_file() for name in LISTS.values())]


def is_home(root: Path) -> bool:
    """Whether Speech Commands lies in or below ``root``."""
    return bool(_places(root))


def home(root: Path) -> Path:
    """The folder that holds the words and the lists: ``root``, or one below it."""
    for place in _places(root):
        return place
    raise CorpusError(
        f"corpus.keywords_root: {root} holds no Speech Commands folder "
        f"(a folder per word, {' and '.join(LISTS.values())}); give its folder or archive, or set corpus.download"
    )


def words(root: Path) -> list[Path]:
    """The folders of the words, without _background_noise_ and the like."""
    found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    if not found:
        raise CorpusError(f"{root} has no folder of a word; unpack the archive again")
    return found


def clips(root: Path, scanned: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per usable clip below ``root`` (COLUMNS, in order of clip), and (path, reason) of the others."""
    table = scanned.assign(clip=scanned["path"].str.slice(len(str(root.absolute())) + 1))
    names = table["clip"].str.extract(r"^(?P<word>[^/]+)/(?P<speaker>[^/]+)_nohash_\d+\.wav$")
    table = table.join(names)
    unnamed = table["word"].isna() & (table["reason"] == "")
    table.loc[unnamed, "reason"] = "not WORD/SPEAKER_nohash_TAKE.wav"
    split = {}
    for name, file in LISTS.items():
        split |= dict.fromkeys((root / file).read_text().split(), name)
    table["split"] = table["clip"].map(split).fillna("train")
    good = table["reason"] == ""
    excluded = table.loc[~good, ["path", "reason"]].reset_index(drop=True)
    return table.loc[good, COLUMNS].sort_values("clip").reset_index(drop=True), excluded
