"""Kernels against the plain model; operations of a GPU as far as a machine without one can test them.

Fake and meta tensors hold no numbers: code that asks for one fails on them, as it would make a GPU wait.
"""

import contextlib
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from federation import pretrain
from torch._subclasses.fake_tensor import FakeTensorMode

from fedhubert_lib import audio, batching, features, hubert, kernels, objectives, seeds, teaching, training
from fedhubert_lib import weights as named
from fedhubert_lib.federated import fedprox

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
@pytest.mark.parametrize("devices", [{"cpu"}, {"cuda"}])
def test_every_preset_runs_on_a_gpu(pretended_gpu, monkeypatch, preset, front_end, precision, devices):
    monkeypatch.setattr(kernels, "DEVICES", devices)
    config = hubert.preset(preset, front_end, num_hidden_layers=2, layerdrop=0.0)  # drawn on the CPU
    model, head = hubert.Hubert(config), hubert.Head(config, 100)
    frames = audio.frame_count(32_000)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        output = model(torch.empty(3, 32_000), torch.zeros(3, frames, dtype=torch.bool), hidden_states=True)
        logits = head(output.last)
    assert logits.shape == (3, frames, 100)
    assert {x.device.type for x in (*output.hidden, logits, *model.state_dict().values())} == {"cuda"}
    assert logits.dtype == torch.float32


def test_mfccs_are_computed_on_a_gpu_in_large_pieces(pretended_gpu, monkeypatch):
    features._constants.cache_clear()
    monkeypatch.setattr(features, "GPU_CHUNK", 150)  # pieces of two and of three utterances
    frames = features.mfcc([torch.empty(samples) for samples in (16_000, 399, 24_000, 8_000)])
    features._constants.cache_clear()
    assert [tuple(part.shape) for part in frames] == [(98, 39), (0, 39), (148, 39), (48, 39)]
    assert {part.device.type for part in frames} == {"cuda"}


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_kernels_equal_the_plain_model(monkeypatch, norm, checkpointing):
    """Hidden states and gradients in float64."""
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    torch.set_default_dtype(torch.float64)
    try:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "conv_dim": (16,) * 7, "num_attention_heads": 2}
        config = hubert.preset("large", **sizes, feat_extract_norm=norm, conv_bias=norm == "layer")
        model = hubert.Hubert(config)
        hubert.initialise(model, seeds.torch_generator(0))
        model.recompute = checkpointing
        waveforms = torch.randn(2, 9_000, generator=seeds.torch_generator(1))
        results = []
        for devices in ({"cpu"}, set()):
            monkeypatch.setattr(kernels, "DEVICES", devices)
            model.zero_grad()
            last = model(waveforms).last
            last.square().sum().backward()
            results.append([last.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    finally:
        torch.set_default_dtype(torch.float32)
    for kernel, plain in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_kernel_equals_pytorchs(dtype):
    """Output and gradients; with dropout, each weight is zero or scaled by the same number."""
    q, k, v = torch.randn(3, 2, 4, 50, 16, generator=seeds.torch_generator(0)).to(dtype).requires_grad_().unbind(0)
    results = []
    for attention in (partial(kernels.attention, dropout=0.0), torch.nn.functional.scaled_dot_product_attention):
        y = attention(q, k, v)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))])
    absolute, relative = (1e-5, 1e-5) if dtype == torch.float32 else (5e-2, 2e-2)
    for kernel, plain in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=0, atol=absolute)
    weights, dropped = (kernels.attention(q, k, torch.eye(50, dtype=dtype).expand(2, 4, 50, 50), p) for p in (0.0, 0.2))
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.02)
    torch.testing.assert_close(dropped[kept], weights[kept] * 1.25, rtol=relative, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_kernel_keeps_the_expectation_and_its_gradient_is_its_noise(dtype):
    x = torch.ones(100_000, dtype=dtype).requires_grad_()
    y = kernels.Dropout(0.1).train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert y.float().mean().item() == pytest.approx(1, abs=0.005)
    assert torch.equal(kernels.Dropout(0.1).eval()(x), x)


def test_training_step_never_waits_for_the_device(monkeypatch):
    """On meta tensors ``.item()`` and boolean indexing raise: a step that runs asks the device for no number.

    Fake tensors of a GPU go forward alone: the autograd engine wants its driver. The optimiser's part follows on them.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(training._Tally, "result", lambda tally: {"steps": tally.steps, "count": tally.count})
    frames = audio.frame_count(32_000)
    mask = torch.arange(3 * frames).view(3, frames) % 2 == 0
    batch = batching.Batch(torch.zeros(3, 32_000), torch.zeros(3, frames, dtype=torch.long), mask, ("a", "b", "c"))
    with torch.device("meta"):
        config = hubert.preset("tiny", num_hidden_layers=1, hidden_dropout=0.1, attention_dropout=0.1)
        module = torch.nn.ModuleDict({"model": hubert.Hubert(config), "head": hubert.Head(config, 50)})
        teacher = teaching.Teacher(hubert.Hubert(config), hubert.Head(config, 50))
        module["regressors"] = teaching.Regressors(config.hidden_size, config.hidden_size, 1)
    model, head = module["model"], module["head"]
    for objective in (
        lambda batch, _: objectives.masked_prediction(model, head, batch, unmasked_weight=0.5),
        lambda batch, _: teaching.soft_targets(
            model, head, teacher, batch, soft_weight=0.7, label_weight=0.3, unmasked_weight=0.5
        ),
        lambda batch, _: teaching.layer_regression(model, module["regressors"], teacher, batch),
    ):
        measured = training.local_update(
            module,
            [batch] * 4,
            objective,
            pretrain(warmup_fraction=0.2),
            accumulate=2,
            first_step=0,
            total_steps=10,
            seed=0,
            optimiser=SimpleNamespace(param_groups=[{}], step=lambda: None, zero_grad=module.zero_grad),
            adjust=[fedprox.pull(list(module.parameters()), 0.1)],
        )
        assert measured["steps"] == 2
        assert measured["count"] in (4 * int(mask.sum()), 4 * mask.numel())


def test_clipping_and_the_fused_optimiser_never_wait_for_a_gpu(pretended_gpu):
    module = torch.nn.Linear(3, 3)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser = training.adamw(module, pretrain())
    norm = training._clip(list(module.parameters()), 2.0, 1.0)
    optimiser.found_inf = (~norm.isfinite()).float()
    optimiser.step()
    assert {state["step"].device.type for state in optimiser.state.values()} == {"cuda"}


def test_optimiser_skips_a_step_that_is_not_finite():
    module = torch.nn.Linear(4, 1)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimiser = training.adamw(module, pretrain())
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimiser.found_inf = torch.ones(())  # as after such a step on a GPU
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert {state["step"].item() for state in optimiser.state.values()} == {0.0}


def test_tally_fetches_norms_once_in_many_steps():
    batch = SimpleNamespace(utterances=("a", "b"))
    tally = training._Tally(3)
    for number, norm in enumerate((1.0, torch.nan)):
        tally.step(number, torch.tensor(norm), [batch])
    with pytest.raises(training.DivergedError, match="global step 1, batch a, b"):
        tally.step(2, torch.tensor(1.0), [SimpleNamespace(utterances=("c",))])


def test_cuda_computes_reproducibly():
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with training.reproducible(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_placed_moves_a_cohorts_weights_once():
    """The device meta stands for it: what moves there is counted by identity."""
    weights = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    first = named.placed(weights, torch.device("meta"))
    assert {tensor.device.type for tensor in first.values()} == {"meta"}
    assert named.placed(dict(weights), torch.device("meta")) is first
    weights["a"].add_(1)  # the server's step may be in place
    assert named.placed(weights, torch.device("meta")) is not first
    assert named.placed({**weights, "a": torch.ones(3)}, torch.device("meta"))["a"].shape == (3,)
    assert named.placed(weights, torch.device("cpu")) is weights


def test_to_host_copies_a_clients_change_at_once(monkeypatch):
    """With a tensor that says it lies on a GPU; only pinning needs one."""

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, pin_memory: real(shape))
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0), "c": torch.arange(4.0)}
    moved = named.to_host({name: tensor.as_subclass(OnGpu) for name, tensor in tensors.items()})
    assert moved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(moved[name], tensor) and moved[name].shape == tensor.shape
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved.values()}) == 1
