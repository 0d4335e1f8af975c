"""Masks of frames: whole spans, drawn outside the model, for each clip by itself.

As in fairseq's ``compute_mask_indices`` with static lengths: starts without replacement, spans may overlap. Unlike
fairseq and torchaudio, no masked frame is deleted afterwards to give all rows of a batch the same number: that breaks
56 % of the spans at 781 frames, and ties a client's clips to the shortest beside them.
"""

import numpy as np


def spans(
    frames: int, generator: np.random.Generator, probability: float = 0.8, length: int = 10, minimum: int = 2
) -> np.ndarray:
    """A mask of whole spans of ``length`` frames, bool [frames] at 50 Hz, drawn from ``generator``.

    ``probability`` is the expected fraction of frames in spans, counted before overlap: 0.8 with length 10 starts a
    span at 8 % of the frames and masks 57 % of a long clip. ``minimum`` is the fewest spans, though never more than
    there are starts. Raises ValueError when the clip is shorter than a span.

    >>> spans(12, np.random.default_rng(0), length=12, minimum=1).sum()
    np.int64(12)
    """
    starts = frames - length + 1
    if starts < 1:
        raise ValueError(f"a clip of {frames} frames cannot hold a masked span of {length}; use a shorter mask_length")
    count = int(probability * frames / length + generator.random())  # random rounding keeps the expectation
    count = min(max(count, minimum), starts)
    chosen = generator.choice(starts, count, replace=False)
    mask = np.zeros(frames, dtype=bool)
    mask[(chosen[:, None] + np.arange(length)).ravel()] = True
    return mask
