"""Ragged arrays on disk, one row of frames per utterance: the labels of a client, and its features.

A folder holds ``labels.bin``, the frames of all utterances end to end (little-endian, memory-mapped by readers), and
``index.parquet`` (utterance, offset, frames), which is written last. An utterance's number of frames follows from its
samples, so the length of ``labels.bin`` shows how far a writer that was killed had come.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

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
            raise LabelsError(f"{self.folder}: no index.parquet, {name} absent or unfinished; run 02_kmeans again")
        try:
            table = pd.read_parquet(index)
        except (OSError, ValueError) as error:
            raise LabelsError(f"{index}: cannot be read ({error}); {remedy}") from error
        self.utterances: list[str] = table.utterance.tolist()
        self._offsets = table.offset.to_numpy()
        self._frames = table.frames.to_numpy()
        shape = (int(self._frames.sum()),) if width is None else (int(self._frames.sum()), width)
        path = self.folder / f"{name}.bin"
        promised = int(np.prod(shape)) * dtype.itemsize
        if not path.exists() or path.stat().st_size != promised:
            raise LabelsError(f"{path}: not the {promised} bytes that its index promises; {remedy}")
        self.flat = np.memmap(path, dtype, "r", shape=shape) if promised else np.zeros(shape, dtype)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {utterance: row for row, utterance in enumerate(self.utterances)}

    def __contains__(self, utterance: str) -> bool:
        return utterance in self._rows

    def __getitem__(self, utterance: str) -> np.ndarray:
        try:
            row = self._rows[utterance]
        except KeyError:
            raise LabelsError(f"{self.folder}: nothing for utterance {utterance}; run 02_kmeans again") from None
        return self.flat[self._offsets[row] : self._offsets[row] + self._frames[row]]


class Labels(Ragged):
    """Labels by utterance: ``labels[utterance]`` is uint16 [frames], label i that of the model's frame i (50 Hz)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "labels", LABELS)


class Writer:
    """Appends the frames of utterances in their order; see ``writing``."""

    def __init__(self, stream: BinaryIO, missing: pd.Series, dtype: np.dtype) -> None:
        self.missing: list[str] = missing.index.tolist()
        """Utterances without frames when writing began, in their order."""
        self._stream, self._dtype, self._expected = stream, dtype, iter(missing.items())

    def append(self, batch: Iterable[np.ndarray]) -> None:
        """Append the frames of the next utterances of ``missing``, and flush them to disk."""
        for frames in batch:
            utterance, count = next(self._expected)
            if len(frames) != count:
                raise LabelsError(f"{utterance}: {len(frames)} frames where its samples make {count}")
            self._stream.write(np.ascontiguousarray(frames, self._dtype).tobytes())
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextlib.contextmanager
def writing(
    folder: Path, name: str, table: pd.DataFrame, dtype: np.dtype, width: int | None = None
) -> Iterator[Writer]:
    """Write, or resume writing, the ragged array ``name`` of all utterances of ``table`` (columns utterance, samples).

    Raises LabelsError where the array is complete, or an utterance stands in ``table`` twice.
    """
    if (folder / "index.parquet").exists():
        raise LabelsError(f"{folder}: is complete; delete it to write it anew")
    if not table.utterance.is_unique:
        raise LabelsError(f"{table.utterance[table.utterance.duplicated()].iloc[0]}: stands twice in a client's lists")
    folder.mkdir(parents=True, exist_ok=True)
    frames = table.samples.map(audio.frame_count).astype("int64").set_axis(table.utterance)
    ends = np.cumsum([0, *frames])
    with (folder / f"{name}.bin").open("ab") as stream:
        size = (width or 1) * dtype.itemsize
        done = np.searchsorted(ends, stream.tell() // size, side="right") - 1
        stream.truncate(ends[done] * size)  # the rest of an utterance that a killed writer left
        writer = Writer(stream, frames.iloc[done:], dtype)
        yield writer
        if stream.tell() != ends[-1] * size:
            raise LabelsError(f"{folder}: not all of its {len(table)} utterances were written")
    index = pd.DataFrame({"utterance": frames.index, "offset": ends[:-1], "frames": frames.to_numpy()})
    with files.atomic(folder / "index.parquet") as temporary:
        index.to_parquet(temporary, index=False)
