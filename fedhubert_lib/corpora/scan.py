"""What every audio file of a corpus holds, from its headers: parallel, and incremental over an earlier scan.

A file that is not 16 kHz mono speech of at least one frame, or that is not whole, comes back with the reason. FLAC
files are judged by their two ends (``flac``). A WAV file has no checksum; these are small (one second), so they are
read whole.
"""

import hashlib
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import soundfile

from fedhubert_lib import files
from fedhubert_lib.audio import RECEPTIVE_FIELD, SAMPLE_RATE
from fedhubert_lib.corpora import flac

SUFFIXES = (".flac", ".wav")
CHUNK = 256


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
    try:
        with open(path, "rb", buffering=0) as file:
            start = file.read(flac.HEADER_BYTES)
            if not start:
                return refused("empty file")
            if start[:4] == b"fLaC":
                found = _flac(start, file.fileno())
            elif start[:4] == b"RIFF":
                found = _wav(start + file.read())
            else:
                return refused("neither FLAC nor WAV")
    except OSError as error:
        return refused(f"cannot be read: {error.strerror}")
    return found._replace(reason=found.reason or _unfit(found))


def _unfit(found: Header) -> str:
    if found.sample_rate != SAMPLE_RATE:
        return f"{found.sample_rate} Hz, not {SAMPLE_RATE} Hz"
    if found.channels != 1:
        return f"{found.channels} channels, not mono"
    if found.samples < RECEPTIVE_FIELD:
        return f"shorter than one frame of {RECEPTIVE_FIELD} samples"
    return ""


def _flac(start: bytes, descriptor: int) -> Header:
    info = flac.stream_info(start)
    if info is None:
        return refused("truncated: no whole FLAC header")
    if info.samples == 0:
        return refused("FLAC header gives no length")
    size = os.fstat(descriptor).st_size
    begin = max(flac.HEADER_BYTES, size - info.largest_frame)
    whole = flac.ends_whole(os.pread(descriptor, size - begin, begin), info)
    reason = "" if whole else "truncated or damaged: does not end with the frame its header promises"
    return Header(info.samples, info.sample_rate, info.channels, info.md5, reason)


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
        samples, _ = soundfile.read(path, dtype="int16")
    except (soundfile.LibsndfileError, OSError) as error:
        return found._replace(reason=f"cannot be decoded: {error}")
    if len(samples) != found.samples:
        return found._replace(reason=f"decodes to {len(samples)} samples, its header promises {found.samples}")
    is_flac = path.endswith(".flac") and found.fingerprint != "0" * 32
    if is_flac and hashlib.md5(samples.tobytes(), usedforsecurity=False).hexdigest() != found.fingerprint:
        return found._replace(reason="damaged: the decoded audio is not what its header's MD5 says")
    return found


def walk(root: Path) -> list[tuple[str, int, int]]:
    """(path, size, modification time in ns) of every audio file below ``root``, in no particular order.

    Links are followed, but for those to a folder they are in. One that leads nowhere is listed with size -1.
    """
    found, folders = [], [str(root)]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIXES):
                    try:
                        status = entry.stat()
                        found.append((entry.path, status.st_size, status.st_mtime_ns))
                    except FileNotFoundError:
                        found.append((entry.path, -1, 0))
                elif entry.is_dir() and not (entry.is_symlink() and _contains(entry.path, folder)):
                    folders.append(entry.path)
    return found


def _contains(outer: str, inner: str) -> bool:
    return f"{os.path.realpath(inner)}/".startswith(f"{os.path.realpath(outer)}/")


def scan(
    roots: list[Path],
    cache: Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    *,
    decode: bool = False,
    threads: int = 8,
) -> pd.DataFrame:
    """The header of every audio file below ``roots``, in order of path; ``decode`` also decodes each in full.

    ``cache`` is a parquet file that an earlier scan left: a file whose size and modification time are the same as then
    is not opened again. The file is brought up to date. Threads wait for the disk while one of them parses.

    Returns columns path, size, modified (ns), samples, sample_rate, channels, fingerprint, reason, decoded.
    """
    rows = [row for root in roots for row in walk(root.absolute())]
    found = pd.DataFrame(rows, columns=["path", "size", "modified"]).astype({"size": "int64", "modified": "int64"})
    keys = ["path", "size", "modified"]
    known = pd.read_parquet(cache) if cache is not None and cache.exists() else None
    if known is not None:
        found = found.merge(known, on=keys, how="left")
        fresh = (found["decoded"].isna() | (decode & (found["decoded"] == False))).to_numpy(bool)  # noqa: E712
    else:
        fresh = np.ones(len(found), dtype=bool)
    if fresh.any():
        read = pd.DataFrame(
            _headers(found["path"].to_numpy()[fresh], on_progress, decode, threads), columns=Header._fields
        )
        new = found.loc[fresh, keys].reset_index(drop=True).join(read).assign(decoded=decode)
        found = pd.concat([found[~fresh], new]) if known is not None else new
    found = found.astype({"samples": "int64", "sample_rate": "int32", "channels": "int32", "decoded": "bool"})
    found = found.sort_values("path", ignore_index=True)
    if cache is not None and (known is None or fresh.any() or len(known) != len(found)):
        with files.atomic(cache) as temporary:
            found.to_parquet(temporary, index=False)
    return found


def _headers(
    paths: np.ndarray, on_progress: Callable[[str, int, int], None] | None, decode: bool, threads: int
) -> list[Header]:
    def read(chunk: np.ndarray) -> list[Header]:
        found = [header(path) for path in chunk]
        return [decoded(path, one) for path, one in zip(chunk, found, strict=True)] if decode else found

    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    rows: list[Header] = []
    flac.crc16(b"")  # builds its table once, before the threads would each
    with ThreadPoolExecutor(threads) as pool:
        for part in pool.map(read, chunks):
            rows += part
            if on_progress:
                on_progress("decode" if decode else "scan", len(rows), len(paths))
    return rows
