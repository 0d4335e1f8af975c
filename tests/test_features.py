"""Features: equal to kaldi's, aligned with the model's frames."""

import dataclasses
import functools

import pytest
import torch
from torchaudio.compliance import kaldi
from torchaudio.functional import compute_deltas

from fedhubert_lib import audio, features, hubert, resources
from fedhubert_lib.kmeans import hidden


def speech_like(samples: int, seed: int = 0) -> torch.Tensor:
    """Noise with the spectral tilt, the level and the pauses of speech."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples + 64, generator=generator)
    tilted = noise.unfold(0, 65, 1)[:samples] @ torch.exp(-torch.arange(65) / 8)
    envelope = torch.sin(torch.arange(samples) / 3000).clamp(min=0)
    return 0.05 * tilted * envelope


def reference(waveform: torch.Tensor) -> torch.Tensor:
    """What fairseq's simple_kmeans computes: [frames, 39]."""
    static = kaldi.mfcc(waveform[None], sample_frequency=16_000, use_energy=False).T
    delta = compute_deltas(static)
    return torch.cat([static, delta, compute_deltas(delta)]).T


def test_mfcc_equals_kaldi():
    lengths = [400, 401, 559, 560, 720, 8_000, 16_001, 50_000, 399, 200_123, 12_345]
    waveforms = [speech_like(n, seed=n) for n in lengths]
    waveforms += [torch.zeros(8_000), torch.full((4_000,), 0.3), 1e-4 * speech_like(6_000) + 0.1]
    for waveform, computed in zip(waveforms, features.mfcc(waveforms), strict=True):
        if len(waveform) < 400:
            assert computed.shape == (0, 39)
            continue
        torch.testing.assert_close(computed, reference(waveform), atol=1e-4, rtol=0)


def test_mfcc_has_the_same_bits_whatever_shares_the_batch(request):
    """Targets rest on it: after a kill, or on pooled data, an utterance is in other company."""
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    lengths = [400, 721, 16_000, 82_240, 560, 400 + 160 * 510, 400 + 160 * 511, 400 + 160 * 512, 33_333]
    waveforms = [speech_like(n, seed=n) for n in lengths]
    together = features.mfcc(waveforms)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for waveform, expected in zip(waveforms, together, strict=True):
            assert torch.equal(features.mfcc([waveform])[0], expected)
        for expected, computed in zip(together[::-1], features.mfcc(waveforms[::-1]), strict=True):
            assert torch.equal(computed, expected)


def test_mfcc_equals_kaldi_on_real_speech(real_speech):
    files = sorted((real_speech / "librispeech_mini" / "LibriSpeech").rglob("*.flac"))[::40]
    waveforms = [audio.read(file) for file in files]
    for waveform, computed in zip(waveforms, features.mfcc(waveforms), strict=True):
        torch.testing.assert_close(computed, reference(waveform), atol=1e-4, rtol=0)


def test_mfcc_frames_agree_with_the_model():
    """Every second MFCC frame is a frame of the model."""
    assert len(features.mfcc([speech_like(250_000)])[0][::2]) == audio.frame_count(250_000) == 781


def test_mfcc_of_a_crop():
    """MFCCs of a crop from sample 320 k are those of the whole from frame 2 k, deltas away from the edge."""
    waveform = speech_like(40_000)
    whole, crop = features.mfcc([waveform, waveform[320 * 17 :]])
    torch.testing.assert_close(crop[:, :13], whole[34:, :13], atol=1e-5, rtol=0)
    torch.testing.assert_close(crop[4:], whole[38:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("front_end", ["waveform", "logmel"])
def test_hidden_layers_frame_by_frame(front_end, monkeypatch):
    """Each as the model alone gives it, on any number of cores."""
    model = hubert.Hubert(hubert.preset("tiny", front_end)).eval()
    waveforms = [speech_like(20_000), speech_like(399), torch.randn(12_460)]
    with torch.inference_mode(), resources.autocast("cpu", "auto"):
        expected = model(waveforms[2][None], hidden_states=True).hidden
    first, _, last = hidden.states(model, waveforms, [1, 3])
    assert first.shape == (2, 62, 192) and last.shape == (2, 38, 192)
    for cores in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", cores)
        again = list(hidden.states(model, waveforms, [1, 3]))
        assert torch.equal(again[0], first) and again[1].shape == (2, 0, 192) and torch.equal(again[2], last)
    for computed, layer in zip(last, (1, 3), strict=True):
        torch.testing.assert_close(computed, expected[layer][0].float(), atol=0.05, rtol=0.05)  # in bfloat16
    monkeypatch.setattr(hidden, "FORWARD_SAMPLES", 320 * 20)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    assert [states.shape[1] for states in hidden.states(model, waveforms, [1])] == [62, 0, 38]
    assert min(seen) > 320 * 12, "62 frames are four pieces of 14 or 16, not three of 20 and a rest of two"


def test_hidden_layers_of_a_sent_model_are_those_of_evaluation():
    """Without dropout, and of a whole utterance that is normalised, where the model asks for it."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    model = hubert.Hubert(hubert.preset("large", **sizes, conv_dim=(16,) * 7, hidden_dropout=0.5))
    weights = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    sent = hidden.model_of(weights, {"checkpoint": "new", "model": dataclasses.asdict(model.config)}, "cpu")
    waveform = speech_like(8_000) + 0.05
    (computed,) = hidden.states(sent, [waveform], [1])
    with torch.no_grad():
        expected = model.eval()(waveform[None], hidden_states=True).hidden[1]
    torch.testing.assert_close(computed, expected, atol=0.05, rtol=0.05)  # in bfloat16
