"""Exports to Hugging Face and torchaudio, and the comparison that every export has to pass.

An export is loaded again by the software it is for and compared with the source; one that differs is an error, and
nothing is left of it. torchaudio's is read by ``wav2vec2_model(**json.load(open("torchaudio.json"))["model"])`` and
``load_state_dict(safetensors.torch.load_file("model.safetensors"))``; with ``normalize`` true in the file, waveforms
need zero mean and unit variance first. ``extract_features`` gives the N layers without the input of the first.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchaudio
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fedhubert_lib import audio, files, pretrained, seeds
from fedhubert_lib.hubert import Head, Hubert, HubertConfig

SHAPES = ((1, 400), (2, 8_123), (1, 23_456), (3, 16_001))
"""Clips and samples of the comparison: one frame, odd lengths, several clips; no export was traced with one of them."""
TOLERANCE = 1e-3
"""Largest difference of a hidden state, as a part of its largest value where that is above 1; rounding: about 1e-5."""
CODE = "modeling_fedhubert.py"
"""The file beside this one that travels with what transformers does not know."""


class ExportError(ValueError):
    """A model that cannot be exported this way, or an export that does not give the source's numbers."""


@torch.no_grad()
def compare(model: Hubert, encode: Callable[[Tensor], Sequence[Tensor]], *, skip: int = 0) -> float:
    """Largest difference, as ``TOLERANCE`` counts it, of hidden states of ``model`` and ``encode``, over ``SHAPES``.

    ``encode`` maps waveforms [B, S] to hidden states [B, T, D] without the first ``skip``. Raises ExportError where
    their number or shape differs, or a difference exceeds ``TOLERANCE``.
    """
    model.eval()
    differences: list[Tensor] = []
    for clips, samples in SHAPES:
        waveforms = noise(clips, samples)
        source, exported = model(waveforms, hidden_states=True).hidden[skip:], encode(waveforms)
        shapes, expected = ([list(state.shape) for state in states] for states in (exported, source))
        if shapes != expected:
            raise ExportError(f"{samples} samples give states of {shapes}; the source gives {expected}")
        differences += [(a - b).abs().max() / a.abs().max().clamp_min(1) for a, b in zip(source, exported, strict=True)]
    worst = float(torch.stack(differences).max())  # NaN if one of them is
    if not worst <= TOLERANCE:
        raise ExportError(f"hidden states differ from the source's by {worst:.2g}, which is more than {TOLERANCE:.2g}")
    return worst


def noise(clips: int, samples: int) -> Tensor:
    """Clips to compare on, the same every time: float32 [clips, samples]."""
    return 0.1 * torch.randn(clips, samples, generator=seeds.torch_generator(0, "export", samples))


def load_published(checkpoint: Path, target: str) -> tuple[Hubert, Head | None]:
    """``pretrained.load``. Raises ExportError unless it is the published architecture: all that ``target`` knows."""
    model, head = pretrained.load(checkpoint)
    if not (pretrained.published(model.config) and model.config.feat_proj_layer_norm):
        raise ExportError(
            f"{target} knows only HuBERT as published; this model has front_end {model.config.front_end} and"
            f" feat_proj_layer_norm {model.config.feat_proj_layer_norm}. Export it as huggingface or ONNX, or train a"
            " published one"
        )
    return model, head


def to_huggingface(checkpoint: Path, folder: Path) -> float:
    """Write a folder for transformers' ``AutoModel`` and ``AutoFeatureExtractor``; returns the largest difference.

    The published architecture is a plain ``HubertModel``; for another one ``CODE`` lies in the folder, which
    ``AutoModel`` runs where ``trust_remote_code=True`` is given. Weights that only pretraining needs are left out.
    Raises ExportError.
    """
    model, _ = pretrained.load(checkpoint)
    tensors, documents = model.state_dict(), pretrained.documents(model.config)
    if not pretrained.published(model.config):
        tensors |= {f"log_mel.{name}": tensor for name, tensor in model.feature_extractor.named_buffers()}
        documents = _with_code(documents)
    with files.atomic(folder) as temporary:
        pretrained.write(temporary, {"model": tensors}, documents)
        return check_huggingface(model, temporary)


def _with_code(documents: dict[str, str]) -> dict[str, str]:
    """``documents`` of a folder whose model is in ``CODE``, which is one of them."""
    module = Path(CODE).stem
    classes = {"AutoConfig": f"{module}.FedHubertConfig", "AutoModel": f"{module}.FedHubertModel"}
    changed = {CODE: Path(__file__).with_name(CODE).read_text(encoding="utf-8")}
    for name, change in (
        ("config.json", {"architectures": ["FedHubertModel"], "auto_map": classes}),
        ("preprocessor_config.json", {"return_attention_mask": True}),
    ):
        changed[name] = json.dumps(json.loads(documents[name]) | change, indent=2) + "\n"
    return documents | changed


def check_huggingface(model: Hubert, folder: Path) -> float:
    """Largest difference between ``model`` and what transformers loads from ``folder``, offline."""
    from transformers import AutoFeatureExtractor, AutoModel, dynamic_module_utils

    options = {"local_files_only": True, "trust_remote_code": not pretrained.published(model.config)}
    # transformers copies code that comes with a model to its cache, and leaves it there.
    with tempfile.TemporaryDirectory() as cache, mock.patch.object(dynamic_module_utils, "HF_MODULES_CACHE", cache):
        exported = AutoModel.from_pretrained(folder, **options).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)

    def encode(waveforms: Tensor) -> list[Tensor]:
        options = {"sampling_rate": audio.SAMPLE_RATE, "return_tensors": "pt", "return_attention_mask": False}
        output = exported(extractor(list(waveforms.numpy()), **options).input_values, output_hidden_states=True)
        # The last of hidden_states has the final norm of pre-norm models in some versions of transformers only.
        return [*output.hidden_states[:-1], output.last_hidden_state]

    return compare(model, encode)


def to_torchaudio(checkpoint: Path, folder: Path) -> float:
    """Write arguments and weights for ``torchaudio.models.wav2vec2_model``; returns the largest difference.

    Raises ExportError.
    """
    model, _ = load_published(checkpoint, "torchaudio")
    settings = {"model": torchaudio_arguments(model.config), "normalize": model.config.do_normalize}
    text = json.dumps(settings | {"sample_rate": audio.SAMPLE_RATE}, indent=2) + "\n"
    with files.atomic(folder) as temporary:
        pretrained.write(temporary, {"model": torchaudio_weights(model)}, {"torchaudio.json": text})
        exported = torchaudio.models.wav2vec2_model(**json.loads(text)["model"]).eval()
        exported.load_state_dict(load_file(temporary / "model.safetensors"))

        def encode(waveforms: Tensor) -> list[Tensor]:
            if model.config.do_normalize:
                waveforms = functional.layer_norm(waveforms, waveforms.shape[-1:])
            layers, _ = exported.extract_features(waveforms)
            if model.config.do_stable_layer_norm:  # extract_features leaves the final norm out, forward has it
                layers = [*layers[:-1], exported(waveforms)[0]]
            return layers

        return compare(model, encode, skip=1)


def torchaudio_arguments(config: HubertConfig) -> dict[str, Any]:
    """Arguments of ``torchaudio.models.wav2vec2_model`` for this architecture."""
    return {
        "extractor_mode": "group_norm" if config.feat_extract_norm == "group" else "layer_norm",
        "extractor_conv_layer_config": list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.hidden_size,
        "encoder_projection_dropout": config.feat_proj_dropout,
        "encoder_pos_conv_kernel": config.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": config.num_conv_pos_embedding_groups,
        "encoder_num_layers": config.num_hidden_layers,
        "encoder_num_heads": config.num_attention_heads,
        "encoder_attention_dropout": config.attention_dropout,
        "encoder_ff_interm_features": config.intermediate_size,
        "encoder_ff_interm_dropout": config.activation_dropout,
        "encoder_dropout": config.hidden_dropout,
        "encoder_layer_norm_first": config.do_stable_layer_norm,
        "encoder_layer_drop": config.layerdrop,
        "aux_num_out": None,
    }


def torchaudio_weights(model: Hubert) -> dict[str, Tensor]:
    """The weights of ``model`` under torchaudio's names; the mask embedding, for pretraining only, is left out."""
    return {
        **model.feature_extractor.state_dict(prefix="feature_extractor."),
        **model.feature_projection.state_dict(prefix="encoder.feature_projection."),
        **model.encoder.state_dict(prefix="encoder.transformer."),
    }
