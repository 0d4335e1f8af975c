"""Ragged arrays on disk: written in order, resumed where a killed writer stopped, complete or an error."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedhubert_lib import audio, labels


def table_of(samples: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"utterance": [f"u{i:02d}" for i in range(len(samples))], "samples": samples})


TABLE = table_of([*range(400, 6_400, 320), 399, 720, 399])


def sequence_of(row) -> np.ndarray:
    rng = np.random.default_rng(row.samples)
    return rng.integers(0, 60_000, audio.frame_count(row.samples)).astype(labels.LABELS)


def write(folder: Path, table: pd.DataFrame = TABLE, kill_at: int = 99) -> list[str]:
    """Write the labels of ``table`` an utterance at a time, but die at that of number ``kill_at``; those written."""
    written = []

    def frames_of(missing):
        for row in missing.itertuples():
            if row.Index == kill_at:
                raise KeyboardInterrupt
            written.append(row.utterance)
            yield [sequence_of(row)]

    labels.write(folder, "labels", table, labels.LABELS, None, frames_of)
    return written


def test_write_and_labels_round_trip(tmp_path):
    assert write(tmp_path) == list(TABLE.utterance) and write(tmp_path) == []
    read = labels.Labels(tmp_path)
    assert read.utterances == list(TABLE.utterance) and "u03" in read and "v" not in read
    for row in TABLE.itertuples():
        np.testing.assert_array_equal(read[row.utterance], sequence_of(row))
    assert not read["u03"].flags.writeable
    with pytest.raises(labels.LabelsError, match="missing"):
        read["missing"]


@pytest.mark.parametrize("torn", [0, 3, 11])
def test_write_resumes_at_the_last_complete_utterance(tmp_path, torn):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, kill_at=12)
    with pytest.raises(labels.LabelsError, match="unfinished"):
        labels.Labels(tmp_path)
    data = tmp_path / "labels.bin"
    data.write_bytes(data.read_bytes()[: len(data.read_bytes()) - torn])
    assert write(tmp_path) == list(TABLE.utterance[11 if torn else 12 :])
    read = labels.Labels(tmp_path)
    assert all((read[row.utterance] == sequence_of(row)).all() for row in TABLE.itertuples())


def test_write_refuses_a_second_writer(tmp_path):
    def twice(missing):
        with pytest.raises(labels.LabelsError, match="another process"):
            write(tmp_path)
        yield [sequence_of(row) for row in TABLE.itertuples()]

    labels.write(tmp_path, "labels", TABLE, labels.LABELS, None, twice)
    assert all((labels.Labels(tmp_path)[row.utterance] == sequence_of(row)).all() for row in TABLE.itertuples())


@pytest.mark.parametrize("wrong", ["length", "too few", "twice"])
def test_write_refuses_what_does_not_fit_the_table(tmp_path, wrong):
    table = table_of([720, 720]).assign(utterance=["u", "u" if wrong == "twice" else "v"])
    made = {"length": [np.zeros(3), np.zeros(2)], "too few": [np.zeros(2)], "twice": [np.zeros(2)] * 2}[wrong]
    with pytest.raises(labels.LabelsError):
        labels.write(tmp_path, "labels", table, labels.LABELS, None, lambda missing: [made])
    assert not (tmp_path / "index.parquet").exists()


def test_labels_of_a_damaged_file(tmp_path):
    write(tmp_path, table_of([1_040]))
    (tmp_path / "labels.bin").write_bytes(b"1234")
    with pytest.raises(labels.LabelsError, match="6 bytes"):
        labels.Labels(tmp_path)


def test_ragged_arrays_of_vectors(tmp_path):
    frames = np.arange(12, dtype=np.float32).reshape(4, 3)
    parts = [[frames[:1], frames[1:]]]
    labels.write(tmp_path, "features", table_of([400, 1_040]), np.dtype("<f4"), 3, lambda missing: parts)
    np.testing.assert_array_equal(labels.Ragged(tmp_path, "features", np.dtype("<f4"), 3)["u01"], frames[1:])
