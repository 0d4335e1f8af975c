"""Ragged labels on disk: written as they are made, continued where they stopped, whole or absent."""

import numpy as np
import pytest

from fedhubert_lib import labels


def some(rng, count):
    return {f"u{i:03d}": rng.integers(0, 60_000, rng.integers(0, 40)).astype(labels.LABELS) for i in range(count)}


def test_round_trip(tmp_path):
    made = some(np.random.default_rng(0), 30) | {"empty": np.zeros(0, labels.LABELS)}
    with labels.writing(tmp_path, "labels", labels.LABELS) as writer:
        names = list(made)
        for start in range(0, len(names), 7):
            writer.append({name: made[name] for name in names[start : start + 7]})
    read = labels.Labels(tmp_path)
    assert read.utterances == list(made) and len(read) == 31 and "u003" in read and "v" not in read
    for name, sequence in made.items():
        np.testing.assert_array_equal(read[name], sequence)
        assert read[name].dtype == np.uint16
    with pytest.raises(labels.LabelsError, match="nothing for utterance missing"):
        read["missing"]
    assert not read["u003"].flags.writeable
    with pytest.raises(labels.LabelsError, match="whole already"), labels.writing(tmp_path, "labels", labels.LABELS):
        pass


@pytest.mark.parametrize("lost", ["nothing", "half a row", "a row"])
def test_killed_writer_goes_on(tmp_path, lost):
    made = some(np.random.default_rng(1), 20)
    names = list(made)

    def killed():
        with labels.writing(tmp_path, "labels", labels.LABELS) as writer:
            writer.append({name: made[name] for name in names[:8]})
            writer.append({name: made[name] for name in names[8:12]})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    with pytest.raises(labels.LabelsError, match="unfinished"):
        labels.Labels(tmp_path)
    rows = (tmp_path / "index.jsonl").read_bytes()
    kept = 12
    if lost != "nothing":  # killed between the labels and their rows
        last = rows.rstrip(b"\n").rfind(b"\n") + 1
        (tmp_path / "index.jsonl").write_bytes(rows[: last + (5 if lost == "half a row" else 0)])
        kept = 11
    with labels.writing(tmp_path, "labels", labels.LABELS) as writer:
        assert list(writer.done) == names[:kept]
        writer.append({name: made[name] for name in names[kept:]})
    read = labels.Labels(tmp_path)
    assert read.utterances == names
    assert all((read[name] == made[name]).all() for name in names)


def test_utterance_only_once(tmp_path):
    with labels.writing(tmp_path, "labels", labels.LABELS) as writer:
        writer.append({"u": np.zeros(3, labels.LABELS)})
        with pytest.raises(labels.LabelsError, match="only once"):
            writer.append({"u": np.zeros(3, labels.LABELS)})


def test_damage_is_seen(tmp_path):
    with labels.writing(tmp_path, "labels", labels.LABELS) as writer:
        writer.append({"u": np.zeros(3, labels.LABELS)})
    (tmp_path / "labels.bin").write_bytes(b"1234")
    with pytest.raises(labels.LabelsError, match="not the 6 bytes"):
        labels.Labels(tmp_path)


def test_vectors(tmp_path):
    """Cached features are the same thing with a width."""
    frames = np.arange(12, dtype=np.float32).reshape(4, 3)
    with labels.writing(tmp_path, "features", np.dtype("<f4"), 3) as writer:
        writer.append({"a": frames[:1], "b": frames[1:]})
    read = labels.Ragged(tmp_path, "features", np.dtype("<f4"), 3)
    np.testing.assert_array_equal(read["b"], frames[1:])
