"""Model folders: ours come back to the bit, those that transformers wrote give transformers' numbers or an error."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedhubert_lib import hubert, pretrained, seeds
from fedhubert_lib.evaluation import systems

SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "conv_dim": (64,) * 7,
    "num_conv_pos_embeddings": 16,
}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
WAVEFORMS = torch.randn(2, 8_000, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.02


def ours(folder: Path, config: hubert.HubertConfig, clusters: int | None = None) -> list[torch.nn.Module]:
    """Write a folder of ours; its modules."""
    modules = [hubert.Hubert(config)] + ([hubert.Head(config, clusters)] if clusters else [])
    for module in modules:
        hubert.initialise(module, seeds.torch_generator(0))
    pretrained.save(folder, *modules)
    return modules


def write(folder: Path, model: type = transformers.HubertModel, do_normalize: bool | None = False, **config):
    """A folder as transformers saves it; without a feature extractor where ``do_normalize`` is None."""
    shards = {"max_shard_size": config.pop("max_shard_size")} if "max_shard_size" in config else {}
    torch.manual_seed(0)
    reference = model(model.config_class(**SIZES, vocab_size=32, **config)).eval()
    reference.save_pretrained(folder, **shards)
    if do_normalize is not None:
        transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(folder)
    return reference


def edit(path: Path, **changes) -> None:
    """Change entries of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@torch.no_grad()
def assert_states_equal(folder: Path, reference: transformers.HubertModel, tolerance: float = 1e-4) -> None:
    """Hidden states of ``folder`` as fedhubert reads it are those of transformers' own classes."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor(list(WAVEFORMS.numpy()), sampling_rate=16_000, return_tensors="pt").input_values
    output = reference(inputs, output_hidden_states=True)
    expected = torch.stack([*output.hidden_states[:-1], output.last_hidden_state])
    states = torch.stack(pretrained.load(folder)[0](WAVEFORMS, hidden_states=True).hidden)
    torch.testing.assert_close(states, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("config", [hubert.preset("base", **SIZES), hubert.preset("tiny", "logmel")])
def test_round_trip_is_bit_exact(tmp_path, config):
    saved = ours(tmp_path / "checkpoint", config, clusters=7)
    edit(tmp_path / "checkpoint/config.json", position_embedding="conv")  # of an earlier version
    loaded = pretrained.load(tmp_path / "checkpoint")
    assert len({path.stat().st_mode for path in (tmp_path / "checkpoint").iterdir()}) == 1, "as the umask says"
    assert loaded[0].config == config
    for before, after in zip(saved, loaded, strict=True):
        assert before.state_dict().keys() == after.state_dict().keys()
        assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())


def test_old_names_and_missing_settings_of_public_checkpoints(tmp_path):
    """Names and config of facebook/hubert-base-ls960."""
    (model,) = ours(tmp_path / "c", hubert.preset("base", **SIZES))
    tensors = load_file(tmp_path / "c/model.safetensors")
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        conv = "encoder.pos_conv_embed.conv"
        tensors[f"{conv}.{old}"] = tensors.pop(f"{conv}.parametrizations.weight.{new}")
    tensors["final_proj.weight"] = torch.zeros(4, 4)  # of ContentVec
    save_file(tensors, tmp_path / "c/model.safetensors")
    edit(tmp_path / "c/config.json", **dict.fromkeys(("front_end", "feature_grad_mult", "do_normalize")))
    loaded, head = pretrained.load(tmp_path / "c")
    assert head is None
    assert torch.equal(loaded(WAVEFORMS).last, model.eval()(WAVEFORMS).last)


def to_processor(folder: Path) -> None:
    """transformers 5 writes the feature extractor's values into processor_config.json."""
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    whole = {"feature_extractor": values, "processor_class": "Wav2Vec2Processor"}
    (folder / "processor_config.json").write_text(json.dumps(whole))


def without_do_normalize(folder: Path) -> None:
    """Then transformers' default, True, holds."""
    edit(folder / "preprocessor_config.json", do_normalize=None)


@pytest.mark.parametrize("size", [{}, LARGE])
@pytest.mark.parametrize("change", [lambda folder: None, to_processor, without_do_normalize])
def test_do_normalize_is_read_wherever_it_stands(change, size, tmp_path):
    reference = write(tmp_path, do_normalize=True, **size)
    change(tmp_path)
    model, head = pretrained.load(tmp_path)
    assert head is None and model.config.do_normalize and model.config.layerdrop == reference.config.layerdrop
    assert_states_equal(tmp_path, reference)


def test_layer_norm_models_without_do_normalize_are_refused(tmp_path):
    write(tmp_path, do_normalize=None, **LARGE)
    with pytest.raises(ValueError, match=r'preprocessor_config\.json with \{"do_normalize": true\}'):
        pretrained.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    assert pretrained.read_config(tmp_path).do_normalize


def test_group_norm_models_without_do_normalize_hardly_differ(tmp_path):
    reference = write(tmp_path, do_normalize=None)
    states = pretrained.load(tmp_path)[0](WAVEFORMS).last
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    assert_states_equal(tmp_path, reference)
    torch.testing.assert_close(states, pretrained.load(tmp_path)[0](WAVEFORMS).last, rtol=0, atol=1e-2)


def test_missing_mask_embedding_is_the_same_each_time(tmp_path):
    reference = write(tmp_path, transformers.HubertForCTC, mask_time_prob=0.0)
    assert not any("masked_spec_embed" in name for name in load_file(tmp_path / "model.safetensors"))
    embeddings = [pretrained.load(tmp_path)[0].masked_spec_embed for _ in range(2)]
    assert torch.equal(*embeddings) and embeddings[0].std() > 0
    assert_states_equal(tmp_path, reference.hubert)


def test_shards_are_one_checkpoint(tmp_path):
    reference = write(tmp_path, max_shard_size="200KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_states_equal(tmp_path, reference)
    before = systems._digest(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    assert systems._digest(tmp_path) != before, "features kept under the digest are those of these weights"
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        pretrained.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match="weight_map"):
        pretrained.load(tmp_path)


def pickled(folder: Path) -> None:
    write(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def changed(file: str, text: bytes | None) -> callable:
    """A folder with ``text`` instead of what ``file`` holds; None: without the file; as a cut in ``write``."""

    def make(folder: Path) -> None:
        write(folder)
        (folder / file).unlink() if text is None else (folder / file).write_bytes(text)

    return make


def huge(folder):
    """Of sizes that no memory holds."""
    write(folder)
    edit(folder / "config.json", hidden_size=9_600, intermediate_size=100_000)


def other_depth(folder: Path) -> None:
    write(folder, transformers.HubertForCTC)
    edit(folder / "config.json", num_hidden_layers=2)


def deep(folder: Path) -> None:
    write(folder)
    edit(folder / "config.json", num_hidden_layers=100_000)  # to be made, they would take minutes and all memory


def not_finite(folder: Path) -> None:
    write(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layers.0.attention.k_proj.weight"][1, 2] = torch.nan
    save_file(tensors, folder / "model.safetensors")


def other_rate(folder: Path) -> None:
    write(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 1.5), ("num_hidden_layers", 10**6), ("intermediate_size", []), ("hidden_size", "96"),
        ("num_conv_pos_embeddings", 0), ("num_attention_heads", -1), ("num_attention_heads", 0), ("conv_dim", 64),
        ("conv_kernel", [10, 3, 3, 3, 3, 2, "2"]), ("layer_norm_eps", "nan"), ("layer_norm_eps", -1.0),
        ("hidden_dropout", [0.1]), ("layerdrop", 5), ("attention_dropout", 1.0),
        ("feat_proj_layer_norm", "yes"), ("do_stable_layer_norm", 2),
    ],
)  # fmt: skip
def test_settings_of_another_type_or_size_are_named(name, value, tmp_path):
    write(tmp_path)
    edit(tmp_path / "config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json: .*{name}"):
        pretrained.load(tmp_path, weights=False)


def test_a_public_large_models_convolutions_train_at_the_published_gradient(tmp_path):
    """The files of transformers do not say so."""
    write(tmp_path, do_stable_layer_norm=True)
    config = pretrained.read_config(tmp_path)
    assert (config.feature_grad_mult, config.classifier_proj_size) == (1.0, 768)
    write(tmp_path)
    assert pretrained.read_config(tmp_path).feature_grad_mult == 0.1


def test_what_is_no_json_object_or_no_weight_is_named(tmp_path):
    write(tmp_path, max_shard_size="200KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(shard).items()}, shard)
    with pytest.raises(ValueError, match=rf"{shard.name}: .* \(torch.int8\)"):
        pretrained.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match=r"index\.json: holds no JSON object weight_map"):
        pretrained.load(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"feature_extractor": "wav2vec2"}')
    with pytest.raises(ValueError, match=r"processor_config\.json: holds no JSON object feature_extractor"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, r"holds no config\.json; give the folder"),
        (lambda folder: folder.rmdir(), "no such folder"),
        (lambda folder: write(folder / "checkpoint"), r"holds no config\.json; give .*/checkpoint$"),
        (lambda folder: write(folder, transformers.Wav2Vec2Model), "wav2vec2"),
        (lambda folder: write(folder, transformers.WavLMModel), "wavlm"),
        (lambda folder: write(folder, conv_stride=(5, 2, 2, 2, 2, 2, 1)), r"/config\.json: conv_kernel, .*400 per 320"),
        (other_rate, "8000 Hz"),
        (pickled, r"pytorch_model\.bin"),
        (changed("model.safetensors", None), r"model\.safetensors"),
        (changed("model.safetensors", b"cut"), r"model\.safetensors: cannot be read"),
        (changed("config.json", b'{"model_type": '), r"config\.json: is not JSON"),
        (changed("config.json", b'{"a":' * 100_000), r"config\.json: is not JSON"),
        (changed("preprocessor_config.json", b"[" * 100_000), r"preprocessor_config\.json: is not JSON"),
        (not_finite, r"encoder\.layers\.0\.attention\.k_proj\.weight .* not all finite"),
        (other_depth, r"does not fit its config\.json.*encoder\.layers\.2"),
        (deep, r"does not fit its config\.json: it has 3 of num_hidden_layers: 100000"),
        (huge, r"does not fit its config\.json.*size mismatch"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_other_folders_are_refused_with_or_without_reading_weights(make, words, weights, tmp_path):
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){words}"):
        pretrained.load(tmp_path, weights=weights)


def test_loading_without_weights_keeps_none(tmp_path):
    write(tmp_path, transformers.HubertForCTC)
    model, _ = pretrained.load(tmp_path, weights=False)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
