"""The model against transformers and torchaudio, its initialisation, its checkpoints."""

import json

import pytest
import torch
import transformers

from fedhubert_lib import audio, hubert, seeds

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 24,
}
VARIANTS = {
    "base": hubert.preset("base", **SMALL),
    "large": hubert.preset("large", **SMALL),
    "large, group norm": hubert.preset("large", **SMALL, feat_extract_norm="group"),
    "base, layer norm, bias": hubert.preset("base", **SMALL, feat_extract_norm="layer", conv_bias=True),
}


def make(config: hubert.HubertConfig, seed: int = 0) -> hubert.Hubert:
    model = hubert.Hubert(config).eval()
    hubert.initialise(model, seeds.torch_generator(seed, "weights"))
    return model


def clips(count: int = 2, samples: int = 9_000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeds.torch_generator(0, "clips")
    waveforms = torch.randn(count, samples, generator=generator) * 0.1
    mask = torch.rand(count, audio.frame_count(samples), generator=generator) < 0.5
    return waveforms, mask


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_equal_transformers(tmp_path, variant, masked):
    config = VARIANTS[variant]
    ours = make(config)
    hubert.save(tmp_path / "checkpoint", ours)
    theirs = transformers.HubertModel.from_pretrained(tmp_path / "checkpoint").eval()
    waveforms, mask = clips()
    mask = mask if masked else None
    inputs = waveforms
    if config.do_normalize:
        inputs = torch.stack([(w - w.mean()) / torch.sqrt(w.var(correction=0) + 1e-7) for w in waveforms])
    with torch.no_grad():
        got = ours(waveforms, mask, hidden_states=True)
        expected = theirs(inputs, mask_time_indices=mask, output_hidden_states=True)
    assert len(got.hidden) == config.num_hidden_layers + 1
    for layer, (a, b) in enumerate(zip(got.hidden[:-1], expected.hidden_states[:-1], strict=True)):
        assert torch.allclose(a, b, rtol=0, atol=1e-5), (layer, (a - b).abs().max())
    assert torch.allclose(got.last, expected.last_hidden_state, rtol=0, atol=1e-5)
    assert torch.equal(got.last, got.hidden[-1])


def test_positional_convolution_has_fairseq_deviation():
    model = make(hubert.preset("base", num_hidden_layers=1, conv_dim=(8,) * 7))
    weight = model.encoder.pos_conv_embed.conv.weight
    assert weight.std().item() == pytest.approx((4 / (768 * 128)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("front_end", ["waveform", "logmel"])
def test_frames_of_both_front_ends(front_end):
    model = make(hubert.preset("tiny", front_end, **SMALL))
    for samples in (400, 719, 720, 1_039, 1_040, 16_000, 16_159, 16_160):
        with torch.no_grad():
            assert model(torch.randn(1, samples)).last.shape == (1, audio.frame_count(samples), 48)


def test_logmel_is_kaldis_and_independent_of_the_batch():
    import torchaudio

    waveforms, _ = clips(3)
    features = hubert.LogMel()(waveforms)
    assert torch.equal(features[:1], hubert.LogMel()(waveforms[:1]))
    kaldi = torchaudio.compliance.kaldi.fbank(waveforms[:1], num_mel_bins=80, dither=0.0, sample_frequency=16_000)
    kaldi = (kaldi - kaldi.mean(0)) / kaldi.std(0, correction=0)
    flat = features[0].reshape(-1, 80)[: len(kaldi)]
    assert torch.allclose(flat, kaldi, rtol=0, atol=1e-3)


def test_checkpoint_round_trip_is_bit_exact(tmp_path):
    for config in (VARIANTS["base"], hubert.preset("tiny", "logmel", position_embedding="sinusoidal")):
        model, head = make(config), hubert.Head(config, 7)
        hubert.initialise(head, seeds.torch_generator(1))
        hubert.save(tmp_path / "checkpoint", model, head)
        loaded, loaded_head = hubert.load(tmp_path / "checkpoint")
        assert loaded.config == config
        for a, b in ((model, loaded), (head, loaded_head)):
            assert a.state_dict().keys() == b.state_dict().keys()
            assert all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())


def test_public_layout_loads(tmp_path):
    """The names and config of facebook/hubert-base-ls960, older weight-norm names included."""
    from safetensors.torch import load_file, save_file

    model = make(VARIANTS["base"])
    hubert.save(tmp_path / "c", model)
    tensors = load_file(tmp_path / "c/model.safetensors")
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        tensors[f"encoder.pos_conv_embed.conv.{old}"] = tensors.pop(
            f"encoder.pos_conv_embed.conv.parametrizations.weight.{new}"
        )
    save_file(tensors, tmp_path / "c/model.safetensors")
    config = json.loads((tmp_path / "c/config.json").read_text())
    for name in ("front_end", "position_embedding", "feature_grad_mult", "do_normalize"):
        del config[name]
    (tmp_path / "c/config.json").write_text(json.dumps(config))
    loaded, head = hubert.load(tmp_path / "c")
    assert head is None
    waveforms, _ = clips()
    assert torch.equal(loaded(waveforms).last, model(waveforms).last)
