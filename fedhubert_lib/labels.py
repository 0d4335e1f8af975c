"""Ragged arrays on disk, one row of frames per utterance: the labels of a client, and its cached features.

A folder holds ``labels.bin``, the frames of all utterances end to end (little-endian, memory-mapped by readers), and
``index.parquet`` (utterance, offset, frames), which is written last and makes it whole. Until then ``index.jsonl``
grows by a row per utterance, after its frames are on disk: a writer that was killed goes on at the first missing one.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas

from fedhubert_lib import files

LABELS = np.dtype("<u2")


class LabelsError(ValueError):
    """A folder of labels that is missing, unfinished or does not fit what it should."""


class Ragged:
    """Frames by utterance: ``ragged[utterance]`` is a read-only memory map of [frames] or [frames, width].

    Raises LabelsError if the folder is unfinished or its file is shorter or longer than its index promises.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, width: int | None = None) -> None:
        self.folder = Path(folder)
        index = self.folder / "index.parquet"
        if not index.exists():
            raise LabelsError(f"{self.folder}: no index.parquet, {name} absent or unfinished; run 02_kmeans again")
        table = pandas.read_parquet(index)
        self.utterances: list[str] = table.utterance.tolist()
        self._offsets = table.offset.to_numpy()
        self._frames = table.frames.to_numpy()
        shape = (int(self._frames.sum()),) if width is None else (int(self._frames.sum()), width)
        path = self.folder / f"{name}.bin"
        promised = int(np.prod(shape)) * dtype.itemsize
        if not path.exists() or path.stat().st_size != promised:
            raise LabelsError(f"{path}: not the {promised} bytes that its index promises; delete {self.folder}")
        self.flat = np.memmap(path, dtype, "r", shape=shape) if promised else np.zeros(shape, dtype)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {utterance: row for row, utterance in enumerate(self.utterances)}

    def __len__(self) -> int:
        return len(self.utterances)

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
    """Appends utterances to a folder; see ``writing``."""

    def __init__(self, stream: BinaryIO, rows: BinaryIO, dtype: np.dtype, done: dict[str, tuple[int, int]]) -> None:
        self._stream, self._rows, self._dtype = stream, rows, dtype
        self.done = done
        """What is written: utterance to (offset, frames), in order."""
        self._offset = sum(frames for _, frames in done.values())

    def append(self, batch: dict[str, np.ndarray]) -> None:
        """Append the frames of some utterances: data first, then their rows, so that a kill loses at most these."""
        rows = []
        for utterance, frames in batch.items():
            if utterance in self.done:
                raise LabelsError(f"{utterance} is written already; an utterance may appear only once")
            self._stream.write(np.ascontiguousarray(frames, self._dtype).tobytes())
            self.done[utterance] = (self._offset, len(frames))
            rows.append(json.dumps([utterance, self._offset, len(frames)]) + "\n")
            self._offset += len(frames)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._rows.write("".join(rows).encode())
        self._rows.flush()


@contextlib.contextmanager
def writing(folder: Path, name: str, dtype: np.dtype, width: int | None = None) -> Iterator[Writer]:
    """Write, or go on writing, the ragged array ``name`` in ``folder``; on success it is made whole.

    Utterances whose rows survived an earlier, killed writer stand in ``Writer.done``; what was half written is cut off.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    progress, data = folder / "index.jsonl", folder / f"{name}.bin"
    if (folder / "index.parquet").exists():
        raise LabelsError(f"{folder}: is whole already; delete it to write it anew")
    rows: list[Any] = files.read_rows(progress)
    if progress.exists():  # cut off half a row
        os.truncate(progress, progress.read_bytes().rfind(b"\n") + 1)
    done = {utterance: (offset, frames) for utterance, offset, frames in rows}
    promised = sum(frames for _, frames in done.values()) * (width or 1) * dtype.itemsize
    if rows and data.stat().st_size < promised:
        raise LabelsError(f"{data}: shorter than the {promised} bytes that {progress.name} promises; delete {folder}")
    with data.open("ab") as stream, progress.open("ab") as index:
        stream.truncate(promised)
        writer = Writer(stream, index, dtype, done)
        yield writer
    table = pandas.DataFrame(
        [(utterance, offset, count) for utterance, (offset, count) in writer.done.items()],
        columns=["utterance", "offset", "frames"],
    ).astype({"offset": "int64", "frames": "int64"})
    with files.atomic(folder / "index.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    progress.unlink()
