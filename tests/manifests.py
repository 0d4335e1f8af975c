"""Manifests without audio, for tests and benchmarks: as many speakers and utterances as LibriSpeech has, if need be."""

import numpy as np
import pandas as pd


def librispeech960(utterances: int = 281_241, speakers: int = 2_338, seed: int = 0) -> pd.DataFrame:
    """A manifest of LibriSpeech-960's shape: 251 + 921 + 1,166 speakers of about 25 and 30 minutes, half of them women.

    Utterance lengths follow the corpus's: most between 11 and 16 seconds, a tail down to 1.4. Paths and texts are as
    long as real ones: they are what fills the memory.
    """
    rng = np.random.default_rng(seed)
    minutes = np.where(
        np.arange(speakers) < 0.5 * speakers, rng.normal(25, 0.5, speakers), rng.normal(25.5, 5, speakers)
    )
    minutes = np.clip(minutes, 2, 30.3)
    speaker = np.sort(rng.choice(speakers, p=minutes / minutes.sum(), size=utterances - 2 * speakers))
    speaker = np.sort(np.concatenate([speaker, np.repeat(np.arange(speakers), 2)]))
    subset = np.array(["train-clean-100", "train-clean-360", "train-other-500"])
    part = np.searchsorted([0.107, 0.501], np.arange(speakers) / speakers, side="right")
    number = np.arange(utterances) - np.searchsorted(speaker, speaker)
    names = np.array([str(10 + 3 * i) for i in range(speakers)])[speaker]
    chapters = np.char.add(names, np.char.zfill((number // 48).astype(str), 2))
    seconds = np.where(
        rng.random(utterances) < 0.75, rng.normal(14.3, 1.1, utterances), rng.uniform(1.4, 12, utterances)
    )
    seconds = seconds.clip(1.4, 17)
    utterance = [f"{s}-{c}-{n:04d}" for s, c, n in zip(names, chapters, number, strict=True)]
    places = zip(subset[part][speaker], names, chapters, utterance, strict=True)
    words = 50 * "TWENTY CHARACTERS NO "
    return pd.DataFrame(
        {
            "utterance": utterance,
            "path": ["/somewhere/on/a/large/disk/LibriSpeech/" + "/".join(place) + ".flac" for place in places],
            "speaker": names,
            "chapter": chapters,
            "subset": subset[part][speaker],
            "sex": np.where(speaker % 2, "M", "F"),
            "samples": (16_000 * seconds).astype("int64"),
            "sample_rate": np.int32(16_000),
            "text": [words[: int(14.5 * second)] for second in seconds],
            "fingerprint": [rng.bytes(16).hex() for _ in range(utterances)],
            "split": "train",
        }
    )
