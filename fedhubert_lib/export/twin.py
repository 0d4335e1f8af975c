"""The same network out of torchaudio's parts: plain operations that exporters and counters understand.

``hubert`` computes convolutions in ways that are fast to train; the numbers are the same. The twin shares nothing with
it but the weights, so that it is also a check of both.
"""

import math
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.compliance.kaldi import get_mel_banks

from fedhubert_lib import hubert
from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD, SAMPLE_RATE

FFT = 512


class PlainLogMel(nn.Module):
    """``hubert.LogMel`` as one convolution, its squared size, and a matrix of mel filters.

    Removing the mean, pre-emphasis, window and Fourier transform are linear in the 400 samples of a frame: one matrix.
    """

    def __init__(self) -> None:
        super().__init__()
        mels, _ = get_mel_banks(hubert.MELS, FFT, SAMPLE_RATE, 20.0, 0.0, 100.0, -500.0, 1.0)
        self.register_buffer("mels", functional.pad(mels, (0, 1))[..., None])
        size = RECEPTIVE_FIELD
        centre = torch.eye(size, dtype=torch.float64) - 1 / size
        emphasis = torch.eye(size, dtype=torch.float64) - 0.97 * torch.diag(torch.ones(size - 1).double(), -1)
        emphasis[0, 0] = 1 - 0.97  # kaldi repeats the first sample
        window = torch.hann_window(size, periodic=False, dtype=torch.float64).pow(0.85)
        angle = torch.outer(torch.arange(FFT // 2 + 1), torch.arange(size)) * (2 * math.pi / FFT)
        transform = torch.cat([angle.double().cos(), angle.double().sin()]) * window @ emphasis @ centre
        self.register_buffer("transform", transform.float()[:, None])

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, S] to [B, T, 160]; ``lengths`` pass through, as torchaudio's extractor has it."""
        spectrum = functional.conv1d(waveforms[:, None], self.transform, stride=HOP // 2).square()
        real, imaginary = spectrum.chunk(2, dim=1)
        # A convolution of width one, so that quantising matrix products spares it: power spectra span many decades.
        x = functional.conv1d(real + imaginary, self.mels).transpose(1, 2)
        x = x.clamp_min(torch.finfo(torch.float32).eps).log()
        x = x - x.mean(1, keepdim=True)
        x = x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-5)
        first = x[:, ::2]
        second = torch.cat([x, x[:, -1:]], 1)[:, 1::2]  # the last frame is repeated where it has no second
        return torch.cat([first, second[:, : first.shape[1]]], 2), lengths


def arguments(config: hubert.HubertConfig) -> dict[str, Any]:
    """What ``torchaudio.models.wav2vec2_model`` builds the network from, without dropout: the twin does not train."""
    channels = config.conv_dim if config.front_end == "waveform" else (config.feature_size,)
    layers = [list(layer) for layer in zip(channels, config.conv_kernel, config.conv_stride, strict=False)]
    return {
        "extractor_mode": "group_norm" if config.feat_extract_norm == "group" else "layer_norm",
        "extractor_conv_layer_config": layers,
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.hidden_size,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": config.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": config.num_conv_pos_embedding_groups,
        "encoder_num_layers": config.num_hidden_layers,
        "encoder_num_heads": config.num_attention_heads,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": config.intermediate_size,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": config.do_stable_layer_norm,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
    }


def empty(config: hubert.HubertConfig) -> torchaudio.models.Wav2Vec2Model:
    """torchaudio's model of this shape, in eval mode, with weights of no meaning. Waveforms are not normalised by it.

    Raises ValueError for sinusoidal positions, which torchaudio has not.
    """
    if config.position_embedding != "conv":
        raise ValueError(
            f"position_embedding is {config.position_embedding}; torchaudio has convolutional positions only"
        )
    twin = torchaudio.models.wav2vec2_model(**arguments(config))
    if config.front_end == "logmel":
        twin.feature_extractor = PlainLogMel()
    if not config.feat_proj_layer_norm:
        twin.encoder.feature_projection.layer_norm = nn.Identity()
    return twin.eval()


def build(model: hubert.Hubert) -> torchaudio.models.Wav2Vec2Model:
    """``empty`` with the weights of ``model``."""
    twin = empty(model.config)
    missing, unexpected = twin.load_state_dict(weights(model), strict=False)
    missing = [name for name in missing if model.config.front_end == "waveform" or "feature_extractor" not in name]
    if missing or unexpected:
        raise ValueError(f"torchaudio's model lacks {unexpected} and wants {missing}: its names have changed")
    return twin


def weights(model: hubert.Hubert) -> dict[str, Tensor]:
    """The weights of ``model`` under torchaudio's names; the mask embedding belongs to pretraining and is left out."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder."):
            name = f"encoder.transformer.{name.removeprefix('encoder.')}"
        elif name.startswith("feature_projection."):
            name = f"encoder.{name}"
        renamed[name] = tensor.detach().cpu().float().contiguous()
    del renamed["masked_spec_embed"]
    return renamed


class Layers(nn.Module):
    """The twin with all N + 1 hidden states as output, [N + 1, B, T, D], and the model's own input normalisation."""

    def __init__(self, model: hubert.Hubert) -> None:
        super().__init__()
        self.twin = build(model)
        self.normalise = model.config.do_normalize
        self.eval()

    def forward(self, waveforms: Tensor) -> Tensor:
        """Waveforms [B, S] to hidden states, the input of the first layer first, as ``hubert.Hubert`` gives them."""
        if self.normalise:
            mean = waveforms.mean(1, keepdim=True)
            variance = (waveforms - mean).square().mean(1, keepdim=True)
            waveforms = (waveforms - mean) / torch.sqrt(variance + 1e-7)
        features, _ = self.twin.feature_extractor(waveforms, None)
        transformer = self.twin.encoder.transformer
        x = self.twin.encoder.feature_projection(features)
        x = x + transformer.pos_conv_embed(x)
        # torchaudio's flag of its transformer is the opposite of the option that it is built from.
        if transformer.layer_norm_first:
            x = transformer.layer_norm(x)
        hidden = [x]
        for layer in transformer.layers:
            x, _ = layer(x)
            hidden.append(x)
        if not transformer.layer_norm_first:
            hidden[-1] = transformer.layer_norm(x)
        return torch.stack(hidden)
