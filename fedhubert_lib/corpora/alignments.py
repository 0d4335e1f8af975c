"""Phone times from a forced aligner, so that units can be judged on real speech.

Read are the Montreal Forced Aligner's TextGrids (Praat's long text format, tier ``phones``), one per utterance in any
folder below the root, as in the published LibriSpeech alignments; and JSON, ``{utterance: [seconds, [[begin, duration,
phone], …], …]}``. Stress digits are dropped and all silences are called ``sil``, so that labels agree with those of the
synthetic corpus.
"""

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa

from fedhubert_lib.audio import HOP, SAMPLE_RATE
from fedhubert_lib.corpora.librispeech import CorpusError

COLUMNS = ["utterance", "start_sample", "end_sample", "phone"]
SILENCES = {"", "SIL", "SP", "SPN", "<EPS>", "<SIL>", "+SPN+", "NSN"}
TOLERANCE = HOP
"""Samples by which an alignment may end before or after its audio: a frame of 20 ms, as aligners round."""

_INTERVAL = re.compile(r'xmin = ([\d.e+-]+)\s+xmax = ([\d.e+-]+)\s+text = "((?:[^"]|"")*)"')


class Alignment(NamedTuple):
    utterance: str
    source: Path
    seconds: float
    phones: list[tuple[float, float, str]]
    """Begin, end, phone."""


def read(root: Path, manifest: pd.DataFrame) -> tuple[pa.Table, pd.DataFrame]:
    """Phones of the manifest's utterances (COLUMNS), and (path, reason) of each alignment left out.

    The phones are an Arrow table whose names are kept once each: LibriSpeech has 35 million phones.

    ``root`` is a JSON file or a folder of TextGrids. An alignment is left out as a whole when its length is not its
    audio's within 20 ms, or when its phones overlap, go backwards or leave its bounds. An utterance may have none.
    Raises CorpusError when ``root`` is missing or holds nothing for any of the manifest's utterances.
    """
    samples = dict(zip(manifest["utterance"], manifest["samples"], strict=True))
    utterances: dict[str, int] = {}
    phones: dict[str, int] = {}
    codes, starts, ends, names = array("i"), array("q"), array("q"), array("i")
    refused, known = [], 0
    for found in _alignments(root, samples):
        if not isinstance(found, Alignment):
            refused.append(found)
            continue
        known += 1
        total = samples[found.utterance]
        if reason := _reason(found, total):
            refused.append((str(found.source), f"alignment of {found.utterance}: {reason}"))
            continue
        code = utterances.setdefault(found.utterance, len(utterances))
        for begin, end, phone in found.phones:
            start, stop = round(begin * SAMPLE_RATE), min(round(end * SAMPLE_RATE), total)
            if stop > start:
                codes.append(code)
                starts.append(start)
                ends.append(stop)
                names.append(phones.setdefault(fold(phone), len(phones)))
    if not known:
        raise CorpusError(f"corpus.alignments: {root} has no alignment of any of the {len(samples)} utterances")
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(list(utterances), pa.string())),
        pa.array(starts, pa.int64()),
        pa.array(ends, pa.int64()),
        pa.DictionaryArray.from_arrays(pa.array(names, pa.int32()), pa.array(list(phones), pa.string())),
    ]
    return pa.table(columns, names=COLUMNS), pd.DataFrame(refused, columns=["path", "reason"])


def fold(phone: str) -> str:
    """A phone without stress digit, in upper case; every kind of silence or noise is ``sil``."""
    phone = phone.strip().upper()
    return "sil" if phone in SILENCES else phone.rstrip("012")


def _reason(found: Alignment, samples: int) -> str:
    if abs(found.seconds * SAMPLE_RATE - samples) > TOLERANCE:
        return f"is {found.seconds:.3f} s long, the audio {samples / SAMPLE_RATE:.3f} s"
    last = 0.0
    for begin, end, phone in found.phones:
        if not last - 1e-6 <= begin <= end <= found.seconds + TOLERANCE / SAMPLE_RATE:  # NaN is refused too
            return f"{phone or 'silence'} from {begin} to {end} s overlaps another phone or leaves the audio"
        last = end
    return "" if found.phones else "has no phone"


def _alignments(root: Path, wanted: dict[str, int]) -> Iterator[Alignment | tuple[str, str]]:
    if root.is_dir():
        for path in sorted(root.rglob("*.TextGrid")):
            if path.stem in wanted:
                yield _textgrid(path)
    elif root.is_file():
        yield from _json(root, wanted)
    else:
        raise CorpusError(f"corpus.alignments: there is no file or folder {root}")


def _textgrid(path: Path) -> Alignment | tuple[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        return str(path), f"alignment of {path.stem}: cannot be read ({error})"
    tiers = text.split('name = "phones"')
    length = re.search(r"xmax = ([\d.e+-]+)", text)
    if len(tiers) != 2 or length is None:
        return str(path), f"alignment of {path.stem}: no TextGrid with one tier named phones, in the long text format"
    body = tiers[1].split("item [")[0]
    size = re.search(r"intervals: size = (\d+)", body)
    try:
        phones = [(float(a), float(b), label.replace('""', '"')) for a, b, label in _INTERVAL.findall(body)]
        seconds = float(length[1])
    except ValueError:
        return str(path), f"alignment of {path.stem}: a time that is no number"
    if size is None or int(size[1]) != len(phones):
        return str(path), f"alignment of {path.stem}: truncated, {len(phones)} intervals where others are promised"
    return Alignment(path.stem, path, seconds, phones)


def _json(path: Path, wanted: dict[str, int]) -> Iterator[Alignment | tuple[str, str]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(f"corpus.alignments: {path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise CorpusError(f"corpus.alignments: {path} is no table of utterances")
    for utterance in sorted(table.keys() & wanted.keys()):
        try:
            seconds, spans = table[utterance][:2]
            phones = [(float(begin), float(begin) + float(length), str(phone)) for begin, length, phone in spans]
            yield Alignment(utterance, path, float(seconds), phones)
        except (TypeError, ValueError, KeyError):
            yield str(path), f"alignment of {utterance}: not [seconds, [[begin, duration, phone], …]]"
