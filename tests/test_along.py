"""Models on the way: those of rounds 1, 2, 4, 8 … stay, small and whole, for the federation and on pooled data."""

from pathlib import Path

import federation
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from fedhubert_lib import checkpoints, files, pooled, pretrained, pretraining
from fedhubert_lib.evaluation import systems

CPU = torch.device("cpu")


def write(out: Path, number: int) -> None:
    weights = {"model.a": torch.full((3,), float(number)), "head.b": torch.ones(2)}
    checkpoints.write(out, weights, {"m": torch.ones(100)}, {"round": number}, {"config.json": f"{number}"})


def test_models_stay_while_checkpoints_go(tmp_path):
    for number in range(1, 10):
        write(tmp_path, number)
    assert checkpoints.rounds(tmp_path) == [9]
    kept = sorted((tmp_path / "checkpoints").glob("model-*"))
    assert [folder.name for folder in kept] == [f"model-{number:05}" for number in (1, 2, 4, 8)]
    for number, folder in zip((1, 2, 4, 8), kept, strict=True):
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert load_file(folder / "model.safetensors")["a"].tolist() == [number] * 3
        assert (folder / "config.json").read_text() == str(number)


def test_a_round_that_was_killed_while_it_was_written_is_written_again(tmp_path, monkeypatch):
    def killed(tensors, file, **options):
        if file.name == "server.safetensors":
            raise KeyboardInterrupt
        save_file(tensors, file, **options)

    write(tmp_path, 3)
    monkeypatch.setattr(safetensors.torch, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 4)
    monkeypatch.undo()
    assert checkpoints.rounds(tmp_path) == [3]  # from where training goes on
    write(tmp_path, 4)
    assert checkpoints.rounds(tmp_path) == [4]
    assert load_file(tmp_path / "checkpoints" / "model-00004" / "model.safetensors")["a"].tolist() == [4.0] * 3


def test_pretraining_and_pooled_training_leave_models_to_evaluate(tmp_path, narrow):
    run = federation.make(tmp_path / "run")
    p = federation.pretrain(rounds=3)
    pretraining.run(run, p)
    pooled.train(run, p)
    models = list(systems.along(run, CPU))
    assert [(system.name, number) for number, _, system in models] == [
        (name, number) for name in ("teacher", "centralised") for number in (1, 2, 3)
    ]
    for name, folder in (("teacher", run / "03_pretrain"), ("centralised", run / "03_pretrain" / "centralised")):
        rows = [row for row in files.read_rows(folder / "metrics.jsonl") if row["kind"] == "round"]
        heard = np.cumsum([row["audio_seconds"] for row in rows]) / 3600
        assert [hours for _, hours, system in models if system.name == name] == pytest.approx(heard)
        # The last is the model of the run; those before it are others.
        digests = [system.digest for _, _, system in models if system.name == name]
        assert digests[-1] == systems._digest(folder / "checkpoint") and len(set(digests)) == 3
    last = models[2][2].model.state_dict()
    assert federation.digest(last) == federation.digest(
        pretrained.load(run / "03_pretrain" / "checkpoint")[0].state_dict()
    )


def test_without_hours_there_is_no_quality_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "_of_folder", lambda name, title, folder, device: folder.name)
    folder = tmp_path / "03_pretrain"
    for name in ("checkpoints/model-00001", "checkpoints/model-00002", "checkpoint"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoint" / "config.json").touch()
    models = [(1, 1.0, "model-00001"), (2, 2.0, "model-00002"), (3, 3.0, "checkpoint")]
    for seconds, expected in ((None, []), (3600.0, models)):  # none: of a server that is not trusted
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        for number in (1, 2, 3):
            files.append_row(folder / "metrics.jsonl", {"kind": "round", "round": number, "audio_seconds": seconds})
        assert list(systems.along(tmp_path, CPU)) == expected
    (folder / "metrics.jsonl").unlink()
    assert list(systems.along(tmp_path, CPU)) == [], "without a ledger nobody knows how much was heard"
    (folder / "checkpoint" / "config.json").unlink()
    assert list(systems.along(tmp_path, CPU)) == [], "training that was stopped has no end to stand beside"
