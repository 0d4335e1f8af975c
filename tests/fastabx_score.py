"""ABX of some items by fastabx 0.9.0, whose environment's Python runs this file to print what ``SCORE`` holds."""

import numpy as np

SCORE = 0.112035


def items() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames [clips, 9, 6], words and speakers: a speaker misses some words and says others up to three times."""
    rng = np.random.default_rng(0)
    takes = rng.integers(4, size=(5, 6))  # of each speaker and word
    speaker, word = (np.repeat(index.ravel(), takes.ravel()) for index in np.indices(takes.shape))
    frames = rng.normal(size=(6, 9, 6))[word] + 0.7 * rng.normal(size=(5, 1, 6))[speaker]
    frames += (0.5 + 0.3 * word)[:, None, None] * rng.normal(size=frames.shape)  # some words are harder
    return frames.astype(np.float32), word.astype(str), speaker.astype(str)


if __name__ == "__main__":
    from fastabx import Dataset, Score, Task
    from fastabx.dataset import InMemoryAccessor
    from torch import device, from_numpy

    frames, words, speakers = items()
    places = {clip: (clip * frames.shape[1], (clip + 1) * frames.shape[1]) for clip in range(len(frames))}
    accessor = InMemoryAccessor(places, from_numpy(frames).flatten(0, 1), device("cpu"))
    import polars

    dataset = Dataset(labels=polars.DataFrame({"word": words, "speaker": speakers}), accessor=accessor)
    score = Score(Task(dataset, on="word", across=["speaker"]), "angular", progress=False)
    print(score.collapse(levels=["speaker"]))
