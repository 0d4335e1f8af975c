"""Checkpoints that transformers wrote, in the forms that public ones come in, give transformers' numbers or words."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedhubert_lib import hubert
from fedhubert_lib.evaluation import systems

SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "conv_dim": (64,) * 7,
    "num_conv_pos_embeddings": 16,
    "vocab_size": 32,
}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
WAVEFORMS = torch.randn(2, 8_000, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.02


def write(folder: Path, model: type = transformers.HubertModel, do_normalize: bool | None = False, **config):
    """A folder as transformers saves it; without a feature extractor where ``do_normalize`` is None."""
    shards = {"max_shard_size": config.pop("max_shard_size")} if "max_shard_size" in config else {}
    torch.manual_seed(0)
    theirs = model(model.config_class(**SIZES, **config)).eval()
    theirs.save_pretrained(folder, **shards)
    if do_normalize is not None:
        transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(folder)
    return theirs


def states(folder: Path) -> torch.Tensor:
    """Hidden states of the checkpoint as fedhubert reads it."""
    return torch.stack(hubert.load(folder)[0](WAVEFORMS, hidden_states=True).hidden).detach()


@torch.no_grad()
def expected(theirs: transformers.HubertModel, folder: Path) -> torch.Tensor:
    """Hidden states that transformers' own classes give of the same folder."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor(list(WAVEFORMS.numpy()), sampling_rate=16_000, return_tensors="pt").input_values
    output = theirs(inputs, output_hidden_states=True)
    return torch.stack([*output.hidden_states[:-1], output.last_hidden_state])


def move_to_processor(folder: Path) -> None:
    """What transformers 5 writes of a processor: the feature extractor's values inside processor_config.json."""
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    whole = {"feature_extractor": values, "processor_class": "Wav2Vec2Processor"}
    (folder / "processor_config.json").write_text(json.dumps(whole))


def drop_do_normalize(folder: Path) -> None:
    """Then transformers' default holds."""
    values = json.loads((folder / "preprocessor_config.json").read_text())
    del values["do_normalize"]
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("change", [lambda folder: None, move_to_processor, drop_do_normalize])
def test_a_large_model_normalises_as_its_folder_says(change, tmp_path):
    theirs = write(tmp_path, do_normalize=True, **LARGE)
    change(tmp_path)
    assert hubert.read_config(tmp_path).do_normalize
    torch.testing.assert_close(states(tmp_path), expected(theirs, tmp_path), rtol=0, atol=1e-4)


def test_a_large_model_that_does_not_say_is_refused_with_the_remedy(tmp_path):
    write(tmp_path, do_normalize=None, **LARGE)
    with pytest.raises(ValueError, match=r'preprocessor_config\.json with \{"do_normalize": true\}'):
        hubert.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    assert hubert.read_config(tmp_path).do_normalize


def test_group_norm_needs_no_word_since_it_all_but_removes_scale_and_offset(tmp_path):
    theirs = write(tmp_path, do_normalize=None)
    plain = states(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    torch.testing.assert_close(plain, expected(theirs, tmp_path), rtol=0, atol=1e-2)


def test_another_sample_rate_is_refused(tmp_path):
    write(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="8000 Hz; only 16000 Hz"):
        hubert.read_config(tmp_path)


def test_a_checkpoint_without_mask_embedding_loads_with_the_same_one_each_time(tmp_path):
    theirs = write(tmp_path, transformers.HubertForCTC, mask_time_prob=0.0)
    assert not any("masked_spec_embed" in name for name in load_file(tmp_path / "model.safetensors"))
    embeddings = [hubert.load(tmp_path)[0].masked_spec_embed for _ in range(2)]
    assert torch.equal(*embeddings) and embeddings[0].std() > 0
    torch.testing.assert_close(states(tmp_path), expected(theirs.hubert, tmp_path), rtol=0, atol=1e-4)


def test_shards_are_one_checkpoint(tmp_path):
    theirs = write(tmp_path, max_shard_size="200KB")
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(states(tmp_path), expected(theirs, tmp_path), rtol=0, atol=1e-4)
    before = systems._digest(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    assert systems._digest(tmp_path) != before, "features kept under the digest are those of these weights"
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} missing"):
        hubert.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match="weight_map of files beside it"):
        hubert.load(tmp_path)


def pickled(folder: Path) -> None:
    write(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    write(folder)
    (folder / "model.safetensors").unlink()


def cut_config(folder: Path) -> None:
    write(folder)
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: write(folder, transformers.Wav2Vec2Model), "model_type is 'wav2vec2'"),
        (lambda folder: write(folder, transformers.WavLMModel), "model_type is 'wavlm'"),
        (lambda folder: write(folder, conv_stride=(5, 2, 2, 2, 2, 2, 1)), "160 samples per frame; labels need 320"),
        (pickled, r"pytorch_model\.bin but no model\.safetensors\. Pickled"),
        (no_weights, r"holds no weights \(model\.safetensors\); copy the checkpoint again"),
        (cut_config, r"config\.json: is not JSON"),
    ],
)
def test_other_models_are_refused_without_reading_weights(make, words, tmp_path):
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        hubert.load(tmp_path, weights=False)


def test_a_look_without_weights_finds_what_loading_would(tmp_path):
    write(tmp_path, transformers.HubertForCTC)
    model, _ = hubert.load(tmp_path, weights=False)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="does not fit its config"):
        hubert.load(tmp_path, weights=False)
