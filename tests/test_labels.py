"""Ragged arrays on disk: written in order, resumed where a killed writer stopped, complete or an error."""

import numpy as np
import pandas as pd
import pytest

from fedhubert_lib import audio, labels


def table_of(samples: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"utterance": [f"u{i:02d}" for i in range(len(samples))], "samples": samples})


def sequences_of(table: pd.DataFrame) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60_000, audio.frame_count(n)).astype(labels.LABELS) for n in table.samples]


TABLE = table_of([*range(400, 6_400, 320), 399, 720, 399])


def test_writing_and_labels_round_trip(tmp_path):
    made = sequences_of(TABLE)
    with labels.writing(tmp_path, "labels", TABLE, labels.LABELS) as writer:
        assert writer.missing == list(TABLE.utterance)
        writer.append(made[:7])
        writer.append(made[7:])
    read = labels.Labels(tmp_path)
    assert read.utterances == list(TABLE.utterance) and "u03" in read and "v" not in read
    for name, sequence in zip(TABLE.utterance, made, strict=True):
        np.testing.assert_array_equal(read[name], sequence)
    assert not read["u03"].flags.writeable
    with pytest.raises(labels.LabelsError, match="missing"):
        read["missing"]
    with pytest.raises(labels.LabelsError, match="complete"), labels.writing(tmp_path, "labels", TABLE, labels.LABELS):
        pass


@pytest.mark.parametrize("torn", [0, 3, 11])
def test_writing_resumes_at_the_last_complete_utterance(tmp_path, torn):
    made = sequences_of(TABLE)

    def killed():
        with labels.writing(tmp_path, "labels", TABLE, labels.LABELS) as writer:
            writer.append(made[:12])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    with pytest.raises(labels.LabelsError, match="unfinished"):
        labels.Labels(tmp_path)
    data = tmp_path / "labels.bin"
    data.write_bytes(data.read_bytes()[: len(data.read_bytes()) - torn])
    with labels.writing(tmp_path, "labels", TABLE, labels.LABELS) as writer:
        assert writer.missing == list(TABLE.utterance[12 if not torn else 11 :])
        writer.append(made[len(made) - len(writer.missing) :])
    read = labels.Labels(tmp_path)
    assert all((read[name] == sequence).all() for name, sequence in zip(TABLE.utterance, made, strict=True))


@pytest.mark.parametrize("wrong", ["length", "too few", "twice"])
def test_writing_refuses_what_does_not_fit_the_table(tmp_path, wrong):
    table = table_of([720, 720]).assign(utterance=["u", "u" if wrong == "twice" else "v"])
    made = {"length": [np.zeros(3), np.zeros(2)], "too few": [np.zeros(2)], "twice": [np.zeros(2)] * 2}[wrong]
    with pytest.raises(labels.LabelsError), labels.writing(tmp_path, "labels", table, labels.LABELS) as writer:
        writer.append(made)
    assert not (tmp_path / "index.parquet").exists()


def test_labels_of_a_damaged_file(tmp_path):
    with labels.writing(tmp_path, "labels", table_of([1_040]), labels.LABELS) as writer:
        writer.append([np.zeros(3)])
    (tmp_path / "labels.bin").write_bytes(b"1234")
    with pytest.raises(labels.LabelsError, match="6 bytes"):
        labels.Labels(tmp_path)


def test_ragged_arrays_of_vectors(tmp_path):
    frames = np.arange(12, dtype=np.float32).reshape(4, 3)
    with labels.writing(tmp_path, "features", table_of([400, 1_040]), np.dtype("<f4"), 3) as writer:
        writer.append([frames[:1], frames[1:]])
    np.testing.assert_array_equal(labels.Ragged(tmp_path, "features", np.dtype("<f4"), 3)["u01"], frames[1:])
