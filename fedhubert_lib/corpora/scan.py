"""What every file of a corpus holds, from its headers: parallel, and incremental over an earlier scan.

A file that is no audio, not 16 kHz mono speech of at least one frame, or that is not whole, comes back with the reason.
FLAC files are judged by their two ends: STREAMINFO and the last sample, which libsndfile finds in a whole file only.
Damage in the middle shows when a file is decoded. A WAV file has no checksum; these are small (one second), so they are
read whole.
"""

import hashlib
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import soundfile

from fedhubert_lib import files
from fedhubert_lib.audio import RECEPTIVE_FIELD, SAMPLE_RATE
from fedhubert_lib.corpora.librispeech import CorpusError

SUFFIXES = (".flac", ".wav")
CHUNK = 256
FLAC_HEADER = 42
"""Bytes of the mark and of STREAMINFO (RFC 9639), which ends with the MD5 of the decoded samples."""
FLAC_BYTES = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}
SAVE_EVERY = 60.0
"""Seconds after which what was read is saved, so that a scan that is killed goes on from there."""


KEYS = ["path", "size", "modified"]
TYPES = {
    "samples": "int64", "sample_rate": "int32", "channels": "int32", "fingerprint": "str", "reason": "str",
    "decoded": "bool",
}  # fmt: skip
UNREADABLE = "cannot be read"
"""What a reason begins with that may be gone though the file has not changed: it is looked at again."""


class Header(NamedTuple):
    """What a file says of itself. ``reason`` is empty for a file that can be used."""

    samples: int
    sample_rate: int
    channels: int
    fingerprint: str
    """Of the audio alone: the FLAC header's MD5 of the samples, or BLAKE2b of a WAV file's data."""
    reason: str


def refused(reason: str) -> Header:
    return Header(0, 0, 0, "", reason)


def header(path: str) -> Header:
    """Read the ends of one FLAC file, or one WAV file. What is wrong with the file is the ``reason``, not an error."""
    if not path.lower().endswith(SUFFIXES):
        return refused("neither .flac nor .wav")
    try:
        with open(path, "rb", buffering=0, opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return refused("not a plain file")
            start = file.read(FLAC_HEADER)
            if not start:
                return refused("empty file")
            if start[:4] == b"fLaC":
                found = _flac(start, path)
                if found.reason:
                    file.readall()  # a disk that fails looks like damage: it says so here
            elif start[:4] == b"RIFF":
                found = _wav(start + file.read())
            else:
                return refused("neither FLAC nor WAV")
    except OSError as error:
        return refused(f"{UNREADABLE}: {error.strerror}")
    return found._replace(reason=found.reason or _unfit(found))


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # not to wait for ever at a pipe that is called .flac


def _unfit(found: Header) -> str:
    if found.sample_rate != SAMPLE_RATE:
        return f"{found.sample_rate} Hz, not {SAMPLE_RATE} Hz"
    if found.channels != 1:
        return f"{found.channels} channels, not mono"
    if found.samples < RECEPTIVE_FIELD:
        return f"shorter than one frame of {RECEPTIVE_FIELD} samples"
    return ""


def _flac(start: bytes, path: str) -> Header:
    if len(start) < FLAC_HEADER or start[4] & 0x7F != 0:
        return refused("truncated: no whole FLAC header")
    if not (samples := int.from_bytes(start[18:26], "big") & (1 << 36) - 1):
        return refused("FLAC header gives no length")
    try:
        with soundfile.SoundFile(path) as file:
            file.seek(samples - 1)
            if len(file.read(1, dtype="int32")):
                return Header(samples, file.samplerate, file.channels, start[26:FLAC_HEADER].hex(), "")
    except soundfile.SoundFileError:
        pass
    return refused("truncated or damaged: does not end with the frame its header promises")


def _wav(content: bytes) -> Header:
    tag = channels = rate = bits = 0
    at = 12
    while at + 8 <= len(content):
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        body = at + 8
        if name == b"fmt " and body + 16 <= len(content):
            tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content, body)
            if tag == 0xFFFE and body + 26 <= len(content):  # WAVE_FORMAT_EXTENSIBLE: the real tag stands later
                (tag,) = struct.unpack_from("<H", content, body + 24)
        elif name == b"data":
            width = channels * bits // 8
            if not width:
                return refused("WAV header without a format")
            if body + size > len(content):
                return refused(f"truncated: {len(content) - body} of {size} bytes of audio")
            if tag == 3 and bits in (32, 64):  # floating point: the only form that can hold NaN
                values = np.frombuffer(content, f"<f{bits // 8}", size // (bits // 8), body)
                if not np.isfinite(values).all():
                    return refused("NaN or infinite samples")
            digest = hashlib.blake2b(content[body : body + size], digest_size=16).hexdigest()
            return Header(size // width, rate, channels, digest, "")
        at = body + size + size % 2
    return refused("truncated: no audio in the WAV file")


def decoded(path: str, found: Header) -> Header:
    """Decode the whole file; the reason, if its header had none, says what then came out wrong."""
    if found.reason:
        return found
    try:
        with soundfile.SoundFile(path) as file:
            samples, width = file.read(dtype="int32"), FLAC_BYTES.get(file.subtype)
    except (soundfile.LibsndfileError, OSError) as error:
        return found._replace(reason=f"cannot be decoded: {error}")
    if len(samples) != found.samples:
        return found._replace(reason=f"decodes to {len(samples)} samples, its header promises {found.samples}")
    if width and path.lower().endswith(".flac") and found.fingerprint != "0" * 32:
        # The MD5 is that of the samples in their own width; libsndfile puts them to the upper end of 32 bits.
        own = samples.astype("<i4").view(np.uint8).reshape(-1, 4)[:, 4 - width :]
        if hashlib.md5(own.tobytes(), usedforsecurity=False).hexdigest() != found.fingerprint:
            return found._replace(reason="damaged: the decoded audio is not what its header's MD5 says")
    return found


def listing(root: Path) -> list[tuple[str, int, int]]:
    """(path, size, modification time in ns) of every file below ``root``, in no particular order; links are followed.

    A link that leads nowhere has size -1. Raises CorpusError at a name that is no text: no table could hold it.
    """
    rows = []
    for entry in files.walk(root):
        if not _is_text(entry.path):
            raise CorpusError(f"{os.fsencode(entry.path)!r} is not UTF-8; rename or remove that file")
        try:
            status = entry.stat()
            rows.append((entry.path, status.st_size, status.st_mtime_ns))
        except OSError:  # header says which
            rows.append((entry.path, -1, 0))
    return rows


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def scan(
    roots: list[Path],
    cache: Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    *,
    decode: bool = False,
    threads: int = 8,
) -> pd.DataFrame:
    """The header of every file below ``roots``, in order of path; ``decode`` also decodes each in full.

    ``cache`` is a parquet file that an earlier scan left, whole or not: a file whose size and modification time are the
    same as then is not opened again. The file is brought up to date. Threads wait for the disk while one of them
    parses.

    Returns columns path, size, modified (ns), samples, sample_rate, channels, fingerprint, reason, decoded.
    """
    rows = [row for root in roots for row in listing(root.absolute())]
    listed = pd.DataFrame(rows, columns=KEYS).astype({"size": "int64", "modified": "int64"})
    listed = listed.sort_values("path", ignore_index=True)
    known = pd.read_parquet(cache) if cache is not None and cache.exists() else _table(listed[:0], [], decode)
    usable = ~known["reason"].str.startswith(UNREADABLE) & (known["decoded"] | (not decode))
    found = listed.merge(known[usable], on=KEYS, how="left")
    fresh = found["decoded"].isna().to_numpy()
    found, listed = found[~fresh].astype(TYPES), listed[fresh]
    read: list[Header] = []
    saved = time.monotonic()
    for part in _headers(listed["path"].to_numpy(), decode, threads):
        read += part
        if on_progress:
            on_progress("decode" if decode else "scan", len(read), len(listed))
        if cache is not None and time.monotonic() > saved + SAVE_EVERY:
            _save(cache, pd.concat([found, _table(listed, read, decode)]))
            saved = time.monotonic()
    found = pd.concat([found, _table(listed, read, decode)]).sort_values("path", ignore_index=True)
    if cache is not None and (read or len(known) != len(found) or not cache.exists()):
        _save(cache, found)
    return found


def _table(listed: pd.DataFrame, read: list[Header], decode: bool) -> pd.DataFrame:
    """The first rows of ``listed`` with their headers, of as many as were read."""
    headers = pd.DataFrame(read, columns=Header._fields, index=listed.index[: len(read)])
    return listed[: len(read)].join(headers).assign(decoded=decode).astype(TYPES)


def _save(cache: Path, table: pd.DataFrame) -> None:
    with files.atomic(cache) as temporary:
        table.to_parquet(temporary, index=False)


def _headers(paths: np.ndarray, decode: bool, threads: int) -> Iterator[list[Header]]:
    def read(chunk: np.ndarray) -> list[Header]:
        found = [header(path) for path in chunk]
        return [decoded(path, one) for path, one in zip(chunk, found, strict=True)] if decode else found

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(read, [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)])
