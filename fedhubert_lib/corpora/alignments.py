"""Phone times from a forced aligner, against which units are measured on real speech.

Reads what the Montreal Forced Aligner writes, one file per utterance in any folder below the root, as in the published
LibriSpeech alignments: TextGrids (Praat's text format, long or short, tier ``phones``) or JSON. Also reads one JSON
file for all, ``{utterance: [seconds, [[begin, duration, phone], …], …]}``. Stress digits are dropped and all silences
are called ``sil``, so that labels agree with those of the synthetic corpus.
"""

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from praatio.utilities import textgrid_io
from praatio.utilities.errors import PraatioException

from fedhubert_lib import files, folders
from fedhubert_lib.audio import HOP, SAMPLE_RATE
from fedhubert_lib.corpora.archives import Progress
from fedhubert_lib.corpora.librispeech import CorpusError

PHONES = pa.schema(
    [("utterance", pa.string()), ("start_sample", pa.int64()), ("end_sample", pa.int64()), ("phone", pa.string())]
)
"""The columns of phones.parquet, whatever the corpus; samples at 16 kHz."""
SUFFIXES = (".textgrid", ".json")
TONES = tuple("3456789")
"""Last digits that no stress has: where phones end so, digits are tones, or part of their names."""
SILENCES = {"", "SIL", "SP", "<EPS>", "<SIL>", "NSN", "+NSN+"}
UNKNOWN = {"SPN", "+SPN+"}
"""Speech of no phone, such as a word that the aligner's lexicon lacks."""
KALDI = re.compile("^([A-Z]+[0-2]?)_[BEIS]$")
"""ARPABET with the place in the word: beginning, end, inside, or a word of its own."""
LONGER, SHORTER = HOP, 800
"""Samples by which an alignment may end after its audio (a frame of 20 ms, as aligners round) or before it (50 ms: the
Montreal aligner drops the last frames). Audio after its end has no phone."""
_WRONG = (PraatioException, ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError, OSError)
"""Errors that the content of a file that others wrote can raise."""


class Alignment(NamedTuple):
    utterance: str
    source: Path
    seconds: float = 0.0
    phones: Sequence[tuple[float, float, str]] = ()
    """Begin, end, phone."""
    reason: str = ""
    """Why it cannot be read."""


def read(root: Path, manifest: pd.DataFrame, on_progress: Progress = lambda *_: None) -> tuple[pa.Table, pd.DataFrame]:
    """Phones of the manifest's utterances (PHONES), and (path, reason) of each alignment left out.

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
    for alignment in _alignments(root, samples, on_progress):
        total, repeated = samples[alignment.utterance], alignment.utterance in utterances
        reason = alignment.reason or ("another file has it already" if repeated else _reason(alignment, total))
        if reason:
            refused.append((str(alignment.source), f"alignment of {alignment.utterance}: {reason}"))
            continue
        code = utterances.setdefault(alignment.utterance, len(utterances))
        for begin, end, phone in alignment.phones:
            start, stop = round(begin * SAMPLE_RATE), min(round(end * SAMPLE_RATE), total)
            name = KALDI.sub(r"\1", phone.strip())
            if stop > start and name.upper() not in UNKNOWN:
                codes.append(code)
                starts.append(start)
                ends.append(stop)
                names.append(phones.setdefault(name, len(phones)))
    if not codes:
        example = f"; {len(refused)} are unusable, such as {refused[0][0]}: {refused[0][1]}" if refused else ""
        raise CorpusError(
            f"corpus.alignments: {root} has no phone of any of the {len(samples)} utterances (files named UTTERANCE"
            f".TextGrid or UTTERANCE.json, or one JSON file for all){example}"
        )
    tones = any(name[1:].endswith(TONES) for name in phones)
    spoken = [name for name in phones if name.upper() not in SILENCES]
    stressed = any(len(name) > 2 and name[-1] in "012" for name in spoken)  # ARPABET, whose case says nothing
    cased = not stressed and len({name.upper() for name in spoken}) < len(spoken)
    kind_of, kinds = pd.factorize(pd.Series([fold(phone, tones, cased) for phone in phones]))
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(list(utterances), pa.string())),
        pa.array(starts, pa.int64()),
        pa.array(ends, pa.int64()),
        pa.DictionaryArray.from_arrays(kind_of.astype(np.int32)[np.asarray(names)], pa.array(kinds, pa.string())),
    ]
    return pa.table(columns, names=PHONES.names), pd.DataFrame(refused, columns=["path", "reason"])


def fold(phone: str, tones: bool = False, cased: bool = False) -> str:
    """A phone without stress digit, in upper case unless ``cased`` (SAMPA: s is not S); every kind of silence or noise
    is ``sil``. Where ``tones`` have digits, 3 and above among them, all digits stay."""
    phone = phone.strip()
    if phone.upper() in SILENCES:
        return "sil"
    phone = phone if cased else phone.upper()
    return phone if tones else phone.rstrip("012") or phone  # a number may be its name


def _reason(alignment: Alignment, samples: int) -> str:
    if not -SHORTER <= alignment.seconds * SAMPLE_RATE - samples <= LONGER:
        return f"is {alignment.seconds:.3f} s long, the audio {samples / SAMPLE_RATE:.3f} s"
    last = 0.0
    for begin, end, phone in alignment.phones:
        if not last - 1e-6 <= begin <= end <= alignment.seconds + LONGER / SAMPLE_RATE:  # NaN is refused too
            return f"{phone or 'silence'} from {begin} to {end} s overlaps another phone or leaves the audio"
        last = end
    return "" if alignment.phones else "has no phone"


def _alignments(root: Path, samples: dict[str, int], on_progress: Progress) -> Iterator[Alignment]:
    """The alignments of the utterances of ``samples``, in order of path."""
    if root.is_dir():
        paths = sorted(Path(entry.path) for entry in folders.walk(root) if entry.name.lower().endswith(SUFFIXES))
        # Named as the utterance, or, of a plain folder, at its place below the root, as the Montreal aligner lays out.
        names = [path.stem if path.stem in samples else str(path.relative_to(root).with_suffix("")) for path in paths]
        known = [(path, name) for path, name in zip(paths, names, strict=True) if name in samples]
        for done, (path, name) in enumerate(known, start=1):
            yield (_textgrid if path.suffix.lower() == ".textgrid" else _montreal_json)(name, path)
            on_progress("read alignments", done, len(known))
    elif root.is_file():
        yield from _json(root, samples)
    else:
        raise CorpusError(f"corpus.alignments: there is no file or folder {root}")


def _textgrid(utterance: str, path: Path) -> Alignment:
    """One utterance in Praat's format."""
    try:
        text = files.read_text(path)
        if below := re.search(r"^\s*(?:xmin|xmax) *= *(-[\d.]*[1-9].*)", text, re.MULTILINE):  # praatio drops the sign
            return Alignment(utterance, path, reason=f"has a time below 0: {below[1]:.20}")
        # Not openTextgrid, which refuses intervals that overlap by a rounding of their times.
        grid = textgrid_io.parseTextgridStr(text, includeEmptyIntervals=True)
        seconds, tiers = float(grid["xmax"]), {tier["name"]: tier["entries"] for tier in grid["tiers"]}
        if "phones" not in tiers:
            return Alignment(utterance, path, reason=f"no tier phones; it has {', '.join(tiers) or 'none'}")
        spans = [_span(*span) for span in tiers["phones"]]
    except _WRONG as error:
        return Alignment(utterance, path, reason=f"not a complete TextGrid ({type(error).__name__}: {error})")
    # A tier covers its grid. praatio reads one that was cut between two intervals, too.
    if spans and spans[-1][1] < seconds - SHORTER / SAMPLE_RATE:
        return Alignment(utterance, path, reason=f"truncated at {spans[-1][1]} of {seconds} s")
    return Alignment(utterance, path, seconds, spans)


def _span(begin: Any, end: Any, phone: Any) -> tuple[float, float, str]:
    if not isinstance(phone, str) or "\n" in phone.strip():  # clients send names of phones as lines
        raise TypeError(f"{phone!r} is no phone")
    return float(begin), float(end), phone


def _montreal_json(utterance: str, path: Path) -> Alignment:
    """One utterance as the Montreal Forced Aligner writes it with ``--output_format json``."""
    try:
        whole = json.loads(files.read_text(path))
        seconds, spans, last = float(whole["end"]), [], 0.0
        for begin, end, phone in (_span(*span) for span in whole["tiers"]["phones"]["entries"]):
            if begin > last + 1e-3:  # the aligner leaves silences out of JSON; in TextGrids they are empty intervals
                spans.append((last, begin, ""))
            spans.append((begin, end, phone))
            last = end
        if spans and seconds > last + 1e-3:
            spans.append((last, seconds, ""))
        return Alignment(utterance, path, seconds, spans)
    except _WRONG as error:
        what = f"not JSON of the Montreal Aligner with a tier phones ({type(error).__name__}: {error})"
        return Alignment(utterance, path, reason=what)


def _json(path: Path, samples: dict[str, int]) -> Iterator[Alignment]:
    try:
        table = json.loads(files.read_text(path))
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise CorpusError(f"corpus.alignments: {path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise CorpusError(f"corpus.alignments: {path} is not a table of utterances")
    for utterance in sorted(table.keys() & samples.keys()):
        try:
            seconds, spans = table[utterance][:2]
            phones = [_span(begin, float(begin) + float(length), phone) for begin, length, phone in spans]
            yield Alignment(utterance, path, float(seconds), phones)
        except _WRONG:
            yield Alignment(utterance, path, reason="not [seconds, [[begin, duration, phone], …]]")
