"""Exports: loaded by the software they are for, on lengths they were not made with; a wrong one is refused."""

import ast
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel, dynamic_module_utils

from fedhubert_lib import files, hubert, pretrained, seeds
from fedhubert_lib.evaluation import cost
from fedhubert_lib.export import card, formats, onnx, s3prl
from fedhubert_lib.federated import accounting, privacy

PRESETS = {
    "post-norm": ("tiny", "waveform", {**SMALL, "conv_dim": (16,) * 7}),
    "pre-norm": ("large", "waveform", {**SMALL, "conv_dim": (16,) * 7}),
    "logmel": ("tiny", "logmel", SMALL),
    "pre-norm logmel": ("large", "logmel", SMALL),
}


def build(kind: str) -> hubert.Hubert:
    name, front_end, changes = PRESETS[kind]
    model = hubert.Hubert(hubert.preset(name, front_end, **changes))
    hubert.initialise(model, seeds.torch_generator(0))
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path):
    def save(kind: str):
        pretrained.save(tmp_path / "checkpoint", build(kind), hubert.Head(build(kind).config, 5))
        return tmp_path / "checkpoint"

    return save


@pytest.mark.parametrize("kind", PRESETS)
def test_traced_module_gives_the_models_states(kind):
    module = onnx.HiddenStates(build(kind))
    assert formats.compare(build(kind), module) < 5e-4


def test_compare_refuses_other_numbers_and_shapes():
    model, other = build("post-norm"), build("pre-norm")
    states = lambda source, waveforms: source(waveforms, hidden_states=True).hidden  # noqa: E731
    assert formats.compare(model, lambda waveforms: states(model, waveforms)) == 0
    with pytest.raises(formats.ExportError, match="differ from the source's"):
        formats.compare(model, lambda waveforms: states(other, waveforms))
    with pytest.raises(formats.ExportError, match="the source gives"):
        formats.compare(model, lambda waveforms: states(model, waveforms)[1:])
    with pytest.raises(formats.ExportError, match="nan"):  # never within the tolerance
        formats.compare(model, lambda waveforms: [state * torch.nan for state in states(model, waveforms)])


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm"])
@pytest.mark.parametrize("export", [formats.to_huggingface, formats.to_torchaudio])
def test_published_architectures_load_offline(checkpoint, tmp_path, monkeypatch, export, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert export(checkpoint(kind), tmp_path / "out") < 1e-4
    assert not (tmp_path / "out" / "head.safetensors").exists()


def test_large_states_may_differ_by_as_large_a_part():
    """The residual stream of a trained pre-norm model grows; its rounding, too."""
    model = build("pre-norm").eval()
    for layer in model.encoder.layers:
        layer.feed_forward.output_dense.weight.data *= 1e5
    off = lambda waveforms, part: [s * (1 + part) for s in model(waveforms, hidden_states=True).hidden]  # noqa: E731
    largest = model(formats.noise(1, 16_000), hidden_states=True).hidden[-2].abs().max()  # the last is normalised
    assert largest > 100 and formats.compare(model, lambda waveforms: off(waveforms, 1e-4)) < 2e-4
    with pytest.raises(formats.ExportError, match="differ"):
        formats.compare(model, lambda waveforms: off(waveforms, 1e-2))


@pytest.mark.parametrize("kind", ["logmel", "pre-norm logmel"])
def test_architectures_of_ours_load_with_the_code_in_the_export(checkpoint, tmp_path, kind):
    folder, out = checkpoint(kind), tmp_path / "out"
    assert formats.to_huggingface(folder, out) < 1e-4
    source, again = (pretrained.load(path)[0].state_dict() for path in (folder, out))
    assert source.keys() == again.keys() and all((source[name] == again[name]).all() for name in source)
    with pytest.raises(formats.ExportError, match="torchaudio knows only.*huggingface or ONNX"):
        formats.to_torchaudio(folder, tmp_path / "other")


def test_what_others_do_not_know_is_refused_before_it_is_written(tmp_path):
    for changes, export, words in (
        ({"feat_proj_layer_norm": False}, formats.to_torchaudio, "feat_proj_layer_norm False"),
        ({"conv_dim": (SMALL["hidden_size"],) * 7}, s3prl.to_hubert_local, "hidden_size is its conv_width"),
    ):
        config = hubert.preset("tiny", **{**SMALL, "conv_dim": (16,) * 7, **changes})
        pretrained.save(tmp_path / "checkpoint", hubert.Hubert(config))
        with pytest.raises(formats.ExportError, match=words):
            export(tmp_path / "checkpoint", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_code_in_the_export_needs_torch_and_transformers_alone():
    tree = ast.parse(Path(formats.__file__).with_name(formats.CODE).read_text(encoding="utf-8"))
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    named |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in named} == {"typing", "torch", "transformers"}


@torch.no_grad()
def test_padded_clips_of_a_log_mel_export_are_as_alone(checkpoint, tmp_path, monkeypatch):
    """Lengths around a pair of 10 ms frames, where the last whole one is repeated; ones after the end."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", tmp_path / "cache")
    formats.to_huggingface(checkpoint("pre-norm logmel"), tmp_path / "out")
    assert not (tmp_path / "cache").exists(), "the comparison leaves nothing there"
    exported = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    clips = [formats.noise(1, samples)[0] for samples in (400, 559, 560, 8_123, 16_000)]
    batch = extractor([clip.numpy() for clip in clips], sampling_rate=16_000, return_tensors="pt", padding=True)
    batch["input_values"] += 1 - batch["attention_mask"]
    states = exported(**batch).last_hidden_state
    for clip, state in zip(clips, states, strict=True):
        alone = build("pre-norm logmel")(clip[None]).last[0]
        torch.testing.assert_close(state[: len(alone)], alone, atol=1e-4, rtol=0)
    batch["attention_mask"][1, 399:] = 0
    with pytest.raises(ValueError, match="clip 1 of the batch has 399 samples"):
        exported(**batch)
    long = formats.noise(1, 80_000)  # samples that float16 cannot count
    assert (exported.half()(long.half()).last_hidden_state - build("pre-norm logmel")(long).last).abs().max() < 0.1


def test_an_export_that_differs_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    good = formats.torchaudio_weights
    changed = lambda model: {name: tensor + 0.05 for name, tensor in good(model).items()}  # noqa: E731
    monkeypatch.setattr(formats, "torchaudio_weights", changed)
    with pytest.raises(formats.ExportError, match="differ"):
        formats.to_torchaudio(checkpoint("post-norm"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_folder_is_noticed(checkpoint, tmp_path):
    folder = checkpoint("post-norm")
    formats.to_huggingface(folder, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "encoder.layer_norm.bias": tensors["encoder.layer_norm.bias"] + 0.1}, path, {"format": "pt"})
    with pytest.raises(formats.ExportError, match="differ"):
        formats.check_huggingface(pretrained.load(folder)[0], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", PRESETS)
def test_onnx_takes_any_clips_of_any_length(checkpoint, tmp_path, kind):
    facts = onnx.export(checkpoint(kind), tmp_path / "out")
    assert facts["difference"] < 5e-4 and facts["int8_cosine"] > 0.99
    assert json.loads((tmp_path / "out" / "onnx.json").read_text())["int8_cosine"] == facts["int8_cosine"]
    assert facts["int8_bytes"] < facts["bytes"]


def test_macs_are_those_of_the_published_network():
    """The notes of others: HuBERT base takes 6.91 G for a second (flop counter / 2)."""
    base = hubert.preset("base")
    with torch.device("meta"):
        model = hubert.Hubert(base)
    assert cost.parameters(model) == pytest.approx(94.37e6, rel=1e-4)
    assert cost.macs(base) == pytest.approx(6.91e9, rel=0.01)
    assert cost.macs(base, seconds=10) == pytest.approx(74.07e9, rel=0.01)
    assert cost.macs(hubert.preset("tiny")) == pytest.approx(0.26e9, rel=0.05)


def test_macs_of_a_log_mel_model_are_those_of_fast_fourier_transforms():
    frames, width, layers = 49, 192, 4
    per_frame = 160 * width + 128 * width**2 // 16 + layers * (12 * width**2 + 2 * frames * width)
    front_end = 98 * (5 / 4 * 512 * 9 + 257 * 80)
    # PyTorch's positions make one frame more than the model keeps.
    assert cost.macs(hubert.preset("tiny", "logmel")) == pytest.approx(frames * per_frame + front_end, rel=0.005)


@pytest.fixture
def stage(tmp_path):
    """04_distill of a run, not evaluated."""
    run = tmp_path / "study"
    pretrained.save(run / "04_distill" / "checkpoint", build("logmel"))
    tables = {
        "00_corpus/manifest.parquet": {"split": "train", "samples": 16_000 * 3600, "sample_rate": 16_000}
        | {"utterance": ["a-1", "b-1", "c-1"], "speaker": ["a", "b", "c"], "subset": "train-clean-100"},
        "01_partition/heldout.parquet": {"utterance": ["b-1"]},
        "01_partition/clients.parquet": {"client": ["client-000", "client-001"], "hours": [0.9, 0.1]}
        | {"train_utterances": [3, 1], "validation_utterances": [1, 0], "speakers": [1, 1]},
    }
    for name, columns in tables.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(columns).to_parquet(run / name)
    (run / "00_corpus" / "params.yaml").write_text("kind: librispeech\n")
    training = ("device: cpu", "teacher: /a/place", "privacy: none", "rounds: 3", "codebook: federated")
    (run / "04_distill" / "params.yaml").write_text("\n".join(training))
    return run / "04_distill"


def written(stage) -> str:
    card.export(stage / "checkpoint", stage / "README.md")
    return (stage / "README.md").read_text()


def test_card_of_data_training_and_results(stage):
    text = written(stage)
    assert text.startswith("---\nlicense: other\n") and "Not evaluated" in text, "the teacher has one of its own"
    assert "1.00 h, 5 utterances, 2 speakers" in text and "rounds done: unknown" in text
    assert "clients: 2 with 0.1 to 0.9 h of it each, partition scheme unknown" in text
    assert "* distill: no reference curves" in text and "* evaluate: " not in text
    assert "parameters: teacher place, privacy none, rounds 3, codebook federated\n" in text
    assert "Trained on the speech named above, and what place had heard; other" in text
    before = (stage / "params.yaml").read_text()
    (stage / "params.yaml").write_text("codebook: federated\nrounds: 3\n")
    assert "license: cc-by-4.0\n" in written(stage) and "speech: LibriSpeech (CC BY 4.0)" in written(stage)
    manifest = stage.parent / "00_corpus" / "manifest.parquet"
    pd.read_parquet(manifest).assign(subset="clinic").to_parquet(manifest)
    assert "license: other\n" in written(stage) and "speech: folders in the layout of LibriSpeech" in written(stage)
    (stage / "params.yaml").write_text(before)
    (stage.parent / "02_kmeans").mkdir()
    codebook = stage.parent / "02_kmeans" / "codebooks" / "federated" / "codebook.json"
    files.write_json(codebook, {"labelled": ["client-000"]})  # 02 went on without the other
    assert "0.90 h, 4 utterances, 1 speakers" in written(stage) and "clients: 1 with 0.9 to 0.9 h" in written(stage)
    (stage.parent / "02_kmeans/params.yaml").write_text("features: /runs/first/03_pretrain/checkpoint\n")
    assert "what place had heard, and what first/03_pretrain had heard" in written(stage)
    shutil.rmtree(stage.parent / "02_kmeans")
    files.append_row(stage / "metrics.jsonl", {"kind": "round", "round": 1, "loss": 2.5})
    files.append_row(stage / "metrics.jsonl", {"kind": "round", "round": 2, "loss": None})  # with privacy: client
    assert "last loss: 2.5" in written(stage) and "rounds done: 2" in written(stage)

    figure = {"system": "student", "measure": "keyword-accuracy", "layer": None, "seeds": 2}
    figure |= {"value": 0.5, "low": 0.4, "high": 0.6, "values": [0.45, 0.55]}
    report = {"systems": [{"system": "student", "title": "federated student"}], "figures": [figure]}
    files.write_json(stage.parent / "05_evaluate" / "report.json", report)
    assert card.export(stage / "checkpoint", stage / "README.md") == {"tables of results": 1}
    assert "keyword accuracy |\n| --- | --- |\n| federated student | 0.500 ± 0.100 |" in written(stage)
    with pytest.raises(formats.ExportError, match="not the checkpoint of a run's"):
        card.export(stage, stage / "README.md")


def test_there_is_no_card_of_a_student_of_an_older_teacher(stage):
    """It would say what its present teacher has, such as privacy."""
    for name, inputs in (("03_pretrain", {}), ("04_distill", {"03_pretrain": "older"})):
        done = {"identity": {"inputs": inputs, "parameters": {}}, "outputs": "newer", "federated": "newer"}
        for record in ("begun", "done"):
            files.write_json(stage.parent / name / f"{record}.json", done)
    with pytest.raises(formats.ExportError, match="04_distill is made from an older 03_pretrain; run it again"):
        card.export(stage / "checkpoint", stage / "README.md")


def test_card_of_the_privacy_of_updates(stage):
    """A student's are those of its teacher, too; no loss is told that the noise does not cover."""
    assert "updates: student: none" in written(stage)
    spent = {"server": 3.0, "not private: noise drawn from the seed": 4.25}
    for number, (label, epsilon) in enumerate(spent.items()):
        row = {"kind": "round", "round": number, "loss": 2.5, "epsilon": epsilon, "privacy": label}
        files.append_row(stage / "metrics.jsonl", row)
        assert f"updates: student: {label}, epsilon {epsilon:g}" in written(stage)
    assert "had the noise been secret" in written(stage)
    assert "last loss: not told" in written(stage) and "* distill: " not in written(stage)
    (stage / "params.yaml").write_text("privacy: server\n")
    (stage.parent / "03_pretrain").mkdir()
    (stage.parent / "03_pretrain" / "params.yaml").write_text("privacy: none\ncodebook: central\n")
    assert "updates: teacher: none; student: not private" in written(stage)
    assert "audio, features and labels: pooled to start the codebook\n" in written(stage)


def test_card_adds_up_what_teacher_and_student_have_spent(stage):
    """Less than the sum of their epsilons; and says of whose training it knows nothing."""
    (stage.parent / "03_pretrain").mkdir()
    for name, label, count in (("03_pretrain", "server", 40), ("04_distill", "not private: seeded", 20)):
        folder = stage.parent / name
        (folder / "params.yaml").write_text("privacy: server\nprivacy_delta: 1.0e-05\n")
        for number in range(count):
            row = {"round": number, "attempt": 0, "probability": 0.1, "multiplier": 1.25}
            accounting.charge(folder / privacy.ACCOUNT, row, False)
        row = {"kind": "round", "round": count, "loss": 2.5, "epsilon": 3.0, "privacy": label}
        files.append_row(folder / "metrics.jsonl", row)
    epsilon = accounting.epsilon([(0.1, 1.25, 60)], 1e-5)
    assert f"; together: epsilon {epsilon:.3g}, had the noise been secret, at delta 1e-05\n" in written(stage)
    with (stage / "params.yaml").open("a") as stream:
        stream.write("teacher: /other/03_pretrain/checkpoint\n")
    text = written(stage)
    assert "; what other/03_pretrain has spent on the same clients is not in this\n" in text and "together" not in text


def test_card_of_the_privacy_of_cluster_statistics(stage):
    assert "cluster statistics: unknown" in written(stage)
    kmeans = stage.parent / "02_kmeans"
    kmeans.mkdir()
    (kmeans / "params.yaml").write_text("noise_multiplier: 0.0\nnoise_clip: 100.0\n")
    assert "cluster statistics: none: " in written(stage)
    (kmeans / "params.yaml").write_text("noise_multiplier: 4.0\nnoise_clip: 100.0\n")
    for label, words in (("client", ""), ("not private: noise drawn from the seed", ", had the noise been secret,")):
        spent = {"epsilon": 2.5, "delta": 1e-5, "privacy": label}
        files.write_json(kmeans / "quality.json", {"codebooks": {"federated": spent, "client": {}}})
        assert f"cluster statistics: {label}; Gaussian noise of 4.0 x norm 100.0" in written(stage)
        assert f"epsilon 2.5{words} at delta 1e-05" in written(stage)
    (stage / "params.yaml").write_text("codebook: client\n")
    assert "no statistics of codebook client left a client" in written(stage)
    assert "audio, features and labels: never left their client (a simulation: all" in written(stage)
    (stage / "params.yaml").write_text("codebook: central\n")
    assert "audio, features and labels: pooled to start the codebook\n" in written(stage)
