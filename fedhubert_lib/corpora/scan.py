"""What an audio file holds, read from its header alone: fast enough to look at every file of LibriSpeech.

A FLAC file opens with STREAMINFO (RFC 9639, section 8.2): rate, channels, number of samples and the MD5 of the decoded
audio, which serves as the file's fingerprint. A WAV file has no checksum; these are small (one second), so they are
read whole. Every file that is not 16 kHz mono speech of at least one frame comes back with the reason.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fedhubert_lib import files
from fedhubert_lib.audio import RECEPTIVE_FIELD, SAMPLE_RATE

SUFFIXES = (".flac", ".wav")
CHUNK = 512


class Header(NamedTuple):
    """What a file says of itself. ``reason`` is empty for a file that can be used."""

    samples: int
    sample_rate: int
    channels: int
    fingerprint: str
    reason: str


def refused(reason: str) -> Header:
    return Header(0, 0, 0, "", reason)


def header(path: str) -> Header:
    """Read the header of one FLAC or WAV file. Never raises: what is wrong is the ``reason``."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return refused("empty file")
            start = file.read(42)
            if start[:4] == b"fLaC":
                found = _flac(start)
            elif start[:4] == b"RIFF":
                found = _wav(start + file.read())
            else:
                found = refused("neither FLAC nor WAV")
    except OSError as error:
        return refused(f"cannot be read: {error.strerror}")
    return found._replace(reason=found.reason or _unfit(found))


def _unfit(found: Header) -> str:
    if found.sample_rate != SAMPLE_RATE:
        return f"{found.sample_rate} Hz, not {SAMPLE_RATE} Hz"
    if found.channels != 1:
        return f"{found.channels} channels, not mono"
    if found.samples < RECEPTIVE_FIELD:
        return f"{found.samples} samples: shorter than one frame of {RECEPTIVE_FIELD}"
    return ""


def _flac(start: bytes) -> Header:
    if len(start) < 42 or start[4] & 0x7F != 0:
        return refused("truncated: no whole FLAC header")
    bits = int.from_bytes(start[18:26], "big")
    samples = bits & (1 << 36) - 1
    if samples == 0:
        return refused("FLAC header gives no length")
    return Header(samples, bits >> 44, (bits >> 41 & 7) + 1, start[26:42].hex(), "")


def _wav(content: bytes) -> Header:
    tag = channels = rate = bits = 0
    at = 12
    while at + 8 <= len(content):
        name, size = (
            content[at : at + 4],
            int.from_bytes(content[at + 4 : at + 8], "little"),
        )
        body = at + 8
        if name == b"fmt " and body + 16 <= len(content):
            tag, channels, rate, _, _, bits = struct.unpack_from(
                "<HHIIHH", content, body
            )
            if tag == 0xFFFE and body + 26 <= len(
                content
            ):  # WAVE_FORMAT_EXTENSIBLE: the real tag stands later
                (tag,) = struct.unpack_from("<H", content, body + 24)
        elif name == b"data":
            if not channels or not bits:
                return refused("WAV header without a format")
            if body + size > len(content):
                return refused(
                    f"truncated: {len(content) - body} of {size} bytes of audio"
                )
            if tag == 3 and bits in (
                32,
                64,
            ):  # floating point: the only form that can hold NaN
                values = np.frombuffer(
                    content, f"<f{bits // 8}", size // (bits // 8), body
                )
                if not np.isfinite(values).all():
                    return refused("NaN or infinite samples")
            digest = hashlib.blake2b(
                content[body : body + size], digest_size=16
            ).hexdigest()
            return Header(size // (channels * bits // 8), rate, channels, digest, "")
        at = body + size + size % 2
    return refused("truncated: no audio in the WAV file")


def walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """(path, size, modification time in ns) of every audio file below ``root``, in sorted order within a folder."""
    with os.scandir(root) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_dir():
            yield from walk(Path(entry.path))
        elif entry.name.endswith(SUFFIXES):
            status = entry.stat()
            yield entry.path, status.st_size, status.st_mtime_ns


def scan(
    roots: list[Path],
    cache: Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    threads: int = 8,
) -> pd.DataFrame:
    """The header of every audio file below ``roots``.

    ``cache`` is a parquet file of an earlier scan: a file whose size and modification time have not changed since is
    not opened again. It is written anew. Threads wait for the disk while one of them parses.

    Returns columns path, size, modified, samples, sample_rate, channels, fingerprint, reason.
    """
    found = pd.DataFrame(
        [row for root in roots for row in walk(root.absolute())],
        columns=["path", "size", "modified"],
    ).astype({"size": "int64", "modified": "int64"})
    keys = ["path", "size", "modified"]
    if cache is not None and cache.exists():
        found = found.merge(pd.read_parquet(cache), on=keys, how="left", sort=False)
        fresh = found["reason"].isna().to_numpy()
    else:
        fresh = np.ones(len(found), dtype=bool)
    if fresh.any():
        paths = found["path"].to_numpy()[fresh]
        read = pd.DataFrame(
            _headers(paths, on_progress, threads),
            columns=Header._fields,
            index=np.flatnonzero(fresh),
        )
        kept = found.loc[~fresh] if "reason" in found else found.iloc[:0]
        found = pd.concat([kept, found.loc[fresh, keys].join(read)]).sort_index()
    counts = {"samples": "int64", "sample_rate": "int32", "channels": "int32"}
    found = found.astype(counts)
    if cache is not None:
        with files.atomic(cache) as temporary:
            found.to_parquet(temporary, index=False)
    return found


def _headers(
    paths: np.ndarray, on_progress: Callable[[str, int, int], None] | None, threads: int
) -> list[Header]:
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    rows: list[Header] = []
    with ThreadPoolExecutor(threads) as pool:
        for part in pool.map(lambda chunk: [header(path) for path in chunk], chunks):
            rows += part
            if on_progress:
                on_progress("scan", len(rows), len(paths))
    return rows
