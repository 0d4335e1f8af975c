"""The model against transformers and torchaudio, its initialisation, its checkpoints."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers

from fedhubert_lib import audio, batching, hubert, objectives, seeds, training

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
    for layer in ours.encoder.layers:  # as drawn, they hardly leave the range in which every activation is linear
        layer.feed_forward.intermediate_dense.weight.data.mul_(10)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_transformers(tmp_path, variant, request):
    """transformers has no pretraining class: its model with our head; loss to 1e-5, gradients to 1e-6 relative."""
    config = hubert.replace(VARIANTS[variant], feature_grad_mult=1.0)  # which transformers has not
    ours, head = make(config), hubert.Head(config, 11)
    hubert.initialise(head, seeds.torch_generator(1))
    hubert.save(tmp_path / "checkpoint", ours)
    theirs = transformers.HubertModel.from_pretrained(tmp_path / "checkpoint").eval().double()
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(partial(torch.set_default_dtype, torch.float32))
    ours, head = ours.double(), head.double()
    waveforms, mask = clips()
    labels = torch.randint(11, mask.shape, generator=seeds.torch_generator(2))
    sums = objectives.masked_prediction(ours, head, batching.Batch(waveforms.double(), labels, mask, ("a", "b")))
    sums.loss.backward()

    inputs = audio.normalise(waveforms.double()) if config.do_normalize else waveforms.double()
    last = theirs(inputs, mask_time_indices=mask).last_hidden_state
    features = theirs.feature_extractor(inputs)
    penalty = (features.square().mean((1, 2)) * mask.sum(1)).sum()
    loss = F.cross_entropy(head(last[mask]), labels[mask], reduction="sum") + 10 * penalty
    assert sums.loss.item() / sums.count == pytest.approx(loss.item() / sums.count, abs=1e-5)
    head.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp_min(1e-9)
        # k_proj.bias shifts all scores of a query alike: its gradient is zero but for rounding.
        assert difference < 1e-6 or gradients[name].norm() < 1e-9, (name, difference)


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
    waveforms, mask = clips()
    assert torch.equal(loaded(waveforms).last, model(waveforms).last)
    head = hubert.Head(loaded.config, 5)
    batch = batching.Batch(waveforms, torch.zeros_like(mask, dtype=torch.long), mask, ("a", "b"))
    training.local_update(
        torch.nn.ModuleList([loaded, head]),
        [batch],
        lambda batch, _: objectives.masked_prediction(loaded, head, batch),
        training.Settings(learning_rate=1e-3, warmup_steps=0),
        first_step=0,
        total_steps=1,
        seed=0,
    )
    assert not torch.equal(loaded.masked_spec_embed, model.masked_spec_embed)


def test_a_folder_that_transformers_wrote_loads_whole(tmp_path):
    """Their defaults are facebook/hubert-base-ls960 but for the sizes; its feature extractor normalises."""
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()}
    theirs = transformers.HubertModel(transformers.HubertConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    ours, head = hubert.load(tmp_path)
    assert head is None and ours.config.do_normalize and ours.config.layerdrop == theirs.config.layerdrop
    waveforms, _ = clips()
    with torch.no_grad():
        got, expected = ours(waveforms).last, theirs(audio.normalise(waveforms)).last_hidden_state
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)


def test_foreign_folders_are_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        hubert.load(tmp_path)
    hubert.save(tmp_path / "c", make(VARIANTS["base"]))
    (tmp_path / "c/model.safetensors").rename(tmp_path / "c/pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="never read"):
        hubert.load(tmp_path / "c")
    hubert.save(tmp_path / "c", make(VARIANTS["base"]))
    config = json.loads((tmp_path / "c/config.json").read_text())
    (tmp_path / "c/config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="unexpected"):
        hubert.load(tmp_path / "c")
    (tmp_path / "c/config.json").write_text(json.dumps(config | {"model_type": "wav2vec2"}))
    with pytest.raises(ValueError, match="wav2vec2"):
        hubert.load(tmp_path / "c")
    hubert.save(tmp_path / "c", make(VARIANTS["base"]))
    whole = (tmp_path / "c/model.safetensors").read_bytes()
    (tmp_path / "c/model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read .*make it anew"):
        hubert.load(tmp_path / "c")


def torchaudio_twin(config: hubert.HubertConfig, model: hubert.Hubert, head: hubert.Head):
    """torchaudio's pretraining model with the same weights: three prefixes differ."""
    import torchaudio

    twin = torchaudio.models.hubert_pretrain_model(
        extractor_mode="group_norm" if config.feat_extract_norm == "group" else "layer_norm",
        extractor_conv_layer_config=list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
        extractor_conv_bias=config.conv_bias,
        encoder_embed_dim=config.hidden_size,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=config.num_conv_pos_embeddings,
        encoder_pos_conv_groups=config.num_conv_pos_embedding_groups,
        encoder_num_layers=config.num_hidden_layers,
        encoder_num_heads=config.num_attention_heads,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=config.intermediate_size,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=config.do_stable_layer_norm,
        encoder_layer_drop=0.0,
        mask_prob=0.8,
        mask_selection="static",
        mask_other=0.0,
        mask_length=10,
        no_mask_overlap=False,
        mask_min_space=1,
        mask_channel_prob=0.0,
        mask_channel_selection="static",
        mask_channel_other=0.0,
        mask_channel_length=10,
        no_mask_channel_overlap=False,
        mask_channel_min_space=1,
        skip_masked=False,
        skip_nomask=True,
        num_classes=len(head.label_embeddings),
        final_dim=config.classifier_proj_size,
        feature_grad_mult=None if config.feature_grad_mult == 1 else config.feature_grad_mult,
    )
    weights = {f"wav2vec2.{name}": value for name, value in model.state_dict().items()}
    weights = {
        name.replace(".encoder.", ".encoder.transformer.").replace(
            ".feature_projection", ".encoder.feature_projection"
        ): value
        for name, value in weights.items()
    }
    weights["mask_generator.mask_embedding"] = weights.pop("wav2vec2.masked_spec_embed")
    weights["logit_generator.label_embeddings"] = head.label_embeddings.detach()
    for kind in ("weight", "bias"):
        weights[f"logit_generator.final_proj.{kind}"] = getattr(head.final_proj, kind).detach()
    twin.load_state_dict(weights)
    return twin.train()


@pytest.mark.parametrize("variant", ["base", "large", "base, layer norm, bias"])
def test_loss_and_gradients_equal_torchaudio(variant, request):
    """Hidden states, masked or not; the stacked logits' loss, penalty and all, to 1e-5; gradients to 1e-6 relative."""
    import torchaudio

    config = hubert.replace(
        VARIANTS[variant], hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0
    )
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(partial(torch.set_default_dtype, torch.float32))
    model, head = make(config).train(), hubert.Head(config, 11)
    hubert.initialise(head, seeds.torch_generator(1))
    twin = torchaudio_twin(config, model, head)
    waveforms, _ = clips()
    frames = audio.frame_count(waveforms.shape[1])
    # fairseq's penalty and ours agree where the clips of a batch have equally many masked frames.
    mask = torch.stack([torch.randperm(frames, generator=seeds.torch_generator(i)) < 15 for i in range(2)])
    labels = torch.randint(11, mask.shape, generator=seeds.torch_generator(2))
    embedding = twin.mask_generator.mask_embedding
    twin.mask_generator.forward = lambda x, _: (torch.where(mask[..., None], embedding, x), mask)
    assert isinstance(twin, torchaudio.models.HuBERTPretrainModel)

    inputs = normalised = waveforms.double()
    if config.do_normalize:
        normalised = (inputs - inputs.mean(1, True)) / torch.sqrt(inputs.var(1, correction=0, keepdim=True) + 1e-7)
    with torch.no_grad():
        layers, _ = twin.wav2vec2.extract_features(normalised)
        hidden = model(inputs, hidden_states=True).hidden
    inside = len(layers) - config.do_stable_layer_norm  # theirs leaves out pre-norm models' final LayerNorm
    for ours, their in zip(hidden[1 : 1 + inside], layers[:inside], strict=True):
        assert torch.allclose(ours, their, rtol=0, atol=1e-9)
    masked_layers: list[torch.Tensor] = []
    for layer in twin.wav2vec2.encoder.transformer.layers:
        layer.register_forward_hook(lambda _, __, output: masked_layers.append(output[0].detach()))
    logits, _, penalty = twin(normalised, labels)
    with torch.no_grad():
        hidden = model(inputs, mask, hidden_states=True).hidden
    for ours, their in zip(hidden[1 : 1 + inside], masked_layers[:inside], strict=True):
        assert torch.allclose(ours, their, rtol=0, atol=1e-6)  # their mask embedding is float32
    expected = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")
    expected = expected + 10 * penalty * len(logits)
    batch = batching.Batch(inputs, labels, mask, ("a", "b"))
    sums = objectives.masked_prediction(model, head, batch)
    assert sums.count == mask.sum()
    assert sums.loss.item() / sums.count == pytest.approx(expected.item() / sums.count, abs=1e-5)
    sums.loss.backward()
    expected.backward()
    theirs = dict(twin.named_parameters())
    compared = 0
    for prefix, module in (("wav2vec2.", model), ("logit_generator.", head)):
        for name, parameter in module.named_parameters():
            name = prefix + name
            if prefix == "wav2vec2.":
                name = name.replace(".encoder.", ".encoder.transformer.")
                name = name.replace(".feature_projection", ".encoder.feature_projection")
                name = name.replace("wav2vec2.masked_spec_embed", "mask_generator.mask_embedding")
            difference = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm().clamp_min(1e-9)
            # k_proj.bias shifts all scores of a query alike: its gradient is zero but for rounding.
            assert difference < 1e-6 or theirs[name].grad.norm() < 1e-9, (name, difference)
            compared += 1
    assert compared == len(theirs)
