"""Phone times from a forced aligner, so that units can be judged on real speech.

Reads what the Montreal Forced Aligner writes, one file per utterance in any folder below the root, as in the published
LibriSpeech alignments: TextGrids (Praat's text format, long or short, tier ``phones``) or JSON. Also reads one JSON
file for all, ``{utterance: [seconds, [[begin, duration, phone], …], …]}``. Stress digits are dropped and all silences
are called ``sil``, so that labels agree with those of the synthetic corpus.
"""

import json
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa

from fedhubert_lib import files
from fedhubert_lib.audio import HOP, SAMPLE_RATE
from fedhubert_lib.corpora.librispeech import CorpusError

COLUMNS = ["utterance", "start_sample", "end_sample", "phone"]
SUFFIXES = (".TextGrid", ".json")
SILENCES = {"", "SIL", "SP", "SPN", "<EPS>", "<SIL>", "+SPN+", "NSN"}
LONGER, SHORTER = HOP, 800
"""Samples by which an alignment may end after its audio (a frame of 20 ms, as aligners round) or before it (50 ms: the
Montreal aligner drops the last frames). What comes after its end has no phone."""

_TOKEN = re.compile(r'"(?:[^"]|"")*"|<\w+>|(?<!\S)[+-]?[\d.]\S*')
"""What counts in Praat's text formats: texts, flags, and numbers that stand alone. The rest (``xmin =``) explains."""


class Alignment(NamedTuple):
    utterance: str
    source: Path
    seconds: float
    phones: list[tuple[float, float, str]]
    """Begin, end, phone."""


def read(
    root: Path, manifest: pd.DataFrame, on_progress: Callable[[str, int, int], None] | None = None
) -> tuple[pa.Table, pd.DataFrame]:
    """Phones of the manifest's utterances (COLUMNS), and (path, reason) of each alignment left out.

    The phones are an Arrow table whose names are kept once each: LibriSpeech has 35 million phones.

    ``root`` is a JSON file or a folder of TextGrids or JSON files; links are followed. An alignment is left out as a
    whole when its length is not its audio's (LONGER, SHORTER), when its phones overlap, go backwards or leave its
    bounds, or when an earlier file, by path, has one of the same utterance. An utterance may have none. Raises
    CorpusError when ``root`` is missing, or when none of the manifest's utterances gets a phone from it.
    """
    samples = dict(zip(manifest["utterance"], manifest["samples"], strict=True))
    utterances: dict[str, int] = {}
    phones: dict[str, int] = {}
    codes, starts, ends, names = array("i"), array("q"), array("q"), array("i")
    refused = []
    for found in _alignments(root, samples, on_progress):
        if not isinstance(found, Alignment):
            refused.append(found)
            continue
        total = samples[found.utterance]
        again = "was already given by another file" if found.utterance in utterances else ""
        if reason := again or _reason(found, total):
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
    if not codes:
        why = f"; {len(refused)} are of no use, such as {refused[0][0]}: {refused[0][1]}" if refused else ""
        raise CorpusError(
            f"corpus.alignments: {root} gives no phone of any of the {len(samples)} utterances (files named UTTERANCE"
            f".TextGrid or UTTERANCE.json, or one JSON file for all){why}"
        )
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
    if not -SHORTER <= found.seconds * SAMPLE_RATE - samples <= LONGER:
        return f"is {found.seconds:.3f} s long, the audio {samples / SAMPLE_RATE:.3f} s"
    last = 0.0
    for begin, end, phone in found.phones:
        if not last - 1e-6 <= begin <= end <= found.seconds + LONGER / SAMPLE_RATE:  # NaN is refused too
            return f"{phone or 'silence'} from {begin} to {end} s overlaps another phone or leaves the audio"
        last = end
    return "" if found.phones else "has no phone"


def _alignments(
    root: Path, wanted: dict[str, int], on_progress: Callable[[str, int, int], None] | None
) -> Iterator[Alignment | tuple[str, str]]:
    if root.is_dir():
        paths = sorted(Path(entry.path) for entry in files.walk(root) if entry.name.endswith(SUFFIXES))
        paths = [path for path in paths if path.stem in wanted]
        for done, path in enumerate(paths, start=1):
            yield _textgrid(path) if path.suffix == ".TextGrid" else _montreal_json(path)
            if on_progress:
                on_progress("read alignments", done, len(paths))
    elif root.is_file():
        yield from _json(root, wanted)
    else:
        raise CorpusError(f"corpus.alignments: there is no file or folder {root}")


def _textgrid(path: Path) -> Alignment | tuple[str, str]:
    try:
        text = files.read_text(path)
    except (UnicodeDecodeError, OSError) as error:
        return str(path), f"alignment of {path.stem}: cannot be read ({error})"
    tokens = _TOKEN.findall(text)
    if tokens[:2] != ['"ooTextFile"', '"TextGrid"'] or tokens[4:5] != ["<exists>"]:
        return str(path), f"alignment of {path.stem}: no TextGrid in Praat's text format"
    try:
        tiers = dict(_tiers(tokens[5:]))
        return Alignment(path.stem, path, float(tokens[3]), tiers["phones"])
    except KeyError:
        there = ", ".join(tiers) or "none"
        return str(path), f"alignment of {path.stem}: no tier of intervals named phones; there is {there}"
    except (ValueError, IndexError):
        return str(path), f"alignment of {path.stem}: truncated or damaged, its tiers are not as long as they say"


def _tiers(tokens: list[str]) -> Iterator[tuple[str, list[tuple[float, float, str]]]]:
    """Name and intervals of each tier of a TextGrid; those of points are passed over."""
    at = 1
    for _ in range(int(tokens[0])):
        kind, name, count = tokens[at], _unquoted(tokens[at + 1]), int(tokens[at + 4])
        width = 3 if kind == '"IntervalTier"' else 2
        at, begin = at + 5 + width * count, at + 5
        fields = tokens[begin:at]
        if len(fields) != width * count:
            raise ValueError(f"{len(fields)} values of {count} intervals or points")
        if width == 3:
            spans = zip(map(float, fields[::3]), map(float, fields[1::3]), map(_unquoted, fields[2::3]), strict=True)
            yield name, list(spans)
    if tokens[at:]:
        raise ValueError("more values than tiers")


def _unquoted(token: str) -> str:
    if len(token) < 2 or token[0] != '"':
        raise ValueError(f"{token} is no text")
    return token[1:-1].replace('""', '"')


def _montreal_json(path: Path) -> Alignment | tuple[str, str]:
    """One utterance as the Montreal Forced Aligner writes it with ``--output_format json``."""
    try:
        whole = json.loads(files.read_text(path))
        spans = [(float(begin), float(end), str(phone)) for begin, end, phone in whole["tiers"]["phones"]["entries"]]
        return Alignment(path.stem, path, float(whole["end"]), spans)
    except (ValueError, TypeError, KeyError, OSError) as error:
        return str(
            path
        ), f"alignment of {path.stem}: no JSON of the Montreal Forced Aligner with a tier phones ({error!r})"


def _json(path: Path, wanted: dict[str, int]) -> Iterator[Alignment | tuple[str, str]]:
    try:
        table = json.loads(files.read_text(path))
    except ValueError as error:  # not JSON, or no text
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
