"""Ragged arrays on disk, one row of frames per utterance: the labels of a client, and its features.

A folder holds ``labels.bin``, the frames of all utterances end to end (little-endian, memory-mapped by readers), and
``index.parquet`` (utterance, offset, frames), which is written last. An utterance's number of frames follows from its
samples, so the length of ``labels.bin`` shows how far a writer that was killed had come.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fedhubert_lib import audio, files

LABELS = np.dtype("<u2")


class LabelsError(ValueError):
    """A folder of labels that is missing, unfinished or does not fit what it should."""


class Ragged:
    """Frames by utterance: ``ragged[utterance]`` is a read-only memory map of [frames] or [frames, width].

    Raises LabelsError if the folder is unfinished or its file is shorter or longer than its index promises.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, width: int | None = None) -> None:
        self.folder = Path(folder)
        index, remedy = self.folder / "index.parquet", f"delete {self.folder}, run 02_kmeans again"
        if not index.exists():
            raise LabelsError(
                f"{self.folder}: no index.parquet, {name} absent or unfinished; run 02_kmeans again"
                " (--force, where clients are on other machines)"
            )
        try:
            table = pd.read_parquet(index)
        except (OSError, ValueError) as error:
            raise LabelsError(f"{index}: cannot be read ({error}); {remedy}") from error
        self.utterances: list[str] = table.utterance.tolist()
        starts = table.offset
        self._places = dict(zip(self.utterances, map(slice, starts, starts + table.frames), strict=True))
        shape = (int(table.frames.sum()),) if width is None else (int(table.frames.sum()), width)
        path = self.folder / f"{name}.bin"
        promised = int(np.prod(shape)) * dtype.itemsize
        if not path.exists() or path.stat().st_size != promised:
            raise LabelsError(f"{path}: not the {promised} bytes that its index promises; {remedy}")
        self.flat = np.memmap(path, dtype, "r", shape=shape) if promised else np.zeros(shape, dtype)

    def __contains__(self, utterance: str) -> bool:
        return utterance in self._places

    def __getitem__(self, utterance: str) -> np.ndarray:
        if utterance not in self:
            raise LabelsError(f"{self.folder}: nothing for utterance {utterance}; run 02_kmeans again")
        return self.flat[self._places[utterance]]


class Labels(Ragged):
    """Labels by utterance: ``labels[utterance]`` is uint16 [frames], label i that of the model's frame i (50 Hz)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "labels", LABELS)


def write(
    folder: Path,
    name: str,
    table: pd.DataFrame,
    dtype: np.dtype,
    width: int | None,
    frames_of: Callable[[pd.DataFrame], Iterable[Sequence[np.ndarray]]],
) -> None:
    """Write, or resume writing, the ragged array ``name`` of all utterances of ``table`` (columns utterance, samples),
    unless it is complete.

    ``frames_of`` gives the frames of the utterances of a table, batch by batch in their order: it is asked for those
    that are missing. Raises LabelsError where an utterance stands in ``table`` twice, or gets another number of frames
    than its samples make, or where another process writes there (``.lock``).
    """
    if (folder / "index.parquet").exists():
        return
    if not table.utterance.is_unique:
        raise LabelsError(f"{table.utterance[table.utterance.duplicated()].iloc[0]}: stands twice in a client's lists")
    folder.mkdir(parents=True, exist_ok=True)
    frames = table.samples.map(audio.frame_count).to_numpy(np.int64)
    ends = np.cumsum([0, *frames])
    path = folder / f"{name}.bin"
    with files.locked(folder / ".lock") as free, files.naming(path), path.open("ab") as stream:
        if not free:  # as where a server asks again while the process of its first message still works
            raise LabelsError(f"{folder}: another process writes here; wait for it, or stop it")
        size = (width or 1) * dtype.itemsize
        done = int(np.searchsorted(ends, stream.tell() // size, side="right")) - 1
        stream.truncate(ends[done] * size)  # the rest of an utterance that a killed writer left
        expected = zip(table.utterance[done:], frames[done:], strict=True)
        for batch in frames_of(table.iloc[done:]):
            for rows in batch:
                utterance, count = next(expected)
                if len(rows) != count:
                    raise LabelsError(f"{utterance}: {len(rows)} frames where its samples make {count}")
                stream.write(np.ascontiguousarray(rows, dtype).tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        if stream.tell() != ends[-1] * size:
            raise LabelsError(f"{folder}: not all of its {len(table)} utterances were written")
    index = pd.DataFrame({"utterance": table.utterance, "offset": ends[:-1], "frames": frames})
    with files.atomic(folder / "index.parquet") as temporary:
        index.to_parquet(temporary, index=False)
