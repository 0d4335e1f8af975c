"""The speech synthesiser behind the synthetic corpus: a program, ``python -I espeak.py VOICE SEED [PACKAGES]``.

eSpeak NG is GPL-3.0-or-later and keeps its state in globals, so nothing of it is loaded into the process of the
library. This file imports nothing of fedhubert either. A fresh process, a voice, a seed and a fixed order of texts make
eSpeak NG's output the same byte for byte; carrying on in a used process does not.

``VOICE`` is an eSpeak NG voice file. Each line of the input is ``[text, words per minute]`` as JSON. Each answer is a
JSON line, ``[samples, [[first sample, phone], ...]]``, then the samples: int16 at 22.05 kHz. Phones are the 39 ARPAbet
classes of the TIMIT/LibriSpeech tradition plus ``sil``; ``;`` palatalises the phone before it.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[3:]  # a folder of packages

import espeakng_loader  # noqa: E402

RATE = 22_050
RETRIEVAL = 1  # AUDIO_OUTPUT_RETRIEVAL: samples come to the callback, no sound card is opened
PHONEME_EVENTS = 0x0001
DONT_EXIT = 0x8000
UTF8 = 1
EVENT_END, EVENT_PHONEME = 0, 7

# eSpeak NG's mnemonics of English, without stress marks, to ARPAbet classes. A diphthong or r-coloured vowel that
# ARPAbet has no class for goes to the vowel it starts with.
ARPABET = {
    "AA": "A A: A2 A@ a: Q O2 0 02 A~", "AE": "a a@ aa & a/ a2", "AH": "V @ @2 a# @5 @L V2 @- V@ I# 8 @/",
    "AO": "O: O o@ O@ o: oo O3 o@r", "AW": "aU aU@ aU2 aU~", "AY": "aI aI2 aI@ aI3 aI@3", "B": "b", "CH": "tS",
    "D": "d d[", "DH": "D", "EH": "E e@ E2 E@ e E:", "ER": "3 3: 3r V3 @r IR VR 3:r", "EY": "eI e: e2", "F": "f",
    "G": "g", "HH": "h", "IH": "I I2 i@ i@3 I@ y", "IY": "i i: i2 i/ iI@", "JH": "dZ", "K": "k x", "L": "l l# L l/ -l",
    "M": "m m-", "N": "n n- n^", "NG": "N", "OW": "oU o oU# o# @U", "OY": "OI OI2 oI", "P": "p", "R": "r r/ r2 r- R R2",
    "S": "s", "SH": "S", "T": "t t# t2 t[ ? *", "TH": "T", "UH": "U U@ U2", "UW": "u: u U: u# uu", "V": "v",
    "W": "w w# w2", "Y": "j", "Z": "z z/ z#", "ZH": "Z", "sil": "_: _ _:: _! _| __ :", ";": ";",
}  # fmt: skip
FOLD = {mnemonic: phone for phone, mnemonics in ARPABET.items() for mnemonic in mnemonics.split()}


class _Event(ctypes.Structure):
    """espeak_EVENT: type, identifier, text position, length, audio position, sample, user data, id (a phoneme's)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("_unused", ctypes.c_int * 4),
        ("sample", ctypes.c_int),
        ("_user_data", ctypes.c_void_p),
        ("phoneme", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def main() -> None:
    """Answer every line of the input. eSpeak NG's state is global, so this process has one voice."""
    voice_file, seed = Path(sys.argv[1]), int(sys.argv[2])
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    chunks: list[bytes] = []
    mnemonics: list[tuple[int, str]] = []

    def call(function: str, *arguments: object) -> None:
        status = getattr(library, function)(*arguments)
        if status != 0:  # carrying on would speak with the voice set before
            raise RuntimeError(f"eSpeak NG: {function}{arguments} returned {status:#x}")

    @_CALLBACK
    def receive(samples: Any, count: int, events: Any) -> int:
        if count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        i = 0
        while events[i].type != EVENT_END:
            if events[i].type == EVENT_PHONEME:  # .phoneme ends at the first NUL: the rest of its 8 bytes is stale
                mnemonics.append((events[i].sample, events[i].phoneme.decode()))
            i += 1
        return 0

    data = os.fsencode(espeakng_loader.get_data_path())
    if (rate := library.espeak_Initialize(RETRIEVAL, 0, data, PHONEME_EVENTS | DONT_EXIT)) != RATE:
        raise RuntimeError(f"eSpeak NG started with {rate} where {RATE} Hz was expected")
    library.espeak_SetSynthCallback(receive)
    os.chdir(voice_file.parent)  # eSpeak NG takes at most 40 characters of path
    call("espeak_ng_SetVoiceByFile", os.fsencode(voice_file.name))
    call("espeak_ng_SetRandSeed", seed)
    for line in sys.stdin:
        text, words_per_minute = json.loads(line)
        chunks.clear()
        mnemonics.clear()
        call("espeak_SetParameter", 1, words_per_minute, 0)
        call("espeak_Synth", text.encode(), len(text.encode()) + 1, 0, 1, 0, UTF8, None, None)
        call("espeak_Synchronize")
        samples = b"".join(chunks)
        phones = [(sample, FOLD[mnemonic.lstrip("',%=") or "_"]) for sample, mnemonic in mnemonics]
        sys.stdout.buffer.write(json.dumps([len(samples) // 2, phones]).encode() + b"\n" + samples)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
