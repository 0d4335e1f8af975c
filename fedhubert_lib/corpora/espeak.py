"""The speech synthesiser behind the synthetic corpus: a separate program, run as ``python -I espeak.py JOB``.

eSpeak NG is GPL-3.0-or-later and keeps its state in globals, so nothing of it is loaded into the process of the
library. This file imports nothing of fedhubert either: it reads a job (a JSON file, see below), forks one fresh
process per speaker, and writes one JSON line per finished speaker to its output. A fresh process, a seed and a fixed
order of utterances make eSpeak NG's output the same byte for byte; carrying on in a used process does not.

A job is ``{"workers": n, "speakers": [...]}``; a speaker is::

    {"folder": where its audio goes,    "notes": path of what else it writes, without suffix,
     "voice": an eSpeak NG voice file,  "seed": 31-bit seed,
     "rate": words per minute,          "noise": RMS of the recording's noise,
     "peak": of the loudest sample,     "seconds": length to stop at, or null,
     "clip_samples": cut or pad every clip to this, or null,
     "utterances": [{"path": file name below folder, "text": ..., "rate": factor}, ...]}

Notes are the voice file, ``NOTES.txt``, and ``NOTES.json``: ``{path: [samples, [[start, end, phone], ...]]}``, in
samples at 16 kHz. Phones are folded to the 39 ARPAbet classes of the TIMIT/LibriSpeech tradition plus ``sil``.
"""

import ctypes
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np
import soundfile
from scipy.signal import resample_poly

RATE_IN, RATE_OUT = 22_050, 16_000
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
    "W": "w w# w2", "Y": "j", "Z": "z z/ z#", "ZH": "Z", "sil": "_: _ _:: _! _| __ :",
}  # fmt: skip
FOLD = {mnemonic: phone for phone, mnemonics in ARPABET.items() for mnemonic in mnemonics.split()}


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    """espeak_EVENT: type, identifier, text position, length, audio position, sample, user data, id."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("_unused", ctypes.c_int * 4),
        ("sample", ctypes.c_int),
        ("_user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def fold(mnemonic: str) -> str:
    """The ARPAbet class of one of eSpeak NG's phoneme mnemonics; stress marks are ignored. Unknown: KeyError."""
    return FOLD[mnemonic.lstrip("',%=") or "_"]


class Synthesiser:
    """eSpeak NG in this process with one voice: call it with a text. One per process, since its state is global."""

    def __init__(self, voice_file: Path, seed: int) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = os.fsencode(espeakng_loader.get_data_path())
        rate = self._library.espeak_Initialize(RETRIEVAL, 0, data, PHONEME_EVENTS | DONT_EXIT)
        if rate != RATE_IN:
            raise RuntimeError(f"eSpeak NG started with {rate} where {RATE_IN} Hz was expected")
        self._chunks: list[bytes] = []
        self._events: list[tuple[int, str]] = []
        self._callback = _CALLBACK(self._receive)  # kept, or it would be collected while the library still calls it
        self._library.espeak_SetSynthCallback(self._callback)
        os.chdir(voice_file.parent)  # eSpeak NG takes at most 40 characters of path
        self._check("espeak_ng_SetVoiceByFile", os.fsencode(voice_file.name))
        self._check("espeak_ng_SetRandSeed", seed)

    def _check(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:  # carrying on would speak with the voice set before
            raise RuntimeError(f"eSpeak NG: {function}{arguments} returned {status:#x}")

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        i = 0
        while events[i].type != EVENT_END:
            if events[i].type == EVENT_PHONEME:  # .string ends at the first NUL: the rest of its 8 bytes is stale
                self._events.append((events[i].sample, events[i].id.string.decode()))
            i += 1
        return 0

    def __call__(self, text: str, words_per_minute: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """Samples (int16 at 22.05 kHz) and (first sample, mnemonic) of each phone."""
        self._chunks, self._events = [], []
        self._check("espeak_SetParameter", 1, words_per_minute, 0)
        raw = text.encode()
        self._check("espeak_Synth", raw, len(raw) + 1, 0, 1, 0, UTF8, None, None)
        self._check("espeak_Synchronize")
        return np.frombuffer(b"".join(self._chunks), dtype=np.int16), self._events


def phones(events: list[tuple[int, str]], total: int) -> list[list]:
    """``[[start, end, phone], ...]`` at 16 kHz from phone starts at 22.05 kHz; neighbours of one class are joined."""
    starts = [min(total, round(sample * RATE_OUT / RATE_IN)) for sample, _ in events]
    spans: list[list] = []
    if starts and starts[0] > 0:
        spans.append([0, starts[0], "sil"])
    for (_, mnemonic), start, end in zip(events, starts, [*starts[1:], total], strict=True):
        phone = spans[-1][2] if mnemonic == ";" else fold(mnemonic)  # ; only says: palatalise what went before
        if end <= start:  # eSpeak NG marks some pauses of no length
            continue
        if spans and spans[-1][2] == phone:
            spans[-1][1] = end
        else:
            spans.append([start, end, phone])
    return spans


def speak(speaker: dict) -> None:
    """Synthesise one speaker, in a fresh process."""
    folder = Path(speaker["folder"])
    voice_file = Path(speaker["notes"] + ".txt")
    voice_file.write_text(speaker["voice"], encoding="utf-8")
    say = Synthesiser(voice_file, speaker["seed"])
    rng = np.random.Generator(np.random.PCG64(speaker["seed"]))
    limit = math.inf if speaker["seconds"] is None else speaker["seconds"] * RATE_OUT
    times: dict[str, list] = {}
    total = 0
    for utterance in speaker["utterances"]:
        if total >= limit:
            break
        spoken, events = say(utterance["text"], round(speaker["rate"] * utterance["rate"]))
        waveform = resample_poly(spoken / 32_768, 320, 441)
        spans = phones(events, len(waveform))
        if speaker["clip_samples"]:
            waveform, spans = _clip(waveform, spans, speaker["clip_samples"])
        waveform *= speaker["peak"] / np.abs(waveform).max()
        waveform += rng.normal(0, speaker["noise"], len(waveform))
        path = folder / utterance["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, (waveform * 32_767).round().astype(np.int16), RATE_OUT, subtype="PCM_16")
        times[utterance["path"]] = [len(waveform), spans]
        total += len(waveform)
    if limit != math.inf and total < limit:
        raise RuntimeError(f"{folder}: text for {total / RATE_OUT:.0f} of {speaker['seconds']:.0f} seconds only")
    Path(speaker["notes"] + ".json").write_text(json.dumps(times), encoding="utf-8")


def _clip(waveform: np.ndarray, spans: list[list], samples: int) -> tuple[np.ndarray, list[list]]:
    """Centre the voiced part in exactly ``samples`` samples, as the one-second clips of Speech Commands."""
    voiced = [span for span in spans if span[2] != "sil"]
    begin, end = voiced[0][0], voiced[-1][1]
    end = min(end, begin + samples)
    lead = (samples - (end - begin)) // 2
    clip = np.zeros(samples)
    clip[lead : lead + end - begin] = waveform[begin:end]
    shift = lead - begin
    moved = [[a + shift, min(b, end) + shift, phone] for a, b, phone in spans if a < end and b > begin and a >= begin]
    head = [[0, lead, "sil"]] if lead else []
    tail = [[moved[-1][1], samples, "sil"]] if moved[-1][1] < samples else []
    return clip, head + moved + tail


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaving so ends the daemon processes, too
    context = multiprocessing.get_context("fork")  # safe: this process has no threads and has not loaded eSpeak NG
    waiting: list[dict] = job["speakers"][::-1]
    running: dict[Any, tuple[Any, str]] = {}
    while waiting or running:
        while waiting and len(running) < job["workers"]:
            speaker = waiting.pop()
            process = context.Process(target=speak, args=(speaker,), daemon=True)
            process.start()
            running[process.sentinel] = process, speaker["notes"]
        for sentinel in multiprocessing.connection.wait(list(running)):
            process, notes = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                sys.exit(f"the process of speaker {notes} ended with exit status {process.exitcode}")
            print(json.dumps({"done": notes}), flush=True)


if __name__ == "__main__":
    main()
