"""Features of clips and utterances: computed once per encoder, by one pass, and kept as memory-mapped files.

A file is written atomically and read back when it exists, so its name must identify encoder and speech. An utterance or
clip passes through the encoder with others of its length alone, so that no features depend on a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from fedhubert_lib import audio, files, threads
from fedhubert_lib.evaluation import keywords, layers
from fedhubert_lib.evaluation.systems import Encoder

OnProgress = Callable[[int, int], None]
"""Called with the number of clips or frames that are done, and of all."""


def clips(
    encoder: Encoder,
    table: pd.DataFrame,
    path: Path,
    *,
    whole: Sequence[int] | np.ndarray = (),
    batch: int = 32,
    normalise: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> tuple[np.ndarray, np.ndarray]:
    """All that measures of words need of ``encoder``, from one pass over the clips of ``table``.

    Mean and standard deviation over time of the layers of every clip, float32 [clips, 2, layers, width]; and the frames
    of the clips ``whole`` (indices), scaled to unit length, float16 [whole, layers, frames, width]. They are kept in
    PATH-clips.npy and PATH-frames.npy. ``normalise`` is for models with ``do_normalize``, whose clips are scaled before
    zeros fill them up, and gives the files another name. Raises KeywordError where features are not finite.
    """
    kind = "-normalised" if normalise else ""
    moments, frames = (path.with_name(f"{path.name}{kind}-{what}.npy") for what in ("clips", "frames"))
    chosen = np.isin(np.arange(len(table)), whole)
    units: list[np.ndarray] = []

    def encode(start: int) -> tuple[np.ndarray, np.ndarray]:
        heard = keywords.waveforms(table.iloc[start : start + batch], normalise)
        hidden = encoder(heard, normalised=True) if normalise else encoder(heard)
        states = torch.stack([layer.float() for layer in hidden], dim=1)
        block = torch.stack([states.mean(2), states.std(2, unbiased=False)], dim=1).cpu().numpy()
        if not (finite := np.isfinite(block).all(axis=(1, 2, 3))).all():
            clip = table["clip"].iloc[start + finite.argmin()]
            raise keywords.KeywordError(f"features of clip {clip} are not finite; is the checkpoint sound?")
        unit = functional.normalize(states[torch.from_numpy(chosen[start : start + batch])], dim=-1)
        return block, unit.half().cpu().numpy()

    def blocks() -> Iterator[np.ndarray]:
        for block, unit in threads.each(encode, range(0, len(table), batch)):
            units.append(unit)
            yield block

    if not (moments.exists() and frames.exists()):
        _write(moments, len(table), blocks(), on_progress)
        _write(frames, len(whole), [np.concatenate(units)[np.argsort(np.argsort(whole))]])
    return np.load(moments, mmap_mode="r"), np.load(frames, mmap_mode="r")


def utterances(
    encoder: Encoder, table: pd.DataFrame, path: Path, on_progress: OnProgress = lambda *_: None
) -> np.ndarray:
    """Frames of all utterances of ``table`` end to end, float32 [frames, layers, width], kept in ``path`` (.npy).

    Each is cut at ``layers.LONGEST``. Raises AudioError where an utterance has another length than the table says.
    """

    def encode(utterance: tuple[str, int]) -> np.ndarray:
        path, samples = utterance
        states = encoder(audio.read(path, 0, min(samples, layers.LONGEST), samples)[None])
        return torch.stack([layer[0].float() for layer in states], dim=1).cpu().numpy()

    if not path.exists():
        blocks = threads.each(encode, zip(table.path, table.samples, strict=True))
        _write(path, int(layers.frame_counts(table).sum()), blocks, on_progress)
    return np.load(path, mmap_mode="r")


def _write(path: Path, rows: int, blocks: Iterable[np.ndarray], on_progress: OnProgress = lambda *_: None) -> None:
    """Write ``blocks`` of together ``rows`` rows below each other, without holding them in memory."""
    with files.atomic(path) as temporary, temporary.open("wb") as stream:  # mapped, a full disk would kill the process
        done = 0
        for block in blocks:
            if not stream.tell():
                facts = {"descr": block.dtype.str, "fortran_order": False, "shape": (rows, *block.shape[1:])}
                np.lib.format.write_array_header_1_0(stream, facts)
            stream.write(block.tobytes())
            done += len(block)
            on_progress(done, rows)
