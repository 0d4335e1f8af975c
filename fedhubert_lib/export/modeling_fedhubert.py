"""HuBERT with a log-mel front end, for transformers' ``AutoModel`` with ``trust_remote_code``.

This file travels with the weights and needs PyTorch and transformers alone. Whatever is not here is transformers' own
``HubertModel``. Clips of different lengths may be padded on the right if ``attention_mask`` says where they end, as
``AutoFeatureExtractor`` does: each has the hidden states that it has alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel


class FedHubertConfig(HubertConfig):
    """transformers' own settings, and ``front_end``: logmel."""

    model_type = "fedhubert"


class LogMel(nn.Module):
    """Kaldi's log-mel spectrum of 80 bins at 100 Hz, normalised per clip, two frames stacked into one of 50 Hz."""

    def __init__(self) -> None:
        super().__init__()  # both come with the weights; without them everything is NaN
        self.register_buffer("mels", torch.full((257, 80), torch.nan))
        self.register_buffer("window", torch.full((400,), torch.nan))

    @torch.no_grad()
    def forward(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Waveforms [B, S] at 16 kHz, of which the first ``lengths`` [B] samples are speech, to [B, 160, T]."""
        with torch.autocast(waveforms.device.type, enabled=False):
            frames = waveforms.float().unfold(1, 400, 160)
            frames = frames - frames.mean(-1, keepdim=True)
            previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
            spectrum = torch.fft.rfft((frames - 0.97 * previous) * self.window.float(), n=512)
            energies = spectrum.abs().square() @ self.mels.float()
            x = energies.clamp_min(torch.finfo(torch.float32).eps).log()
            counts = (lengths[:, None, None] - 400) // 160 + 1  # frames of 10 ms
            steps = torch.arange(x.shape[1] + x.shape[1] % 2, device=x.device)[None, :, None]
            speech = steps[:, : x.shape[1]] < counts
            x = x - (x * speech).sum(1, keepdim=True) / counts
            x = x / ((x * speech).square().sum(1, keepdim=True) / counts).sqrt().clamp_min(1e-5)
            # Where a clip ends within the second frame of a pair, its last whole one is repeated.
            x = x.gather(1, steps.minimum(counts - 1).expand(-1, -1, x.shape[2]))
            return x.unflatten(1, (-1, 2)).flatten(2).transpose(1, 2).to(self.mels.dtype)


class FedHubertModel(HubertModel):
    """``HubertModel`` with a log-mel front end."""

    config_class = FedHubertConfig

    def __init__(self, config: FedHubertConfig) -> None:
        super().__init__(config)
        self.log_mel, self.feature_extractor = LogMel(), nn.Identity()
        self.feature_projection.projection = nn.Linear(160, config.hidden_size)
        if config.feat_proj_layer_norm:
            self.feature_projection.layer_norm = nn.LayerNorm(160, eps=config.layer_norm_eps)

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Waveforms [B, S] at 16 kHz, S >= 400, to what ``HubertModel`` returns; ``options`` are its own."""
        mask = torch.ones_like(input_values, dtype=torch.long) if attention_mask is None else attention_mask
        lengths = mask.sum(-1).long()
        if lengths.min() < 400:
            raise ValueError(
                f"clip {int(lengths.argmin())} of the batch has {int(lengths.min())} samples; give 400 or more"
            )
        features = self.log_mel(input_values, lengths)
        return super().forward(features, attention_mask=attention_mask, **options)
