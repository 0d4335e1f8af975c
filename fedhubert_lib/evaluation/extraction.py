"""Features of clips and utterances: computed once per encoder, by one pass, and kept as memory-mapped files.

A file is written atomically and read back when it exists, so its name must identify encoder and speech. An utterance or
clip passes through the encoder with others of its length alone, so that no features depend on a batch.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from fedhubert_lib import audio, files, threads
from fedhubert_lib.evaluation import keywords, layers
from fedhubert_lib.evaluation.encoders import Encoder

OnProgress = Callable[[int, int], None]
"""Called with the number of clips or utterances that are done, and of all."""
NONE = np.empty(0, dtype=np.int64)


def clips(
    encoder: Encoder,
    table: pd.DataFrame,
    path: Path,
    *,
    whole: np.ndarray = NONE,
    batch: int = 32,
    on_progress: OnProgress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """All that measures of words need of ``encoder``, from one pass over the clips of ``table``.

    Mean and standard deviation over time of the layers of every clip, float32 [clips, 2, layers, width]; and the frames
    of the clips ``whole`` (indices), scaled to unit length, float16 [whole, layers, frames, width]. They are kept in
    PATH-clips.npy and PATH-frames.npy. Raises KeywordError where features are not finite.
    """
    moments, frames = path.with_name(f"{path.name}-clips.npy"), path.with_name(f"{path.name}-frames.npy")
    kept = np.isin(np.arange(len(table)), whole)
    units: list[np.ndarray] = []

    def encode(start: int) -> tuple[np.ndarray, np.ndarray]:
        hidden = encoder(keywords.waveforms(table.iloc[start : start + batch]))
        states = torch.stack([layer.float() for layer in hidden], dim=1)
        block = torch.stack([states.mean(2), states.std(2, unbiased=False)], dim=1).cpu().numpy()
        if not np.isfinite(block).all():
            clip = table["clip"].iloc[start]
            raise keywords.KeywordError(f"features of clip {clip} are not finite; is the checkpoint sound?")
        chosen = functional.normalize(states[torch.from_numpy(kept[start : start + batch])], dim=-1)
        return block, chosen.half().cpu().numpy()

    def blocks() -> Iterator[np.ndarray]:
        starts = range(0, len(table), batch)
        for start, (block, chosen) in zip(starts, threads.each(encode, starts), strict=True):
            units.append(chosen)
            yield block
            if on_progress:
                on_progress(start + len(block), len(table))

    if not (moments.exists() and frames.exists()):
        _write(moments, len(table), blocks())
        _write(frames, len(whole), [np.concatenate(units)[np.argsort(np.argsort(whole))]])
    of_clips, of_whole = _read(moments), _read(frames)
    for kept_in, count, wanted in ((moments, len(of_clips), len(table)), (frames, len(of_whole), len(whole))):
        if count != wanted:
            raise keywords.KeywordError(f"{kept_in} holds {count} clips where {wanted} are expected; remove the file")
    return of_clips, of_whole


def utterances(encoder: Encoder, table: pd.DataFrame, path: Path, on_progress: OnProgress | None = None) -> np.ndarray:
    """Frames of all utterances of ``table`` end to end, float32 [frames, layers, width], kept in ``path`` (.npy).

    Each is cut at ``layers.LONGEST``. Raises ValueError where an utterance has another length than the table says.
    """
    counts = layers.frame_counts(table)

    def encode(name: str) -> np.ndarray:
        states = encoder(audio.read(name)[None, : layers.LONGEST])
        return torch.stack([layer[0].float() for layer in states], dim=1).cpu().numpy()

    def blocks() -> Iterator[np.ndarray]:
        rows = zip(table.path, counts, threads.each(encode, table.path), strict=True)
        for number, (name, count, block) in enumerate(rows, start=1):
            if len(block) != count:
                raise ValueError(f"{name}: {len(block)} frames where {count} were expected; scan the corpus again")
            yield block
            if on_progress:
                on_progress(number, len(table))

    if not path.exists():
        _write(path, int(counts.sum()), blocks())
    return _read(path)


def _write(path: Path, rows: int, blocks: Iterable[np.ndarray]) -> None:
    """Write ``blocks`` of together ``rows`` rows below each other, without holding them in memory."""
    with files.atomic(path) as temporary:
        table, start = None, 0
        for block in blocks:
            if table is None:
                table = np.lib.format.open_memmap(temporary, "w+", block.dtype, (rows, *block.shape[1:]))
            table[start : start + len(block)] = block
            start += len(block)
        table.flush()
        del table


def _read(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
