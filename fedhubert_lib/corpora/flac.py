"""What a FLAC file says of itself at its two ends (RFC 9639), without decoding it.

STREAMINFO, at the start, gives rate, channels, number of samples and the MD5 of the decoded audio. The last frame's
header gives its position in the recording, and its CRC-16 covers every byte up to the end of the file: if both agree
with STREAMINFO, nothing is missing at the end. A whole corpus is checked for truncation so in the time it takes to
open its files. Damage in the middle shows only when the file is decoded.
"""

import functools
from typing import NamedTuple

import numpy as np

HEADER_BYTES = 42
LARGEST_FRAME = 1 << 17
"""Where STREAMINFO does not give the largest frame: no mono frame of 65,535 samples at 16 bits is larger."""


class StreamInfo(NamedTuple):
    block: int
    largest_frame: int
    sample_rate: int
    channels: int
    samples: int
    md5: str
    """Of the decoded samples, hexadecimal; zeros where the encoder left it out."""


def stream_info(start: bytes) -> StreamInfo | None:
    """STREAMINFO from the first 42 bytes of a file, or None where they are not a FLAC header."""
    if len(start) < HEADER_BYTES or start[:4] != b"fLaC" or start[4] & 0x7F != 0:
        return None
    bits = int.from_bytes(start[18:26], "big")
    return StreamInfo(
        block=int.from_bytes(start[10:12], "big"),
        largest_frame=int.from_bytes(start[15:18], "big") or LARGEST_FRAME,
        sample_rate=bits >> 44,
        channels=(bits >> 41 & 7) + 1,
        samples=bits & (1 << 36) - 1,
        md5=start[26:42].hex(),
    )


def ends_whole(tail: bytes, info: StreamInfo) -> bool:
    """Whether ``tail``, the last ``info.largest_frame`` bytes of a file or more, ends with its whole last frame."""
    at = len(tail)
    while (at := max(tail.rfind(b"\xff\xf8", 0, at), tail.rfind(b"\xff\xf9", 0, at))) >= 0:
        if _frame_end(tail[at : at + 16], info) == info.samples and crc16(tail[at:]) == 0:
            return True
    return False


def _frame_end(header: bytes, info: StreamInfo) -> int | None:
    """The recording's sample at which the frame with this header ends; None where it is not a frame header."""
    if len(header) < 6:
        return None
    number, at = _coded_number(header, 4)
    code = header[2] >> 4
    if code == 1:
        block = 192
    elif 2 <= code <= 5:
        block = 576 << code - 2
    elif code in (6, 7):
        block, at = int.from_bytes(header[at : at + code - 5], "big") + 1, at + code - 5
    elif code >= 8:
        block = 256 << code - 8
    else:
        return None
    at += {12: 1, 13: 2, 14: 2}.get(header[2] & 0xF, 0)
    if at >= len(header) or _crc8(header[:at]) != header[at]:
        return None
    first = number if header[1] == 0xF9 else number * info.block  # variable block size: the number is the sample's
    return first + block


def _coded_number(header: bytes, at: int) -> tuple[int, int]:
    """A number coded like UTF-8, of up to 36 bits, and where it ends."""
    first = header[at]
    ones = 8 - (first ^ 0xFF).bit_length()
    number = first & (0x7F >> ones)
    end = at + max(1, ones)
    for byte in header[at + 1 : end]:
        number = number << 6 | byte & 0x3F
    return number, end


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x107) if crc & 0x80 else crc << 1
    return crc


def crc16(data: bytes) -> int:
    """FLAC's CRC-16 (x^16 + x^15 + x^2 + 1, from zero); zero over a frame that carries its own.

    A CRC is linear: what a byte adds depends only on its value and its distance from the end. One look-up and an
    exclusive or over all bytes, instead of a loop.
    """
    size = 1 << max(14, (len(data) - 1).bit_length())
    table, row = _crc16_table(size)
    return int(np.bitwise_xor.reduce(table.take(row[size - len(data) :] + np.frombuffer(data, np.uint8))))


@functools.cache
def _crc16_table(size: int) -> tuple[np.ndarray, np.ndarray]:
    """What byte value b contributes when it stands ``size - i`` bytes before the end, as uint16 at row[i] + b."""
    last = np.arange(256, dtype=np.uint16) << 8
    for _ in range(8):
        last = np.where(last & 0x8000, last << 1 ^ 0x8005, last << 1).astype(np.uint16)
    table = np.empty((size, 256), dtype=np.uint16)
    table[-1] = last
    for i in range(size - 2, -1, -1):  # one more byte, a zero, behind it
        table[i] = table[i + 1] << 8 ^ last[table[i + 1] >> 8]
    return table.ravel(), np.arange(0, 256 * size, 256)
