"""Headers and ends of all files of a corpus: read in parallel, and incrementally over a scan that was killed.

A file that is not audio, not 16 kHz mono speech of at least one frame, or truncated comes back with the reason. Of a
FLAC file the header and the last sample are read, which libsndfile finds in a complete file only; damage in the middle
shows when it is decoded. A WAV file has no checksum, and is always decoded, a stretch at a time.
"""

import hashlib
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pandas as pd
import soundfile

from fedhubert_lib import files, folders
from fedhubert_lib.audio import RECEPTIVE_FIELD, SAMPLE_RATE
from fedhubert_lib.corpora.archives import Progress
from fedhubert_lib.corpora.librispeech import CorpusError

CHUNK = 256
"""Files that one thread reads before the next ones are handed out."""
THREADS = 8
SAVE_EVERY = 60.0
"""Seconds after which what was read is saved, so that a scan that is killed resumes from there."""
SUFFIXES = (".flac", ".wav")
NO_LENGTH = "WAV header gives no length: it was written to a pipe, or its writer was stopped; convert it to a file"
FLAC_HEADER = 42
"""Bytes of the mark and of STREAMINFO (RFC 9639), which ends with the MD5 of the decoded samples."""
FLAC_BYTES = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}
"""Bytes per sample under that MD5."""
BLOCK = 2**20
"""Samples that are decoded at once: an hour of speech is not held in memory."""
LOUDEST = 8.0
"""Sample of a float WAV file beyond which it is no clipped speech of [-1, 1], but of another scale."""
QUIETEST = 2.0**-16
"""Peak up to which a WAV file of other than 16 bits holds 16 bit values that were not scaled up; 0 is silence."""
KEYS = ["path", "size", "modified"]
TYPES = {"samples": "int64", "sample_rate": "int32", "fingerprint": "str", "reason": "str", "decoded": "bool"}
UNREADABLE = "cannot be read"
"""Start of a reason that may vanish though the file has not changed: such a file is read again."""


class Header(NamedTuple):
    """A file's header. ``reason`` is empty for a file that can be used."""

    samples: int = 0
    sample_rate: int = 0
    fingerprint: str = ""
    """Of the audio alone: the FLAC header's MD5 of the samples, or BLAKE2b of a WAV file's samples."""
    reason: str = ""


def header(path: str, decode: bool = False) -> Header:
    """Of a WAV file all is read, of a FLAC file the ends or, to ``decode``, all. What is wrong is the ``reason``."""
    if not path.lower().endswith(SUFFIXES):
        return Header(reason="neither .flac nor .wav")
    try:
        with open(path, "rb", buffering=0, opener=files.at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return Header(reason="not a plain file")
            start = file.read(FLAC_HEADER)
            if reason := _unlike_audio(start, status.st_size):
                return Header(reason=reason)
            if start[:4] == b"RIFF" and (reason := _cut_wav(file, status.st_size)):
                return Header(reason=reason)
            try:
                with soundfile.SoundFile(path) as sound:
                    fingerprint, reason = _flac(sound, start, decode) if start[:4] == b"fLaC" else _wav(sound)
                    return Header(sound.frames, sound.samplerate, fingerprint, reason)
            except soundfile.SoundFileError as error:
                file.readall()  # a disk that fails looks like damage: it says so here
                return Header(reason=f"truncated or damaged: {error}")
    except OSError as error:
        return Header(reason=f"{UNREADABLE}: {error.strerror}")


def _unlike_audio(start: bytes, size: int) -> str:
    """Why the first bytes of a file of ``size`` bytes are no audio file's, or nothing."""
    if not start:
        return "empty file"
    if start[:4] == b"RIFF":
        if start[4:8] == b"\xff\xff\xff\xff":
            return NO_LENGTH
        promised = int.from_bytes(start[4:8], "little") + 8
        return f"truncated: {size} of {promised} bytes" if size < promised else ""
    if start[:4] != b"fLaC":
        return "neither FLAC nor WAV"
    if len(start) < FLAC_HEADER or start[4] & 0x7F != 0:
        return "truncated: no complete FLAC header"
    return "" if int.from_bytes(start[18:26], "big") & (1 << 36) - 1 else "FLAC header gives no length"


def _cut_wav(file: BinaryIO, size: int) -> str:
    """Why the samples of a WAV file of ``size`` bytes are not all there, or nothing: libsndfile takes what is there."""
    place = 12
    while len(chunk := os.pread(file.fileno(), 8, place)) == 8:
        length, place = int.from_bytes(chunk[4:], "little"), place + 8
        if chunk[:4] == b"data":
            if length == 0xFFFFFFFF or length == 0 < size - place:
                return NO_LENGTH
            return f"truncated: {size - place} of {length} bytes of samples" if size - place < length else ""
        place += length + length % 2
    return ""


def _flac(file: soundfile.SoundFile, start: bytes, decode: bool) -> tuple[str, str]:
    """Fingerprint and reason."""
    fingerprint, reason = start[26:].hex(), _unfit(file)
    if not reason:
        file.seek(0 if decode else file.frames - 1)
        decoded, count, width = hashlib.md5(usedforsecurity=False), 0, FLAC_BYTES.get(file.subtype, 0)
        for samples in file.blocks(BLOCK, dtype="int32"):
            # The MD5 is that of samples of their width; libsndfile puts them to the upper end of 32 bits.
            decoded.update(samples.astype("<i4").view(np.uint8).reshape(-1, 4)[:, 4 - width :].tobytes())
            count += len(samples)
        if count != (file.frames if decode else 1):
            reason = f"truncated or damaged: does not end with sample {file.frames}, as its header promises"
        elif decode and width and int(fingerprint, 16) and decoded.hexdigest() != fingerprint:
            reason = "damaged: the decoded audio is not what its header's MD5 says"
    return fingerprint, reason


def _wav(file: soundfile.SoundFile) -> tuple[str, str]:
    """Fingerprint and reason."""
    if not file.seekable():  # GSM 6.10, G.721
        return "", f"{file.subtype} cannot be read from its middle; convert it to PCM_16"
    fingerprint, peak, whole = hashlib.blake2b(digest_size=16), 0.0, file.subtype == "PCM_16"
    for samples in file.blocks(BLOCK, dtype="int16" if whole else "float32"):
        fingerprint.update(samples.tobytes())
        peak = peak if whole else np.abs(samples).max(initial=peak)  # NaN stays NaN
    reason = _unfit(file) or ("" if np.isfinite(peak) else "NaN or infinite samples")
    if not reason and not (whole or peak == 0 or QUIETEST < peak <= LOUDEST):
        reason = f"samples up to {peak:.4g}: not scaled to [-1, 1]"
    return fingerprint.hexdigest(), reason


def flac_md5(path: str) -> str:
    """The MD5 that a FLAC file of the same samples, rounded to 16 bits, has in its header."""
    decoded = hashlib.md5(usedforsecurity=False)
    with soundfile.SoundFile(path) as file:
        for samples in file.blocks(BLOCK, dtype="float64"):
            decoded.update((samples * 2**15).round().clip(-(2**15), 2**15 - 1).astype("<i2").tobytes())
    return decoded.hexdigest()


def _unfit(file: soundfile.SoundFile) -> str:
    if file.samplerate != SAMPLE_RATE:
        return f"{file.samplerate} Hz, not {SAMPLE_RATE} Hz"
    if file.channels != 1:
        return f"{file.channels} channels, not mono"
    return f"shorter than one frame of {RECEPTIVE_FIELD} samples" if file.frames < RECEPTIVE_FIELD else ""


def listing(root: Path) -> list[tuple[str, int, int]]:
    """(path, size, modification time in ns) of every file below ``root``, in no particular order; links are followed.

    A link that leads nowhere has size -1. Raises CorpusError at a name that is not text: no table could hold it.
    """
    rows = []
    for entry in folders.walk(root):
        try:
            entry.path.encode()
            status = entry.stat()
            rows.append((entry.path, status.st_size, status.st_mtime_ns))
        except UnicodeEncodeError as error:
            raise CorpusError(f"{os.fsencode(entry.path)!r} is not UTF-8; rename or remove that file") from error
        except OSError:  # header says which
            rows.append((entry.path, -1, 0))
    return rows


def scan(
    roots: list[Path],
    cache: Path | None = None,
    on_progress: Progress = lambda *_: None,
    *,
    decode: bool = False,
) -> pd.DataFrame:
    """The header of every file below ``roots``, in order of path; ``decode`` also decodes each in full.

    ``cache`` is a parquet file that an earlier scan left, complete or not: a file whose size and modification time are
    the same as then is not opened again. The cache is brought up to date. Threads wait for the disk while one of them
    parses.

    Returns columns path, size, modified (ns), samples, sample_rate, fingerprint, reason, decoded.
    """
    rows = [row for root in roots for row in listing(root.absolute())]
    table = pd.DataFrame(sorted(rows), columns=KEYS).astype({"size": "int64", "modified": "int64"})
    cached = pd.read_parquet(cache) if cache and cache.exists() else _table(table[:0], [], decode)
    usable = ~cached["reason"].str.startswith(UNREADABLE) & (cached["decoded"] | (not decode))
    table = table.merge(cached.loc[usable, [*KEYS, *TYPES]], on=KEYS, how="left")
    unread = table["decoded"].isna()
    before, todo = table[~unread].astype(TYPES), table.loc[unread, KEYS]
    headers: list[Header] = []

    def read_so_far() -> pd.DataFrame:
        result = pd.concat([before, _table(todo, headers, decode)]).sort_values("path", ignore_index=True)
        if cache:
            with files.atomic(cache) as temporary:
                result.to_parquet(temporary, index=False)
        return result

    chunks = [todo["path"].iloc[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    saved = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for chunk in pool.map(lambda paths: [header(path, decode) for path in paths], chunks):
            headers += chunk
            on_progress("decode" if decode else "scan", len(headers), len(todo))
            if time.monotonic() > saved + SAVE_EVERY:
                read_so_far()
                saved = time.monotonic()
    return read_so_far()


def _table(todo: pd.DataFrame, headers: list[Header], decode: bool) -> pd.DataFrame:
    """The first rows of ``todo`` with their headers, of as many as were read."""
    read = pd.DataFrame(headers, columns=Header._fields, index=todo.index[: len(headers)])
    return todo[: len(headers)].join(read).assign(decoded=decode).astype(TYPES)
