"""Exports: loaded by the software they are for, on lengths they were not made with; another model is told apart."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedhubert_lib import files, hubert, seeds
from fedhubert_lib.evaluation import cost
from fedhubert_lib.export import card, checks, huggingface, onnx, torchaudio, twin

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 3}
PRESETS = {
    "post-norm": ("tiny", "waveform", {**SMALL, "conv_dim": (16,) * 7}),
    "pre-norm": ("large", "waveform", {**SMALL, "conv_dim": (16,) * 7}),
    "logmel": ("tiny", "logmel", SMALL),
}


def build(kind):
    name, front_end, changes = PRESETS[kind]
    model = hubert.Hubert(hubert.preset(name, front_end, **changes))
    hubert.initialise(model, seeds.torch_generator(0))
    return model.eval()


@pytest.fixture(params=list(PRESETS))
def model(request):
    return build(request.param)


@pytest.fixture
def checkpoint(tmp_path):
    def save(kind):
        hubert.save(tmp_path / "checkpoint", build(kind), hubert.Head(build(kind).config, 5))
        return tmp_path / "checkpoint"

    return save


def test_twin_is_the_model(model):
    assert checks.compare(model, twin.Layers(model)) < 5e-4


def test_comparison_notices_another_model_and_other_shapes(model):
    other = build("post-norm" if model.config.do_stable_layer_norm else "pre-norm")
    with pytest.raises(checks.ExportError, match="differ from the source's"):
        checks.compare(model, lambda waveforms: other(waveforms, hidden_states=True).hidden)
    with pytest.raises(checks.ExportError, match="2 states .* where the source has 3"):
        checks.compare(model, lambda waveforms: model(waveforms, hidden_states=True).hidden[1:])
    with pytest.raises(checks.ExportError, match="differ"):  # a NaN is never within the tolerance
        checks.compare(model, lambda waveforms: [layer * torch.nan for layer in twin.Layers(model)(waveforms)])


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm"])
def test_transformers_loads_the_folder_offline(checkpoint, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert huggingface.export(checkpoint(kind), tmp_path / "out") < 1e-4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm"])
def test_torchaudio_loads_the_folder(checkpoint, tmp_path, kind):
    assert torchaudio.export(checkpoint(kind), tmp_path / "out") < 1e-4


def test_an_export_that_differs_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    good = twin.weights
    monkeypatch.setattr(twin, "weights", lambda model: {name: tensor + 0.05 for name, tensor in good(model).items()})
    with pytest.raises(checks.ExportError, match="differ"):
        torchaudio.export(checkpoint("post-norm"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_folder_is_noticed(checkpoint, tmp_path):
    folder = checkpoint("post-norm")
    huggingface.export(folder, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "encoder.layer_norm.bias": tensors["encoder.layer_norm.bias"] + 0.1}, path, {"format": "pt"})
    with pytest.raises(checks.ExportError, match="differ"):
        huggingface.check(hubert.load(folder)[0], tmp_path / "out")


@pytest.mark.parametrize("exporter", [huggingface, torchaudio])
def test_architectures_of_ours_are_refused_with_the_way_out(checkpoint, tmp_path, exporter):
    with pytest.raises(checks.ExportError, match="front_end logmel.*ONNX"):
        exporter.export(checkpoint("logmel"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(PRESETS))
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
    small = hubert.preset("tiny", conv_dim=(128,) * 7)
    assert cost.macs(small) == pytest.approx(0.26e9, rel=0.05)


def test_macs_of_a_log_mel_model_are_those_of_fast_fourier_transforms():
    frames, width, layers = 49, 192, 4
    per_frame = 160 * width + 128 * width**2 // 16 + layers * (12 * width**2 + 2 * frames * width)
    front_end = 98 * (5 / 4 * 512 * 9 + 257 * 80)
    # torchaudio's positions make one frame more than they keep.
    assert cost.macs(hubert.preset("tiny", "logmel")) == pytest.approx(frames * per_frame + front_end, rel=0.005)


def test_card_tells_what_the_run_knows(tmp_path):
    run = tmp_path / "study"
    stage = run / "04_distill"
    hubert.save(stage / "checkpoint", build("logmel"))
    tables = {
        "00_corpus/manifest.parquet": {"split": ["train"], "samples": [16_000 * 3600], "sample_rate": [16_000]}
        | {"speaker": ["a"], "subset": ["train-clean-100"]},
        "01_partition/clients.parquet": {"client": ["client-000"]},
    }
    for name, columns in tables.items():
        (run / name).parent.mkdir(parents=True)
        pd.DataFrame(columns).to_parquet(run / name)
    (run / "00_corpus" / "params.yaml").write_text("kind: librispeech\n")
    (stage / "params.yaml").write_text("privacy: none\nrounds: 3\nobjectives: [hubert]\n")
    card.export(stage / "checkpoint", tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlicense: cc-by-4.0\n") and "1.00 h, 1 utterances" in text and "Not evaluated" in text
    assert "differential privacy: none" in text and "partition scheme unknown" in text

    rows = [{"kind": "round", "round": 1, "loss": 2.5, "epsilon": 3.0, "privacy": "server"}]
    rows += [rows[0] | {"round": 2, "loss": None, "epsilon": 4.25, "privacy": "not private: noise drawn from the seed"}]
    texts = ["server\n* epsilon: 3\n", "not private: noise drawn from the seed\n* epsilon: 4.25, had"]
    for row, said in zip(rows, texts, strict=True):
        files.append_row(stage / "metrics.jsonl", row)
        card.export(stage / "checkpoint", tmp_path / "README.md")
        assert f"differential privacy: {said}" in (tmp_path / "README.md").read_text()
    assert "last loss: 2.5" in (tmp_path / "README.md").read_text()

    figure = {"system": "student", "measure": "keyword-accuracy", "value": 0.5, "high": 0.6}
    report = {"measures": [{"measure": "keyword-accuracy", "title": "keyword accuracy"}]}
    report |= {"systems": [{"system": "teacher"}, {"system": "student"}], "figures": [figure]}
    files.write_json(run / "05_evaluate" / "report.json", report)
    assert card.export(stage / "checkpoint", tmp_path / "README.md") == {"results": 1.0}
    assert "| keyword accuracy | 0.500 ± 0.100 |" in (tmp_path / "README.md").read_text()
    with pytest.raises(checks.ExportError, match="not the checkpoint of a run's"):
        card.export(tmp_path / "study", tmp_path / "README.md")
