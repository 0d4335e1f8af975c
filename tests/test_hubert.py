"""The model against transformers and torchaudio, its front ends, its initialisation."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchaudio
import transformers
from bench_model import torchaudio_model

from fedhubert_lib import audio, batching, hubert, kernels, objectives, pretrained, seeds
from fedhubert_lib.export import formats

TOLERANCES = {"float32 states": 1e-5, "loss": 1e-5, "float64 states": 1e-9, "gradients": 1e-6, "mel energies": 1e-3}
"""Largest differences from the reference implementations: states and loss absolute, gradients relative."""
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


def make_head(config: hubert.HubertConfig, clusters: int = 11) -> hubert.Head:
    head = hubert.Head(config, clusters)
    hubert.initialise(head, seeds.torch_generator(1))
    return head


def clips(count: int = 2, samples: int = 9_000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeds.torch_generator(0, "clips")
    waveforms = torch.randn(count, samples, generator=generator) * 0.1
    mask = torch.rand(count, audio.frame_count(samples), generator=generator) < 0.5
    return waveforms, mask


def assert_gradients_equal(module: torch.nn.Module, reference: dict[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        norm = reference[name].norm()
        # k_proj.bias shifts all scores of a query by the same number: its gradient is zero but for rounding.
        assert (parameter.grad - reference[name]).norm() <= max(TOLERANCES["gradients"] * norm, 1e-9), name


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_equal_transformers(tmp_path, variant, masked):
    config = VARIANTS[variant]
    model = make(config)
    for layer in model.encoder.layers:  # as drawn, they hardly leave the range in which every activation is linear
        layer.feed_forward.intermediate_dense.weight.data.mul_(10)
    pretrained.save(tmp_path / "checkpoint", model)
    reference = transformers.HubertModel.from_pretrained(tmp_path / "checkpoint").eval()
    waveforms, mask = clips()
    mask = mask if masked else None
    inputs = audio.normalise(waveforms) if config.do_normalize else waveforms
    with torch.no_grad():
        output = model(waveforms, mask, hidden_states=True)
        expected = reference(inputs, mask_time_indices=mask, output_hidden_states=True)
    states = [*expected.hidden_states[:-1], expected.last_hidden_state]
    for layer, (ours, theirs) in enumerate(zip(output.hidden, states, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCES["float32 states"], msg=f"layer {layer}")
    assert torch.equal(output.last, output.hidden[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_transformers(tmp_path, variant, float64):
    """transformers has no pretraining class and no gradient scale: its model with our head."""
    config = hubert.replace(VARIANTS[variant], feature_grad_mult=1.0)
    model, head = make(config), make_head(config)
    pretrained.save(tmp_path / "checkpoint", model)
    reference = transformers.HubertModel.from_pretrained(tmp_path / "checkpoint").eval().double()
    model = pretrained.load(tmp_path / "checkpoint")[0].double()
    waveforms, mask = clips()
    labels = torch.randint(11, mask.shape, generator=seeds.torch_generator(2))
    sums = objectives.masked_prediction(model, head, batching.Batch(waveforms, labels, mask, ("a", "b")))
    sums.loss.backward()

    inputs = audio.normalise(waveforms) if config.do_normalize else waveforms
    last = reference(inputs, mask_time_indices=mask).last_hidden_state
    penalty = (reference.feature_extractor(inputs).square().mean((1, 2)) * mask.sum(1)).sum()
    loss = F.cross_entropy(head(last[mask]), labels[mask], reduction="sum") + 10 * penalty
    assert sums.loss.item() / sums.count == pytest.approx(loss.item() / sums.count, abs=TOLERANCES["loss"])
    loss.backward()
    assert_gradients_equal(model, {name: parameter.grad for name, parameter in reference.named_parameters()})


@pytest.mark.parametrize("variant", ["base", "large", "base, layer norm, bias"])
def test_states_loss_and_gradients_equal_torchaudio(variant, float64):
    """Hidden states, masked or not; the stacked logits' loss, penalty and all; gradients, scaled ones too."""
    off = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0}
    config = hubert.replace(VARIANTS[variant], **off)
    model, head = make(config).float().double().train(), make_head(config)  # torchaudio's mask embedding is float32
    reference = torchaudio_model(config, 11).train()
    weights = {f"wav2vec2.{name}": tensor.double() for name, tensor in formats.torchaudio_weights(model).items()}
    weights |= {f"logit_generator.{name}": tensor for name, tensor in head.state_dict().items()}
    weights["mask_generator.mask_embedding"] = model.masked_spec_embed
    reference.load_state_dict(weights)
    waveforms, _ = clips()
    frames = audio.frame_count(waveforms.shape[1])
    # fairseq's penalty and ours agree where the clips of a batch have equally many masked frames.
    mask = torch.stack([torch.randperm(frames, generator=seeds.torch_generator(i)) < 15 for i in range(2)])
    labels = torch.randint(11, mask.shape, generator=seeds.torch_generator(2))
    embedding = reference.mask_generator.mask_embedding
    reference.mask_generator.forward = lambda x, _: (torch.where(mask[..., None], embedding, x), mask)

    inputs = audio.normalise(waveforms) if config.do_normalize else waveforms
    inside = config.num_hidden_layers - config.do_stable_layer_norm  # theirs lacks pre-norm models' final LayerNorm
    with torch.no_grad():
        layers, _ = reference.wav2vec2.extract_features(inputs)
        hidden, masked_hidden = (model(waveforms, which, hidden_states=True).hidden for which in (None, mask))
    masked_layers: list[torch.Tensor] = []
    for layer in reference.wav2vec2.encoder.transformer.layers:
        layer.register_forward_hook(lambda _, __, output: masked_layers.append(output[0].detach()))
    logits, _, penalty = reference(inputs, labels)
    for ours, theirs in ((hidden, layers), (masked_hidden, masked_layers)):
        for state, expected in zip(ours[1 : 1 + inside], theirs[:inside], strict=True):
            torch.testing.assert_close(state, expected, rtol=0, atol=TOLERANCES["float64 states"])
    expected = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")
    expected = expected + 10 * penalty * len(logits)
    sums = objectives.masked_prediction(model, head, batching.Batch(waveforms, labels, mask, ("a", "b")))
    assert sums.count == mask.sum()
    assert sums.loss.item() / sums.count == pytest.approx(expected.item() / sums.count, abs=TOLERANCES["loss"])
    sums.loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    renamed = {"masked_spec_embed": gradients.pop("mask_generator.mask_embedding")}
    for name, gradient in gradients.items():
        name = name.removeprefix("wav2vec2.").removeprefix("logit_generator.").replace("encoder.transformer", "encoder")
        renamed[name.replace("encoder.feature_projection", "feature_projection")] = gradient
    assert renamed.keys() == {name for part in (model, head) for name, _ in part.named_parameters()}
    assert_gradients_equal(model, renamed)
    assert_gradients_equal(head, renamed)


def test_initialised_positional_convolution_has_fairseqs_standard_deviation():
    model = make(hubert.preset("base", num_hidden_layers=1, conv_dim=(8,) * 7))
    weight = model.encoder.pos_conv_embed.conv.weight
    assert weight.std().item() == pytest.approx((4 / (768 * 128)) ** 0.5, rel=0.01)


def test_initial_weights_have_fairseqs_spread():
    config = hubert.preset("tiny", num_hidden_layers=1, conv_dim=(64,) * 7)
    model, head = make(config), make_head(config, clusters=100)
    assert model.encoder.layers[0].attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    convolution = model.feature_extractor.conv_layers[1].conv.weight
    assert convolution.std().item() == pytest.approx((2 / (3 * 64)) ** 0.5, rel=0.05)
    for linear in (model.feature_projection.projection, head.final_proj):
        assert linear.weight.abs().max().item() == pytest.approx(linear.in_features**-0.5, rel=0.01)
    assert 0 <= head.label_embeddings.min() < 0.01 and 0.99 < head.label_embeddings.max() < 1


@pytest.mark.parametrize("variant", ["base", "large"])
def test_dropout_and_layerdrop_stand_where_fairseq_has_them(variant):
    rates = {"hidden_dropout": 0.1, "activation_dropout": 0.2, "feat_proj_dropout": 0.3, "layerdrop": 0.0}
    model, calls, (waveforms, _) = make(hubert.replace(VARIANTS[variant], **rates)).train(), Counter(), clips()
    for module in model.modules():
        if isinstance(module, kernels.Dropout):
            module.register_forward_hook(lambda module, *_: calls.update([module.p]))
    model(waveforms)
    layers = model.config.num_hidden_layers
    assert calls == {0.1: 1 + 2 * layers, 0.2: layers, 0.3: 1}
    model = make(hubert.replace(VARIANTS["base"], layerdrop=1.0))
    first, second, *_ = model(waveforms, hidden_states=True).hidden
    assert not torch.equal(first, second)
    first, *others = model.train()(waveforms, hidden_states=True).hidden
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("front_end", ["waveform", "logmel"])
def test_number_of_frames_of_both_front_ends(front_end):
    model = make(hubert.preset("tiny", front_end, **SMALL))
    for samples in (400, 719, 720, 1_039, 1_040, 16_000, 16_159, 16_160):
        with torch.no_grad():
            assert model(torch.randn(1, samples)).last.shape == (1, audio.frame_count(samples), 48)


def test_logmel_is_kaldis_and_independent_of_the_batch():
    waveforms, _ = clips(3)
    features = hubert.LogMel()(waveforms)
    assert torch.equal(features[:1], hubert.LogMel()(waveforms[:1]))
    kaldi = torchaudio.compliance.kaldi.fbank(waveforms[:1], num_mel_bins=80, dither=0.0, sample_frequency=16_000)
    kaldi = (kaldi - kaldi.mean(0)) / kaldi.std(0, correction=0)
    flat = features[0].reshape(-1, 80)[: len(kaldi)]
    assert torch.allclose(flat, kaldi, rtol=0, atol=TOLERANCES["mel energies"])


def test_config_refuses_sizes_that_do_not_fit():
    for wrong in (
        {"hidden_size": 100},
        {"conv_stride": (5, 2, 2, 2, 2, 2, 1)},
        {"conv_kernel": (10, 8, 4, 4, 4, 4, 4)},  # a frame would hear into the next clip
        {"front_end": "mfcc"},
        {"conv_dim": []},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            hubert.HubertConfig(**wrong)
