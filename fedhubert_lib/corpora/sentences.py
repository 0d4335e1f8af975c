"""Sentences for the synthetic corpus: about a thousand words, many frames, and words that do not exist.

Masked prediction learns acoustics only if the words around a gap do not give away what stands in it. So three kinds of
utterance are mixed: sentences from a grammar whose slots are drawn independently, runs of words in no order, and runs
of pseudo-words built from random syllables.
"""

import re
from pathlib import Path

import numpy as np

_BLOCKS = [
    block.splitlines() for block in Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split("\n\n")[1:]
]
_WORDS = {title: " ".join(lines).split() for title, *lines in _BLOCKS}

SLOTS = {title[-2]: words for title, words in _WORDS.items() if title.endswith(")")}
"""The words that a letter of a frame stands for."""
FRAMES = next(lines for title, *lines in _BLOCKS if title == "frames")
ONSETS = [*_WORDS["onsets of syllables"], ""]
NUCLEI = _WORDS["nuclei of syllables"]
CODAS = [*_WORDS["codas of syllables"], *[""] * 6]

VOCABULARY = sorted({word for words in SLOTS.values() for word in words})


def sentence(rng: np.random.Generator) -> str:
    """One sentence from the grammar: half the time two frames joined by a conjunction."""
    frames = [FRAMES[rng.integers(len(FRAMES))]]
    if rng.random() < 0.5:
        frames += ["C", FRAMES[rng.integers(len(FRAMES))]]
    tokens = " ".join(frames).split()
    return " ".join(str(rng.choice(SLOTS[token])) if token in SLOTS else token for token in tokens)


def random_words(rng: np.random.Generator) -> str:
    """Six to sixteen words of the vocabulary in no order."""
    return " ".join(rng.choice(VOCABULARY, size=rng.integers(6, 17)))


def pseudo_words(rng: np.random.Generator) -> str:
    """Four to ten words that do not exist, of one to three random syllables."""
    return " ".join(
        "".join(str(rng.choice(ONSETS)) + str(rng.choice(NUCLEI)) + str(rng.choice(CODAS)) for _ in range(syllables))
        for syllables in rng.integers(1, 4, size=rng.integers(4, 11))
    )


def utterance(rng: np.random.Generator) -> str:
    """A text to speak: in equal parts a sentence, words in no order, pseudo-words."""
    return (sentence, random_words, pseudo_words)[rng.integers(3)](rng)


def transcript(text: str) -> str:
    """``text`` as LibriSpeech writes transcripts: upper case, letters, spaces and apostrophes."""
    return re.sub(r"[^A-Z' ]", "", text.upper())
