"""HuBERT: waveform in, hidden states out; masked frames predict cluster labels. One file, read from top to bottom.

Follows Hsu et al. 2021 (arXiv 2106.07447) as fairseq trains it; names of parameters and settings are transformers'.
One variant is not in the paper: a log-mel front end (Fast-HuBERT, MelHuBERT) with the same 50 Hz frames. On a CPU
``kernels`` computes the same numbers faster where it is named below; GPUs, exporters and FLOP counters run what is
written here.

Shapes: B clips, S samples, T = floor((S - 400) / 320) + 1 frames, C channels of the front end, D hidden size, K
clusters. Floats are float32, under autocast bfloat16 between layers.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchaudio.compliance.kaldi import get_mel_banks

from fedhubert_lib import audio, kernels
from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, frame_count

MELS = 80


@dataclass(frozen=True)
class HubertConfig:
    """Everything that fixes the network; field names are those of transformers' ``HubertConfig`` but for the last four.

    ``feature_grad_mult`` scales the gradient of the convolutions (as in fairseq); ``do_normalize`` gives each clip zero
    mean and unit variance (transformers: ``preprocessor_config.json``); ``classifier_proj_size`` is the size in which
    frames and label embeddings are compared (fairseq: ``final_dim``). Raises ValueError for sizes that do not fit.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    feat_extract_norm: Literal["group", "layer"] = "group"
    feat_proj_layer_norm: bool = True
    do_stable_layer_norm: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    layer_norm_eps: float = 1e-5
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    feat_proj_dropout: float = 0.1
    layerdrop: float = 0.05
    front_end: Literal["waveform", "logmel"] = "waveform"
    feature_grad_mult: float = 0.1
    do_normalize: bool = False
    classifier_proj_size: int = 256

    def __post_init__(self) -> None:
        for name in ("conv_dim", "conv_kernel", "conv_stride"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % max(getattr(self, name), 1):
                raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of {name} {getattr(self, name)}")
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError("conv_dim, conv_kernel and conv_stride differ in length")
        width, hop = 1, 1
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            width, hop = width + (kernel - 1) * hop, hop * stride
        if (width, hop) != (RECEPTIVE_FIELD, HOP):
            raise ValueError(f"conv_kernel, conv_stride: a frame of {width} samples per {hop}; labels need 400 per 320")
        for name, kind in get_type_hints(HubertConfig).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {get_args(kind)}")

    @property
    def feature_size(self) -> int:
        """Size C of a frame between front end and projection."""
        return self.conv_dim[-1] if self.front_end == "waveform" else 2 * MELS


_SMALL_RUN = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0}
_TINY = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "do_normalize": True, "feature_grad_mult": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    # base and large as published (fairseq examples/hubert/config/pretrain); tiny and small keep base's shape and are
    # for runs of minutes and hours, in which dropout only slows learning.
    "tiny": {**_TINY, "conv_dim": (128,) * 7, "classifier_proj_size": 128, **_SMALL_RUN},
    "small": {**_SMALL, "conv_dim": (256,) * 7, **_SMALL_RUN},
    "base": {},
    "large": {**_LARGE, **_LAYER, "classifier_proj_size": 768, **_SMALL_RUN},
}


def preset(name: str, front_end: str = "waveform", **changes: Any) -> HubertConfig:
    """The configuration called ``name``: tiny, small, base or large, with ``changes`` to single fields."""
    if name not in PRESETS:
        raise ValueError(f"no model preset {name!r}; there are {', '.join(PRESETS)}")
    return replace(HubertConfig(**PRESETS[name]), **{"front_end": front_end, **changes})


class HubertOutput(NamedTuple):
    """Result of a forward pass."""

    last: Tensor
    """[B, T, D] output of the last layer (of the final LayerNorm, for pre-norm models)."""
    hidden: tuple[Tensor, ...] | None
    """N + 1 tensors [B, T, D] when asked for: the input of the first layer, then the output of each."""
    features: Tensor | None
    """[B, T, C] output of the convolutions, for the feature penalty; None with the log-mel front end."""


class ConvLayer(nn.Module):
    """Convolution, normalisation (group: over time, in layer 0 only; layer: over channels, in each), GELU."""

    def __init__(self, config: HubertConfig, index: int) -> None:
        super().__init__()
        inputs, outputs = config.conv_dim[index - 1] if index else 1, config.conv_dim[index]
        kernel, stride = config.conv_kernel[index], config.conv_stride[index]
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=config.conv_bias)
        over_time = nn.GroupNorm(outputs, outputs) if index == 0 else nn.Identity()
        self.layer_norm = nn.LayerNorm(outputs) if config.feat_extract_norm == "layer" else over_time

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] to [B, C', floor((L - kernel) / stride) + 1]."""
        x = self.conv(x)
        return F.gelu(self.layer_norm(x.mT).mT if isinstance(self.layer_norm, nn.LayerNorm) else self.layer_norm(x))


class FeatureExtractor(nn.Module):
    """Seven convolutions. No gradient flows to the waveform."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.conv_layers = nn.Sequential(*(ConvLayer(config, index) for index in range(len(config.conv_dim))))

    def forward(self, waveforms: Tensor) -> Tensor:
        """Waveforms [B, S] to features [B, T, C]."""
        if kernels.pay_on(waveforms.device):
            return kernels.front_end(self.conv_layers, waveforms)
        return self.conv_layers(waveforms[:, None]).mT


class LogMel(nn.Module):
    """Log-mel spectrum, two 10 ms frames stacked into one of 20 ms; no parameters, no gradient.

    The spectrum is kaldi's (``torchaudio.compliance.kaldi.fbank`` with 80 bins, no dither, snip_edges), each bin then
    has zero mean and unit variance over its own clip, so that no clip depends on its batch. Frame i stacks the 10 ms
    frames 2i and 2i + 1; where the clip ends within frame 2i + 1, the last whole one is repeated.
    """

    def __init__(self) -> None:
        super().__init__()
        mels, _ = get_mel_banks(MELS, 512, SAMPLE_RATE, 20.0, 0.0, 100.0, -500.0, 1.0)
        self.register_buffer("mels", F.pad(mels, (0, 1)).T.contiguous(), persistent=False)  # no weight at Nyquist
        window = torch.hann_window(RECEPTIVE_FIELD, periodic=False).pow(0.85)  # kaldi's povey window
        self.register_buffer("window", window, persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor) -> Tensor:
        """Waveforms [B, S] to float32 [B, T, 160]."""
        with torch.autocast(waveforms.device.type, enabled=False):
            frames = waveforms.float().unfold(1, RECEPTIVE_FIELD, HOP // 2)
            return self.stacked(self.spectrum(frames).abs().square() @ self.mels)

    def spectrum(self, frames: Tensor) -> Tensor:
        """Frames [..., 400] without their mean, after pre-emphasis and window, to complex [..., 257]: a linear map."""
        frames = frames - frames.mean(-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
        return torch.fft.rfft((frames - 0.97 * previous) * self.window, n=512)

    @staticmethod
    def stacked(x: Tensor) -> Tensor:
        """Energies of mel bins at 100 Hz, [B, 2 T or one fewer, 80], to normalised logarithms at 50 Hz [B, T, 160]."""
        x = x.clamp_min(torch.finfo(torch.float32).eps).log()
        x = x - x.mean(1, keepdim=True)
        x = x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-5)
        first, second = x[:, ::2], torch.cat([x, x[:, -1:]], 1)[:, 1::2]
        return torch.cat([first, second[:, : first.shape[1]]], 2)


class FeatureProjection(nn.Module):
    """Layer normalisation and a linear layer from the front end's size to the transformer's."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        normalise = config.feat_proj_layer_norm
        self.layer_norm = nn.LayerNorm(config.feature_size, eps=config.layer_norm_eps) if normalise else nn.Identity()
        self.projection = nn.Linear(config.feature_size, config.hidden_size)
        self.dropout = kernels.Dropout(config.feat_proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, D]."""
        return self.dropout(self.projection(self.layer_norm(x)))


class ConvPositions(nn.Module):
    """Relative positions from a grouped convolution over 128 frames, weight-normalised per tap, then GELU."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        size, kernel, groups = config.hidden_size, config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
        conv = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=groups)
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]. The paper's kernel, of even size, gives a frame too many: the last is dropped."""
        if kernels.pay_on(x.device):
            y = kernels.grouped_convolution(self.conv, x)
        else:
            y = self.conv(x.mT)[..., : x.shape[1]].mT
        return F.gelu(y).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over all frames of a clip. Clips are never padded, so there is no mask."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        size, self.heads, self.dropout = config.hidden_size, config.num_attention_heads, config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections)
        if self.training and kernels.pay_on(x.device):
            y = kernels.attention(q, k, v, self.dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation_dropout = kernels.Dropout(config.activation_dropout)
        self.hidden_dropout = kernels.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x = self.activation_dropout(F.gelu(self.intermediate_dense(x)))
        return self.hidden_dropout(self.output_dense(x))


class Layer(nn.Module):
    """One transformer layer, post-norm (base) or pre-norm (large: ``do_stable_layer_norm``)."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.norm_first = config.do_stable_layer_norm
        self.dropout = kernels.Dropout(config.hidden_dropout)
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.layer_norm(x)))
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + self.dropout(self.attention(x)))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Positions, then the layers. Layerdrop: in training each layer is skipped with that probability."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.norm_first = config.do_stable_layer_norm
        self.dropout = kernels.Dropout(config.hidden_dropout)
        self.layerdrop = config.layerdrop
        self.pos_conv_embed = ConvPositions(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, recompute: bool = False) -> tuple[Tensor, ...]:
        """Projected features [B, T, D] to N + 1 hidden states [B, T, D]."""
        x = x + self.pos_conv_embed(x)
        x = self.dropout(x if self.norm_first else self.layer_norm(x))
        hidden = [x]
        for layer in self.layers:
            if not (self.training and self.layerdrop and torch.rand((), device="cpu").item() < self.layerdrop):
                # The backward pass begins with the last layer: recomputing it would save nothing at the peak.
                again = recompute and layer is not self.layers[-1]
                x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            hidden.append(x)
        if self.norm_first:
            hidden[-1] = self.layer_norm(x)
        return tuple(hidden)


class Hubert(nn.Module):
    """The model, of teachers and students. Its weights are PyTorch's defaults until ``initialise`` sets them.
    >>> Hubert(preset("tiny", "logmel"))(torch.zeros(3, 16_000)).last.shape
    torch.Size([3, 49, 192])"""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether activations are computed again in the backward pass: less memory, about 1.3 times the time."""
        self.feature_extractor = FeatureExtractor(config) if config.front_end == "waveform" else LogMel()
        self.feature_projection = FeatureProjection(config)
        self.masked_spec_embed = nn.Parameter(torch.rand(config.hidden_size))
        self.encoder = Encoder(config)

    def forward(
        self, waveforms: Tensor, mask: Tensor | None = None, hidden_states: bool = False, normalised: bool = False
    ) -> HubertOutput:
        """Hidden states of clips of equal length, never padded: GroupNorm would take the padding for speech. Raises
        ValueError when a shape does not fit.

        Args:
            waveforms: float [B, S], S >= 400 samples at 16 kHz.
            mask: bool [B, T], True where a frame is replaced by the mask embedding; None: nowhere.
            hidden_states: also return the output of every layer.
            normalised: ``do_normalize`` was seen to already: these are crops of whole utterances that were normalised.
        """
        if waveforms.ndim != 2 or not (frames := frame_count(waveforms.shape[1])):
            raise ValueError(f"waveforms must be [clips, samples >= {RECEPTIVE_FIELD}], not {list(waveforms.shape)}")
        if mask is not None and mask.shape != (len(waveforms), frames):
            raise ValueError(f"mask is {list(mask.shape)}; these waveforms have [{len(waveforms)}, {frames}] frames")
        if self.config.do_normalize and not normalised:
            waveforms = audio.normalise(waveforms)
        if recompute := self.recompute and torch.is_grad_enabled():
            # One clip after the other, so that no two clips' activations are in memory together.
            clips = [checkpoint(self.feature_extractor, clip, use_reentrant=False) for clip in waveforms.split(1)]
            features = torch.cat(clips)
        else:
            features = self.feature_extractor(waveforms)
        if features.requires_grad and (scale := self.config.feature_grad_mult) != 1:
            features.register_hook(lambda gradient: gradient * scale)
        x = self.feature_projection(features)
        if mask is not None:
            x = torch.where(mask[..., None], self.masked_spec_embed.to(x.dtype), x)
        hidden = self.encoder(x, recompute)
        convolved = features if self.config.front_end == "waveform" else None
        return HubertOutput(hidden[-1], hidden if hidden_states else None, convolved)


class Head(nn.Module):
    """Scores of K clusters for each frame: cosine(projection, label embedding) / 0.1, always float32."""

    def __init__(self, config: HubertConfig, clusters: int) -> None:
        super().__init__()
        self.final_proj = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.label_embeddings = nn.Parameter(torch.rand(clusters, config.classifier_proj_size))

    def forward(self, x: Tensor) -> Tensor:
        """Frames [..., D] to logits [..., K] in [-10, 10]. In half precision they would be off by up to 0.03."""
        with torch.autocast(x.device.type, enabled=False):
            projected = F.normalize(self.final_proj(x.to(self.label_embeddings.dtype)), dim=-1)
            return projected @ F.normalize(self.label_embeddings, dim=-1).T / 0.1


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights of a ``Hubert``, a ``Head`` or linear layers beside them from ``generator``, as fairseq does.

    Convolutions kaiming-normal; both projections PyTorch's uniform ±1/√fan_in; other linear layers N(0, 0.02), bias 0;
    norms 1 and 0; mask and label embeddings U(0, 1); positional convolution N(0, √(4 / (128 D))), set before its weight
    norm: torchaudio and transformers write to ``conv.weight`` after it, which changes nothing (0.0074, not 0.0064).
    """
    for name, parameter in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        if name in ("masked_spec_embed", "label_embeddings"):
            parameter.uniform_(generator=generator)
        elif kind == "original1":
            parameter.normal_(0, math.sqrt(4 / (parameter.shape[0] * parameter.shape[2])), generator=generator)
            module.get_parameter(f"{owner}.original0").copy_(parameter.norm(dim=(0, 1), keepdim=True))
        elif kind == "original0":
            continue  # set with original1
        elif "layer_norm" in owner:
            parameter.fill_(1.0 if kind == "weight" else 0.0)
        elif owner.endswith(("feature_projection.projection", "final_proj")):
            bound = 1 / math.sqrt(module.get_submodule(owner).in_features)
            parameter.uniform_(-bound, bound, generator=generator)
        elif kind == "bias":
            parameter.zero_()
        elif owner.startswith("feature_extractor"):
            nn.init.kaiming_normal_(parameter, generator=generator)
        else:
            parameter.normal_(0, 0.02, generator=generator)
