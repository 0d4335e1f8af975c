"""What a GPU will be asked to do, as far as a machine without one can tell: fake and meta tensors hold no numbers."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedhubert_lib import audio, hubert, kernels, seeds

FRONT_ENDS = ("waveform", "logmel")


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Tensors are fakes on a GPU: ``.item()``, boolean indexing and mixed devices raise, autocast works."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode(), torch.device("cuda"):
        yield


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("preset", hubert.PRESETS)
@pytest.mark.parametrize("faster_on", [{"cpu"}, {"cpu", "cuda"}])
def test_every_preset_runs_on_a_gpu(pretended_gpu, monkeypatch, preset, front_end, precision, faster_on):
    monkeypatch.setattr(kernels, "FASTER_ON", dict.fromkeys(kernels.FASTER_ON, faster_on))
    config = hubert.preset(preset, front_end, num_hidden_layers=2, layerdrop=0.0)  # drawn on the CPU
    model, head = hubert.Hubert(config), hubert.Head(config, 100)
    frames = audio.frame_count(32_000)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        output = model(torch.empty(3, 32_000), torch.zeros(3, frames, dtype=torch.bool), hidden_states=True)
        logits = head(output.last)
    assert logits.shape == (3, frames, 100)
    assert {x.device.type for x in (*output.hidden, logits, *model.state_dict().values())} == {"cuda"}
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_own_kernels_give_what_pytorchs_give(monkeypatch, request, norm, checkpointing):
    """In float64: the plain modules, which a GPU runs, and the forms that a CPU is faster with."""
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(partial(torch.set_default_dtype, torch.float32))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "conv_dim": (16,) * 7, "num_attention_heads": 2}
    config = hubert.preset("large", **sizes, feat_extract_norm=norm, conv_bias=norm == "layer")
    model = hubert.Hubert(config)
    hubert.initialise(model, seeds.torch_generator(0))
    model.gradient_checkpointing(checkpointing)
    waveforms = torch.randn(2, 9_000, generator=seeds.torch_generator(1))
    results = []
    for faster_on in ({"cpu"}, set()):
        monkeypatch.setattr(kernels, "FASTER_ON", dict.fromkeys(kernels.FASTER_ON, faster_on))
        model.zero_grad()
        last = model(waveforms).last
        last.square().sum().backward()
        results.append([last.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-6, atol=1e-9)
