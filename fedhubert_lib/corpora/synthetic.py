"""The built-in corpus: any number of speakers and minutes, with true phone times, in the public layouts.

Voices are drawn at random (pitch, formants, roughness, breath, accent, rate), one seed each, so that speakers are
unlimited and no two corpora of different seeds share one. ``espeak.py`` speaks them, a process for each. Training
speakers, test speakers and the voices of the keywords' training, validation and test lists are all different.
"""

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pandas as pd
import scipy
import soundfile

from fedhubert_lib import files, params, seeds, threads
from fedhubert_lib.audio import SAMPLE_RATE
from fedhubert_lib.corpora import alignments, sentences
from fedhubert_lib.corpora.archives import Progress

TRAIN_SUBSET, TEST_SUBSET = "synthetic-train", "synthetic-test"
CHAPTER_UTTERANCES = 8
ESPEAK_RATE = 22_050

Span = tuple[int, int, str]
"""Start, end and name of a phone, in samples at 16 kHz."""
Spoken = dict[str, tuple[int, list[Span]]]
"""The samples and the phones of each file of a speaker, by the file's name."""

# The 35 words of Speech Commands v0.02.
KEYWORDS = """
backward bed bird cat dog down eight five follow forward four go happy house learn left marvin nine no off on one right
seven sheila six stop three tree two up visual wow yes zero
""".split()  # noqa: SIM905

# eSpeak NG's English accents: the lines of its language files that choose phonemes and rules.
ACCENTS = {
    "american": "language en-us\nphonemes en-us\ndictrules 3 6",
    "new-york": "language en-us-nyc\nphonemes en-us-nyc\ndictrules 3 6",
    "british": "language en-gb\nphonemes en",
    "received": "language en-gb-x-rp\nphonemes en-rp",
    "scottish": "language en-gb-scotland\nphonemes en-sc\ndictrules 2 5 6 7",
    "caribbean": "language en-029\nphonemes en-wi\ndictrules 8",
}


def speech(folder: Path, p: params.Corpus, on_progress: Progress = lambda *_: None) -> None:
    """Write ``folder``: a LibriSpeech-layout corpus of two subsets, SPEAKERS.TXT and phones.parquet.

    ``p.speakers`` train on ``p.minutes``; ``p.test_speakers`` others, of ``p.test_minutes``, are the test subset.
    An identical corpus that already exists there is kept.
    """
    speakers = []
    for subset, count, minutes, first in (
        (TRAIN_SUBSET, p.speakers, p.minutes, 10_001),
        (TEST_SUBSET, p.test_speakers, p.test_minutes, 90_001),
    ):
        # Speakers differ in how much they speak, by up to a factor of two.
        shares = seeds.numpy_generator(p.seed, "corpus", subset, "shares").uniform(0.7, 1.4, count)
        for i, share in enumerate(shares / shares.sum()):
            seconds = 60 * minutes * share
            speakers.append(_speaker(p.seed, str(first + i), subset, sex="FM"[i % 2], seconds=seconds))
    if not _is_made(folder, speakers):
        with files.atomic(folder.absolute()) as place:
            _write_tables(place, speakers, _synthesise(place, speakers, on_progress))


def keywords(folder: Path, p: params.Corpus, on_progress: Progress = lambda *_: None) -> None:
    """Write ``folder``: a Speech-Commands-layout corpus of the 35 words, with its validation and testing lists.

    A quarter of the voices is for testing only, an eighth for validation only, at least one each. An identical corpus
    that already exists there is kept.
    """
    voices = []
    for i in range(p.keyword_voices):
        name = hashlib.sha1(f"{p.seed} voice {i}".encode()).hexdigest()[:8]
        voices.append(_keyword_voice(p.seed, name, sex="FM"[i % 2], takes=p.keyword_takes))
    testing = max(1, p.keyword_voices // 4)
    validation = max(1, p.keyword_voices // 8)
    lists = {"testing_list.txt": voices[:testing], "validation_list.txt": voices[testing : testing + validation]}
    if not _is_made(folder, voices):
        with files.atomic(folder.absolute()) as place:
            _synthesise(place, voices, on_progress)
            for name, chosen in lists.items():
                lines = sorted(u["path"] for speaker in chosen for u in speaker["utterances"])
                (place / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def voice(rng: np.random.Generator, sex: str) -> str:
    """A random voice, as an eSpeak NG voice file. ``sex`` sets the ranges of pitch and of vocal tract length."""
    accent = ACCENTS[str(rng.choice(list(ACCENTS)))]
    pitch = rng.uniform(155, 240) if sex == "F" else rng.uniform(75, 135)
    tract = rng.uniform(1.03, 1.22) if sex == "F" else rng.uniform(0.86, 1.06)
    lines = [
        "name speaker",
        accent,
        f"gender {'female' if sex == 'F' else 'male'}",
        f"pitch {pitch:.0f} {pitch * rng.uniform(1.2, 1.7):.0f}",
        f"roughness {rng.integers(0, 4)}",
        f"flutter {rng.integers(0, 5)}",
        "consonants {:.0f} {:.0f}".format(*rng.uniform(80, 125, 2)),
        "breath " + " ".join(f"{value:.0f}" for value in rng.uniform(0, 4, 8)),
        "formant 0 {:.0f} {:.0f} {:.0f}".format(*100 * rng.uniform((0.95, 0.8, 0.9), (1.05, 1.1, 1.3))),
    ]
    for formant in range(1, 9):
        frequency = 100 * tract * rng.uniform(0.95, 1.05)
        lines.append(f"formant {formant} {frequency:.0f} {rng.uniform(75, 115):.0f} {rng.uniform(85, 150):.0f}")
    return "\n".join(lines) + "\n"


def _voice_fields(rng: np.random.Generator, sex: str) -> dict:
    return {
        "sex": sex,
        "voice": voice(rng, sex),
        "seed": int(rng.integers(1, 2**31)),
        "rate": float(rng.uniform(140, 200)),
        "peak": float(rng.uniform(0.25, 0.8)),
        "noise": float(10 ** rng.uniform(-4, -3)),
    }


def _speaker(seed: int, speaker: str, subset: str, sex: str, seconds: float) -> dict:
    rng = seeds.numpy_generator(seed, "corpus", subset, speaker)
    fields = _voice_fields(rng, sex)
    utterances: list[dict] = []
    letters = 0
    while letters < seconds * 25:  # nobody says 25 letters in a second: the synthesiser stops before the text does
        number = len(utterances)
        if number % CHAPTER_UTTERANCES == 0:
            chapter = f"{speaker}{number // CHAPTER_UTTERANCES:03d}"
            rate = float(rng.uniform(0.92, 1.08))
        text = sentences.utterance(rng)
        letters += len(text)
        name = f"{chapter}/{speaker}-{chapter}-{number % CHAPTER_UTTERANCES:04d}.flac"
        utterances.append({"path": name, "text": text, "rate": rate})
    place = {"name": speaker, "subset": subset, "below": f"{subset}/{speaker}"}
    return fields | place | {"seconds": seconds, "clip_samples": None, "utterances": utterances}


def _keyword_voice(seed: int, name: str, sex: str, takes: int) -> dict:
    rng = seeds.numpy_generator(seed, "corpus", "keywords", name)
    fields = _voice_fields(rng, sex)
    utterances = [
        {
            "path": f"{word}/{name}_nohash_{take}.wav",
            "text": word + str(rng.choice(list(".?!,"))),  # statement, question, exclamation, unfinished
            "rate": float(rng.uniform(0.8, 1.2)),
        }
        for word in KEYWORDS
        for take in range(takes)
    ]
    place = {"below": "", "seconds": None, "clip_samples": SAMPLE_RATE}
    return fields | place | {"utterances": utterances, "name": name}


def _is_made(folder: Path, speakers: list[dict]) -> bool:
    plan = folder / "plan.json"
    return plan.exists() and plan.read_text(encoding="utf-8") == json.dumps(speakers, indent=1)


def _synthesise(folder: Path, speakers: list[dict], on_progress: Progress) -> list[Spoken]:
    """Write the audio of ``speakers``, and the plan of it, to the new ``folder``."""
    (folder / "_voices").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(speakers, indent=1), encoding="utf-8")
    spoken: list[Spoken] = []
    with ThreadPoolExecutor(threads.cores()) as pool:  # after an error or an interrupt nobody else begins to speak
        for files_of_speaker in pool.map(lambda speaker: _speak(speaker, folder), speakers):
            spoken.append(files_of_speaker)
            on_progress("synthesise", len(spoken), len(speakers))
    return spoken


def _speak(speaker: dict, folder: Path) -> Spoken:
    """Write the audio of one speaker, until it is long enough. Raises RuntimeError where the synthesiser fails."""
    voice_file = folder / "_voices" / f"{speaker['name']}.txt"
    voice_file.write_text(speaker["voice"], encoding="utf-8")
    rng = np.random.Generator(np.random.PCG64(speaker["seed"]))
    spoken: Spoken = {}
    total, limit = 0, math.inf if speaker["seconds"] is None else speaker["seconds"] * SAMPLE_RATE
    program = str(Path(__file__).with_name("espeak.py"))
    wheels = filter(None, [os.environ.get("FEDHUBERT_WHEELS")])  # where ``make gpu`` has unpacked it
    command = [sys.executable, "-I", program, str(voice_file), str(speaker["seed"]), *wheels]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        for utterance in speaker["utterances"]:
            if total >= limit:
                break
            waveform, phones = _say(process, utterance["text"], round(speaker["rate"] * utterance["rate"]))
            spans = _spans(phones, len(waveform))
            if speaker["clip_samples"]:
                waveform = _clip(waveform, spans, speaker["clip_samples"])
            waveform *= speaker["peak"] / np.abs(waveform).max()
            waveform += rng.normal(0, speaker["noise"], len(waveform))
            path = folder / speaker["below"] / utterance["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, (waveform * 32_767).round().astype(np.int16), SAMPLE_RATE, subtype="PCM_16")
            spoken[utterance["path"]] = len(waveform), spans
            total += len(waveform)
    return spoken


def _say(process: subprocess.Popen, text: str, words_per_minute: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Samples at 16 kHz (float64), and (first sample at 22.05 kHz, phone) of each phone."""
    assert process.stdin and process.stdout and process.stderr
    with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
        process.stdin.write(json.dumps([text, words_per_minute]).encode() + b"\n")
        process.stdin.flush()
    if not (answer := process.stdout.readline()):
        output = process.stderr.read().decode(errors="replace").strip()
        raise RuntimeError(f"the speech synthesiser failed (exit status {process.wait()}):\n{output}")
    count, phones = json.loads(answer)
    samples = np.frombuffer(process.stdout.read(2 * count), dtype=np.int16)
    if len(samples) < count:
        raise RuntimeError(f"the speech synthesiser ended while it spoke (exit status {process.wait()})")
    return scipy.signal.resample_poly(samples / 32_768, 320, 441), phones


def _spans(phones: list[tuple[int, str]], total: int) -> list[Span]:
    """The phones of ``total`` samples, with the silence before them; neighbours of one class are joined."""
    phones = [(0, "sil"), *phones]
    starts = [min(total, round(sample * SAMPLE_RATE / ESPEAK_RATE)) for sample, _ in phones]
    spans: list[Span] = []
    for (_, name), start, end in zip(phones, starts, [*starts[1:], total], strict=True):
        phone = spans[-1][2] if name == ";" else name  # ; only says: palatalise what went before
        if end <= start:  # eSpeak NG marks some pauses of no length
            continue
        begin = spans.pop()[0] if spans and spans[-1][2] == phone else start
        spans.append((begin, end, phone))
    return spans


def _clip(waveform: np.ndarray, spans: list[Span], samples: int) -> np.ndarray:
    """Centre the voiced part in exactly ``samples`` samples, as the one-second clips of Speech Commands."""
    voiced = [span for span in spans if span[2] != "sil"]
    begin, end = voiced[0][0], min(voiced[-1][1], voiced[0][0] + samples)
    lead = (samples - (end - begin)) // 2
    return np.pad(waveform[begin:end], (lead, samples - lead - (end - begin)))


def _write_tables(folder: Path, speakers: list[dict], spoken: list[Spoken]) -> None:
    """Write SPEAKERS.TXT, the chapters' transcripts and the phones into the new ``folder``."""
    rows, phones = [], []
    for speaker, times in zip(speakers, spoken, strict=True):
        minutes = sum(samples for samples, _ in times.values()) / SAMPLE_RATE / 60
        rows.append(f"{speaker['name']} | {speaker['sex']} | {speaker['subset']} | {minutes:.2f} | Synthetic voice")
        for utterance in speaker["utterances"][: len(times)]:
            path = folder / speaker["below"] / utterance["path"]
            chapter = path.with_name(f"{speaker['name']}-{path.parent.name}.trans.txt")
            with chapter.open("a", encoding="utf-8") as transcript:
                transcript.write(f"{path.stem} {sentences.transcript(utterance['text'])}\n")
            phones += [(path.stem, *span) for span in times[utterance["path"]][1]]
    header = ";ID | SEX | SUBSET | MINUTES | NAME\n"
    (folder / "SPEAKERS.TXT").write_text(header + "\n".join(rows) + "\n", encoding="utf-8")
    table = pd.DataFrame(phones, columns=alignments.PHONES.names)
    table.to_parquet(folder / "phones.parquet", index=False)
