"""HuBERT: waveform in, hidden states out; masked frames predict cluster labels. One file, read from top to bottom.

Follows Hsu et al. 2021 (arXiv 2106.07447) as fairseq trains it. Parameter and configuration names are those of
transformers' ``HubertModel``, so a checkpoint is a Hugging Face folder and public HuBERT checkpoints load here.
Two variants are not in the paper: a log-mel front end (Fast-HuBERT, MelHuBERT) with the same 50 Hz frames, and
sinusoidal positions.

Shapes: B clips, S samples, T = floor((S - 400) / 320) + 1 frames, D hidden size, K clusters.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchaudio.compliance.kaldi import get_mel_banks

from fedhubert_lib import audio, files, kernels
from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, frame_count
from fedhubert_lib.kernels import dropout

MELS = 80


@dataclass(frozen=True)
class HubertConfig:
    """Everything that fixes the network; field names are those of transformers' ``HubertConfig``.

    The last five fields are ours: ``front_end``, ``position_embedding``, ``feature_grad_mult`` (fairseq: gradient scale
    of the convolutions; 0.1 in base), ``do_normalize`` (zero mean, unit variance of each clip; transformers keeps it in
    ``preprocessor_config.json``) and ``classifier_proj_size`` (fairseq ``final_dim``: size in which frames and label
    embeddings are compared).
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
    position_embedding: Literal["conv", "sinusoidal"] = "conv"
    feature_grad_mult: float = 0.1
    do_normalize: bool = False
    classifier_proj_size: int = 256

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.hidden_size % self.num_conv_pos_embedding_groups:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
                f" and of num_conv_pos_embedding_groups {self.num_conv_pos_embedding_groups}"
            )
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError("conv_dim, conv_kernel and conv_stride differ in length")
        if (hop := math.prod(self.conv_stride)) != HOP:
            raise ValueError(f"conv_stride {self.conv_stride} makes {hop} samples per frame; labels need {HOP}")
        for name, allowed in {
            "feat_extract_norm": ("group", "layer"),
            "front_end": ("waveform", "logmel"),
            "position_embedding": ("conv", "sinusoidal"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")

    @property
    def feature_size(self) -> int:
        """Size of a frame between front end and projection."""
        return self.conv_dim[-1] if self.front_end == "waveform" else 2 * MELS


_SMALL_RUN = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    # base and large as published (fairseq examples/hubert/config/pretrain); tiny and small keep base's shape and are
    # for runs of minutes and hours, in which dropout only slows learning.
    "tiny": dict(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        conv_dim=(128,) * 7,
        classifier_proj_size=128,
        **_SMALL_RUN,
    ),
    "small": dict(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        conv_dim=(256,) * 7,
        classifier_proj_size=256,
        **_SMALL_RUN,
    ),
    "base": {},
    "large": dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        conv_bias=False,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        do_normalize=True,
        feature_grad_mult=1.0,
        classifier_proj_size=768,
        **_SMALL_RUN,
    ),
}


def preset(name: str, front_end: str = "waveform", **changes: Any) -> HubertConfig:
    """The configuration called ``name``: tiny, small, base or large, with ``changes`` to single fields.

    >>> preset("tiny", "logmel", num_hidden_layers=2).num_hidden_layers
    2
    """
    if name not in PRESETS:
        raise ValueError(f"no model preset {name!r}; there are {', '.join(PRESETS)}")
    return replace(HubertConfig(**PRESETS[name]), front_end=front_end, **changes)


@dataclass(frozen=True)
class HubertOutput:
    """What a forward pass gives."""

    last: Tensor
    """[B, T, D] output of the last layer (of the final LayerNorm, for pre-norm models)."""
    hidden: tuple[Tensor, ...] | None
    """N + 1 tensors [B, T, D] when asked for: hidden[0] enters the first layer, hidden[i] leaves layer i (1-based, as
    fairseq's ``output_layer``); hidden[N] is ``last``."""
    features: Tensor | None
    """[B, T, C] output of the convolutions, for the feature penalty; None with the log-mel front end."""


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``scale`` (fairseq ``GradMultiply``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


# ------------------------------------------------------------------------------------------------------- front ends


class ConvLayer(nn.Module):
    """Convolution, normalisation (group: over time, in layer 0 only; layer: over channels, in each), GELU."""

    def __init__(self, config: HubertConfig, index: int) -> None:
        super().__init__()
        channels = config.conv_dim[index - 1] if index else 1
        self.conv = nn.Conv1d(
            channels,
            config.conv_dim[index],
            config.conv_kernel[index],
            config.conv_stride[index],
            bias=config.conv_bias,
        )
        if config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(config.conv_dim[index])
        elif index == 0:
            self.layer_norm = nn.GroupNorm(config.conv_dim[0], config.conv_dim[0])
        else:
            self.layer_norm = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] to [B, C', T']."""
        x = self.conv(x)
        if isinstance(self.layer_norm, nn.LayerNorm):
            x = self.layer_norm(x.mT).mT
        elif self.layer_norm is not None:
            x = self.layer_norm(x)
        return F.gelu(x)

    def rows(self, x: Tensor) -> Tensor:
        """The same on rows of all clips one after the other, [R, C] to [R / stride, C'], but for GroupNorm."""
        dtype = kernels.compute_dtype(x.device, x.dtype)
        x = kernels.StridedConv.apply(x.to(dtype), self.conv.weight.to(dtype), self.conv.stride[0])
        if self.conv.bias is not None:
            x = x + self.conv.bias.to(x.dtype)
        return F.gelu(x if self.layer_norm is None else self.layer_norm(x))


class FeatureExtractor(nn.Module):
    """Seven convolutions: waveform [B, S] to features [B, T, C]. No gradient flows to the waveform."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.group_norm = config.feat_extract_norm == "group"
        self.conv_layers = nn.ModuleList(ConvLayer(config, index) for index in range(len(config.conv_dim)))
        self.gradient_checkpointing = False

    def forward(self, waveforms: Tensor) -> Tensor:
        # Seven eighths of all activations are those of the first three layers. Recomputed one clip after the other, no
        # two clips' are ever there together.
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        by_rows = kernels.take_over("convolutions", waveforms.device)
        first = self._first_rows if by_rows else self._first
        x = torch.cat([_run(first, True, clip) for clip in waveforms.split(1)]) if recompute else first(waveforms)
        for layer in self.conv_layers[3:]:
            x = layer.rows(x) if by_rows else layer(x)
        return x.view(len(waveforms), -1, x.shape[1])[:, :-1] if by_rows else x.mT

    def _first(self, waveforms: Tensor) -> Tensor:
        x = waveforms[:, None]
        for layer in self.conv_layers[:3]:
            x = layer(x)
        return x

    def _first_rows(self, waveforms: Tensor) -> Tensor:
        # One frame more than there are, so that what reaches over the end of a clip ends up in a frame of its own.
        samples = (frame_count(waveforms.shape[1]) + 1) * HOP
        first = self.conv_layers[0]
        if self.group_norm:
            rows = samples // first.conv.stride[0]
            x = F.gelu(kernels.group_normed(first.conv, first.layer_norm, waveforms, rows))
        else:
            padded = F.pad(waveforms, (0, samples - waveforms.shape[1]))  # cuts where negative
            x = first.rows(padded.reshape(-1, 1))
        for layer in self.conv_layers[1:3]:
            x = layer.rows(x)
        return x


class LogMel(nn.Module):
    """Log-mel spectrum, two 10 ms frames stacked into one of 20 ms: waveform [B, S] to [B, T, 160], no parameters.

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
        with torch.autocast(waveforms.device.type, enabled=False):
            frames = waveforms.float().unfold(1, RECEPTIVE_FIELD, HOP // 2)
            frames = frames - frames.mean(-1, keepdim=True)
            previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
            spectrum = torch.fft.rfft((frames - 0.97 * previous) * self.window, n=512)
            x = (spectrum.abs().square() @ self.mels).clamp_min(torch.finfo(torch.float32).eps).log()
            x = x - x.mean(1, keepdim=True)
            x = x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-5)
            if x.shape[1] % 2:
                x = torch.cat([x, x[:, -1:]], 1)
            return x.view(len(x), -1, 2 * MELS)


class FeatureProjection(nn.Module):
    """Features [B, T, C] to the transformer's size [B, T, D]."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.layer_norm = (
            nn.LayerNorm(config.feature_size, eps=config.layer_norm_eps) if config.feat_proj_layer_norm else None
        )
        self.projection = nn.Linear(config.feature_size, config.hidden_size)
        self.dropout = config.feat_proj_dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return dropout(self.projection(x), self.dropout, self.training)


# ------------------------------------------------------------------------------------------------------- transformer


class ConvPositions(nn.Module):
    """Relative positions from a grouped convolution over 128 frames, weight-normalised per tap, then GELU.

    The paper's kernel, of even size, gives one frame too many, of which the last is dropped.
    """

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        kernel = config.num_conv_pos_embeddings
        conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            kernel,
            padding=kernel // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)
        transform, inverse = kernels.transforms(kernel)
        self.register_buffer("transform", transform, persistent=False)
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if kernels.take_over("positions", x.device):
            y = kernels.grouped_convolution(self.conv, self.transform, self.inverse, x)
        else:
            y = self.conv(x.mT)[..., : x.shape[1]].mT
        return F.gelu(y).to(x.dtype)


class SinusoidalPositions(nn.Module):
    """Absolute positions (Vaswani et al. 2017): sines in the first half of the dimensions, cosines in the second."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        half = config.hidden_size // 2
        rates = torch.exp(torch.arange(half) * (-math.log(10_000.0) / max(half - 1, 1)))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.rates
        return torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over all frames of a clip. Clips are never padded, so there is no mask."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        # The CPU's fused kernel knows no dropout, and in bfloat16 takes longer than two matrix products and a softmax.
        if self.training and x.device.type == "cpu" and (self.dropout or q.dtype == torch.bfloat16):
            scores = (q * (q.shape[-1] ** -0.5)) @ k.mT
            with torch.autocast("cpu", enabled=False):  # computes in float32 anyway; autocast would copy in and out
                shares = scores.softmax(-1)
            y = dropout(shares, self.dropout, True) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation_dropout = config.activation_dropout
        self.hidden_dropout = config.hidden_dropout

    def forward(self, x: Tensor) -> Tensor:
        x = dropout(F.gelu(self.intermediate_dense(x)), self.activation_dropout, self.training)
        return dropout(self.output_dense(x), self.hidden_dropout, self.training)


class Layer(nn.Module):
    """One transformer layer, post-norm (base) or pre-norm (large: ``do_stable_layer_norm``)."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.norm_first = config.do_stable_layer_norm
        self.dropout = config.hidden_dropout
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + dropout(self.attention(self.layer_norm(x)), self.dropout, self.training)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + dropout(self.attention(x), self.dropout, self.training))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Positions, then the layers. Layerdrop: in training each layer is skipped with that probability."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.norm_first = config.do_stable_layer_norm
        self.dropout = config.hidden_dropout
        self.layerdrop = config.layerdrop
        if config.position_embedding == "conv":
            self.pos_conv_embed = ConvPositions(config)
        else:
            self.pos_conv_embed = SinusoidalPositions(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, hidden_states: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        x = x + self.pos_conv_embed(x)
        x = dropout(x if self.norm_first else self.layer_norm(x), self.dropout, self.training)
        hidden = [x]
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            if not (self.training and self.layerdrop and torch.rand((), device="cpu").item() < self.layerdrop):
                # The backward pass begins with the last layer: recomputing it would save nothing at the peak.
                x = _run(layer, recompute and layer is not self.layers[-1], x)
            if hidden_states:
                hidden.append(x)
        if self.norm_first:
            x = self.layer_norm(x)
            hidden[-1] = x
        return x, tuple(hidden) if hidden_states else None


class Hubert(nn.Module):
    """The model, teacher and student alike. Weights are PyTorch's defaults until ``initialise`` or ``load``."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config) if config.front_end == "waveform" else LogMel()
        self.feature_projection = FeatureProjection(config)
        self.masked_spec_embed = nn.Parameter(torch.rand(config.hidden_size))
        self.encoder = Encoder(config)

    def forward(
        self,
        waveforms: Tensor,
        mask: Tensor | None = None,
        hidden_states: bool = False,
        normalised: bool = False,
    ) -> HubertOutput:
        """Hidden states of clips of equal length, never padded: GroupNorm would take the padding for speech.

        Args:
            waveforms: float [B, S], S >= 400 samples at 16 kHz.
            mask: bool [B, T], True where a frame is replaced by the mask embedding; None: nowhere.
            hidden_states: also return the output of every layer.
            normalised: ``do_normalize`` was seen to already: these are crops of whole utterances that were normalised.

        Raises ValueError when a shape does not fit.
        """
        if waveforms.ndim != 2 or not (frames := frame_count(waveforms.shape[1])):
            raise ValueError(f"waveforms must be [clips, samples >= {RECEPTIVE_FIELD}], not {list(waveforms.shape)}")
        if mask is not None and mask.shape != (len(waveforms), frames):
            raise ValueError(f"mask is {list(mask.shape)}; these waveforms have [{len(waveforms)}, {frames}] frames")
        if self.config.do_normalize and not normalised:
            waveforms = audio.normalise(waveforms)
        features = self.feature_extractor(waveforms)
        if self.config.feature_grad_mult != 1 and features.requires_grad:
            features = ScaleGradient.apply(features, self.config.feature_grad_mult)
        x = self.feature_projection(features)
        if mask is not None:
            x = torch.where(mask[..., None], self.masked_spec_embed.to(x.dtype), x)
        last, hidden = self.encoder(x, hidden_states)
        return HubertOutput(last, hidden, features if self.config.front_end == "waveform" else None)

    def gradient_checkpointing(self, on: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, about 1.3 times the time."""
        self.encoder.gradient_checkpointing = on
        if self.config.front_end == "waveform":
            self.feature_extractor.gradient_checkpointing = on


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


def _run(function: Callable[..., Tensor], recompute: bool, *arguments: Any) -> Tensor:
    return checkpoint(function, *arguments, use_reentrant=False) if recompute else function(*arguments)


# ---------------------------------------------------------------------------------------------------- initialisation


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights of a ``Hubert`` or ``Head`` from ``generator``, as fairseq does.

    Convolutions kaiming-normal; the two projections keep PyTorch's uniform ±1/√fan_in; other linear layers N(0, 0.02)
    with zero bias; norms 1 and 0; mask and label embeddings U(0, 1). The positional convolution is N(0, √(4 / (128 D)))
    and its weight-norm magnitude is set from that: writing to ``conv.weight`` after weight-norm, as torchaudio and
    transformers do, changes nothing (their deviation is 0.0074 instead of base's 0.0064).
    """
    for name, parameter in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        if name in ("masked_spec_embed", "label_embeddings"):
            parameter.uniform_(generator=generator)
        elif name.endswith("parametrizations.weight.original1"):
            deviation = math.sqrt(4 / (parameter.shape[0] * parameter.shape[2]))
            parameter.normal_(0, deviation, generator=generator)
            magnitude = module.get_parameter(name.replace("original1", "original0"))
            magnitude.copy_(parameter.norm(dim=(0, 1), keepdim=True))
        elif name.endswith("parametrizations.weight.original0"):
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


# ------------------------------------------------------------------------------------------------------- checkpoints


def documents(config: HubertConfig) -> dict[str, str]:
    """The small files that make a folder with ``model.safetensors`` a Hugging Face one: text by name.

    transformers loads it if front end and positions are those of the paper; else its ``model_type`` says no.
    """
    published = config.front_end == "waveform" and config.position_embedding == "conv"
    values = asdict(config) | {
        "model_type": "hubert" if published else "fedhubert",
        "architectures": ["HubertModel"],
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "num_feat_extract_layers": len(config.conv_dim),
    }
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": config.do_normalize,
        "return_attention_mask": config.feat_extract_norm == "layer",
    }
    texts = {"config.json": values, "preprocessor_config.json": preprocessor}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in texts.items()}


def save(folder: Path, model: Hubert, head: Head | None = None) -> None:
    """Write a Hugging Face folder: ``config.json``, ``model.safetensors`` (float32), ``preprocessor_config.json``,
    and ``head.safetensors`` beside them. Whole or not at all; an existing folder is replaced.
    """
    with files.atomic(folder) as temporary:
        temporary.mkdir()
        for name, text in documents(model.config).items():
            (temporary / name).write_text(text, encoding="utf-8")
        _write_tensors(temporary / "model.safetensors", model)
        if head is not None:
            _write_tensors(temporary / "head.safetensors", head)


def load(folder: str | Path, weights: bool = True) -> tuple[Hubert, Head | None]:
    """Read a Hugging Face HuBERT folder, ours or public, in eval mode; with the head if ``head.safetensors`` is there.

    Reads one file or shards, the older ``weight_g``/``weight_v`` names, and fine-tuned checkpoints (prefix ``hubert.``,
    whose task head is left out). A checkpoint fine-tuned without masking has no mask embedding: it gets a random one,
    always the same, uniform as in transformers; nothing but masked training from this checkpoint uses it. Without
    ``weights`` everything is checked but no weight is read: the modules are on the device ``meta``. Raises ValueError
    or FileNotFoundError that says what does not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    files_of_weights = _weight_files(folder)
    tensors = {}
    for name, tensor in _read_tensors(files_of_weights, weights).items():
        name = name.removeprefix("hubert.")
        for old, new in (("conv.weight_g", "original0"), ("conv.weight_v", "original1")):
            if name.endswith(old):
                name = name.removesuffix(old) + f"conv.parametrizations.weight.{new}"
        if not name.startswith(("lm_head.", "projector.", "classifier.", "layer_weights")):
            tensors[name] = tensor
    random = torch.rand(config.hidden_size, generator=torch.Generator().manual_seed(0))
    device = "cpu" if weights else "meta"
    tensors.setdefault("masked_spec_embed", random.to(device))
    with torch.device(device):
        model, head = Hubert(config), None
        _fill(model, tensors, files_of_weights[0])
        path = folder / "head.safetensors"
        if path.is_file():
            tensors = _read_tensors([path], weights)
            if "label_embeddings" not in tensors:
                raise ValueError(f"{path}: holds no label_embeddings; it is not a HuBERT head")
            clusters, size = tensors["label_embeddings"].shape
            head = Head(replace(model.config, classifier_proj_size=size), clusters)
            _fill(head, tensors, path)
            head.eval()
    return model.eval(), head


def read_config(folder: Path) -> HubertConfig:
    """The configuration of the checkpoint in ``folder``, from its JSON files. Raises as ``load`` does.

    Whether the model wants normalised waveforms stands in ``processor_config.json`` (transformers 5), in
    ``preprocessor_config.json``, or, in ours, in ``config.json``. It must stand there for a model with layer norm
    in its convolutions, which gives other numbers without; group norm removes scale and offset but for rounding.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no config.json; give the folder of a Hugging Face HuBERT checkpoint")
    values = _read_json(path)
    if values.get("model_type") not in ("hubert", "fedhubert"):
        raise ValueError(f"{path}: model_type is {values.get('model_type')!r}; only HuBERT checkpoints can be read")
    fixed = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "conv_pos_batch_norm": False}
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {values[name]!r}; only {value!r} is supported")
    processor = _read_json(folder / "processor_config.json").get("feature_extractor")
    processor = processor or _read_json(folder / "preprocessor_config.json")
    if processor.get("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
        raise ValueError(
            f"{folder}: its model hears {processor['sampling_rate']} Hz; only {SAMPLE_RATE} Hz is supported"
        )
    if processor:
        values["do_normalize"] = processor.get("do_normalize", True)  # the default of Wav2Vec2FeatureExtractor
    elif "do_normalize" not in values and values.get("feat_extract_norm") == "layer":
        raise ValueError(
            f"{folder}: neither processor_config.json nor preprocessor_config.json says whether the model was trained"
            " on normalised waveforms; copy one from where the checkpoint comes from, or write"
            ' preprocessor_config.json with {"do_normalize": true}, as for the published large and xlarge models'
        )
    known = {field.name for field in fields(HubertConfig)}
    try:
        return HubertConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object; copy it again")
    return values


def _weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``, or the shards that its index names."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _read_json(index).get("weight_map") or {}
        shards = [folder / name for name in sorted(set(map(str, names.values())))]
        if not shards or any(path.parent != folder for path in shards):
            raise ValueError(f"{index}: has no weight_map of files beside it; copy the checkpoint again")
        if missing := [path.name for path in shards if not path.is_file()]:
            raise FileNotFoundError(f"{folder}: {', '.join(missing)} missing, which {index.name} names; copy it again")
        return shards
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder}: holds {pickles[0]} but no model.safetensors. Pickled weights are never read; convert them once:"
            f" transformers.HubertModel.from_pretrained({str(folder)!r}).save_pretrained(ANOTHER_FOLDER)"
        )
    raise FileNotFoundError(f"{folder}: holds no weights (model.safetensors); copy the checkpoint again, whole")


def _read_tensors(paths: list[Path], weights: bool = True) -> dict[str, Tensor]:
    """The tensors of safetensors files, or, without ``weights``, tensors of their shapes on the device ``meta``."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in list(file.keys()):  # it is no dictionary
                    shape = file.get_slice(name).get_shape()
                    tensors[name] = file.get_tensor(name) if weights else torch.empty(shape, device="meta")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: cannot be read ({error}); copy it again, or make it anew") from error
    return tensors


def _write_tensors(path: Path, module: nn.Module) -> None:
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in module.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    wanted = module.state_dict()
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    shapes = [name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{path}: does not fit its config.json. Missing {missing[:5]}, unexpected {unexpected[:5]}, of another"
            f" shape {sorted(shapes)[:5]} ({len(missing)}, {len(unexpected)}, {len(shapes)} in all)"
        )
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
