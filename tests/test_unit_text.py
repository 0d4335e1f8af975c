"""Units as text: each line is its recording's alone, codebooks are used again, and what is no speech is refused."""

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import SMALL
from safetensors import safe_open
from safetensors.torch import save_file

from fedhubert_lib import audio, cli, hubert, pretrained, seeds
from fedhubert_lib.export import formats, unit_text
from fedhubert_lib.kmeans import clustering, hidden

LENGTHS = {"a/one.wav": 16_000, "a/two.flac": 9_137, "three.wav": 400, "a b.WAV": 30_000}


@pytest.fixture
def checkpoint(tmp_path):
    model = hubert.Hubert(hubert.preset("tiny", "logmel", **SMALL))
    hubert.initialise(model, seeds.torch_generator(0))
    pretrained.save(tmp_path / "checkpoint", model)
    return tmp_path / "checkpoint"


@pytest.fixture
def folder(tmp_path):
    for name, samples in LENGTHS.items():
        path = tmp_path / "speech" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * seeds.numpy_generator(0, name).normal(size=samples), 16_000)
    (tmp_path / "speech" / "notes.txt").write_text("no speech\n")
    return tmp_path / "speech"


def lines(path) -> dict[str, list[int]]:
    split = (line.split("|") for line in path.read_text().splitlines())
    return {name: [int(unit) for unit in units.split()] for name, units in split}


def test_a_line_holds_the_nearest_centroids_of_its_recording(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "units.txt"
    assert cli.main(["units", str(checkpoint), str(folder), "--to", str(out), "--clusters", "7", "--layer", "2"]) == 0
    assert "recordings 4" in capsys.readouterr().out
    written = lines(out)
    assert list(written) == ["a b", "a/one", "a/two", "three"]
    model = pretrained.load(checkpoint)[0]
    centroids, layer = unit_text._read(tmp_path / "units.txt.codebook.safetensors", {}, model.config)
    for name in LENGTHS:
        states = model(audio.read(folder / name)[None], hidden_states=True).hidden[layer][0].detach()
        assert written[name.rpartition(".")[0]] == clustering.nearest(states, centroids).tolist()


def test_runs_become_one_unit(checkpoint, folder, tmp_path):
    plain, short = tmp_path / "plain.txt", tmp_path / "short.txt"
    for out, deduplicate in ((plain, False), (short, True)):
        facts = unit_text.write(checkpoint, folder, out, clusters=3, deduplicate=deduplicate)
    merged = {
        name: [u for i, u in enumerate(units) if i == 0 or u != units[i - 1]] for name, units in lines(plain).items()
    }
    assert lines(short) == merged
    assert facts["mean run"] == sum(map(len, lines(plain).values())) / sum(map(len, merged.values()))


def test_a_codebook_gives_a_recording_the_same_units_in_any_folder(checkpoint, folder, tmp_path):
    unit_text.write(checkpoint, folder, tmp_path / "first.txt", clusters=5, seed=3)
    other = tmp_path / "other"
    other.mkdir()
    (folder / "a" / "two.flac").rename(other / "two.flac")
    codebook = tmp_path / "first.txt.codebook.safetensors"
    unit_text.write(checkpoint, other, tmp_path / "second.txt", codebook=codebook)
    assert lines(tmp_path / "second.txt") == {"two": lines(tmp_path / "first.txt")["a/two"]}
    with pytest.raises(formats.ExportError, match="another layer"):
        unit_text.write(checkpoint, other, tmp_path / "third.txt", codebook=codebook, layer=2)
    with pytest.raises(formats.ExportError, match="another clusters and another seed"):
        unit_text.write(checkpoint, other, tmp_path / "third.txt", codebook=codebook, clusters=6, seed=4)
    stranger = hubert.Hubert(hubert.preset("tiny", "logmel", **SMALL))
    pretrained.save(tmp_path / "stranger", stranger)
    with pytest.raises(formats.ExportError, match="another model"):
        unit_text.write(tmp_path / "stranger", other, tmp_path / "third.txt", codebook=codebook)


def test_a_killed_call_keeps_its_codebook_and_leaves_no_half_text(checkpoint, folder, tmp_path, monkeypatch):
    out = tmp_path / "units.txt"
    with monkeypatch.context() as patch:
        patch.setattr(clustering, "nearest", lambda *_: 1 / 0)
        patch.setattr(clustering, "fit", lambda frames, clusters, _: frames[:clusters])
        with pytest.raises(ZeroDivisionError):
            unit_text.write(checkpoint, folder, out, clusters=5)
    assert not out.exists()
    monkeypatch.setattr(clustering, "fit", lambda *_: pytest.fail("the codebook was there"))
    unit_text.write(checkpoint, folder, out, clusters=5)
    with pytest.raises(formats.ExportError, match="there already"):
        unit_text.write(checkpoint, folder, out)
    with pytest.raises(formats.ExportError, match="another clusters; "):
        out.unlink()
        unit_text.write(checkpoint, folder, out, clusters=6)


def test_a_killed_call_resumes_after_its_last_whole_line(checkpoint, folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.txt", tmp_path / "units.txt"
    facts = unit_text.write(checkpoint, folder, whole, clusters=5)
    passed, through = [], hidden.states

    def states(model, waveforms, *more):
        passed.append(len(waveforms))
        return through(model, waveforms, *more) if sum(passed) < 4 else 1 / 0

    monkeypatch.setattr(unit_text.threads, "count", lambda: 1)
    codebook = tmp_path / "whole.txt.codebook.safetensors"
    monkeypatch.setattr(hidden, "states", states)
    with pytest.raises(ZeroDivisionError):
        unit_text.write(checkpoint, folder, out, codebook=codebook)
    (part,) = tmp_path.glob("units.txt.*.part")
    assert part.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:3])
    with part.open("ab") as text:
        text.write(b"three|1 2")
    monkeypatch.setattr(hidden, "states", lambda *arguments: passed.append(arguments[1]) or through(*arguments))
    passed.clear()
    assert unit_text.write(checkpoint, folder, out, codebook=codebook) == facts
    assert len(passed) == 1 and out.read_bytes() == whole.read_bytes() and not part.exists()


def test_lines_of_other_units_are_not_taken_up(checkpoint, folder, tmp_path, monkeypatch):
    """Of a call with another codebook, other recordings, or runs merged."""
    unit_text.write(checkpoint, folder, tmp_path / "first.txt", clusters=5)
    codebook, out = tmp_path / "first.txt.codebook.safetensors", tmp_path / "units.txt"
    other = tmp_path / "other"
    unit_text.write(checkpoint, folder, other, clusters=6)
    monkeypatch.setattr(unit_text.clustering, "nearest", lambda *_: 1 / 0)
    for speech, chosen in (
        (folder, {"codebook": codebook}),
        (folder, {"codebook": codebook, "deduplicate": True}),
        (folder, {"codebook": other.with_name("other.codebook.safetensors")}),
        (folder / "a", {"codebook": codebook}),
    ):
        with pytest.raises(ZeroDivisionError):
            unit_text.write(checkpoint, speech, out, **chosen)
    assert len(list(tmp_path.glob("units.txt.*.part"))) == 4


def test_a_long_recording_has_all_its_frames(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hidden, "FORWARD_SAMPLES", 20 * audio.HOP)
    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "speech" / "long.wav", 0.1 * np.random.default_rng(0).normal(size=33_333), 16_000)
    unit_text.write(checkpoint, tmp_path / "speech", tmp_path / "units.txt", clusters=4)
    assert len(lines(tmp_path / "units.txt")["long"]) == audio.frame_count(33_333)


@pytest.mark.parametrize(
    ("name", "rate", "shape", "match"),
    [
        ("slow.wav", 8_000, (8_000,), "slow.wav: 8000 Hz.*sox"),
        ("stereo.wav", 16_000, (8_000, 2), "2 channels"),
        ("short.wav", 16_000, (399,), "shorter than one frame"),
        ("a|b.wav", 16_000, (8_000,), "rename"),
        ("three.flac", 16_000, (8_000,), "suffix alone"),
    ],
)
def test_what_cannot_be_used_is_named_before_the_work(
    folder, checkpoint, tmp_path, monkeypatch, name, rate, shape, match
):
    soundfile.write(folder / name, np.zeros(shape), rate)
    monkeypatch.setattr(hidden, "states", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(formats.ExportError, match=match):
        unit_text.write(checkpoint, folder, tmp_path / "units.txt")


def test_a_codebook_that_does_not_fit_the_model_is_refused(folder, checkpoint, tmp_path, monkeypatch):
    unit_text.write(checkpoint, folder, tmp_path / "units.txt", clusters=3)
    place = tmp_path / "units.txt.codebook.safetensors"
    with safe_open(place, "pt") as stored:
        good, made = stored.get_tensor("centroids"), json.loads(stored.metadata()["units"])
    monkeypatch.setattr(hidden, "states", lambda *_: pytest.fail("work was begun"))
    for centroids, layer in (
        (good * torch.nan, made["layer"]), (good[:, 1:], made["layer"]), (good[0], made["layer"]),
        (good[:0], made["layer"]), (good, -1), (good, 99),
    ):  # fmt: skip
        save_file({"centroids": centroids.contiguous()}, place, {"units": json.dumps(made | {"layer": layer})})
        with pytest.raises(formats.ExportError, match="do not fit the model"):
            unit_text.write(checkpoint, folder, tmp_path / "others.txt", codebook=place)


def test_a_place_that_cannot_be_written_is_named_before_the_work(folder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(unit_text, "_fit", lambda *_: pytest.fail("k-means was computed"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        unit_text.write(checkpoint, folder, tmp_path / "file/units.txt")


def test_few_frames_many_layers_and_empty_folders(folder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hidden, "states", lambda *_: pytest.fail("work was begun"))
    for options in ({"clusters": 999}, {"clusters": 0}, {"layer": 3}, {"layer": 0}):
        with pytest.raises(formats.ExportError, match="are 1 to 2" if "layer" in options else "from 1 to the"):
            unit_text.write(checkpoint, folder, tmp_path / "units.txt", **options)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(formats.ExportError, match=".wav or .flac"):
            unit_text.write(checkpoint, place, tmp_path / "units.txt")
