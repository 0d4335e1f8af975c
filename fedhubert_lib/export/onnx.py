"""ONNX for any number of clips of any length: float32, and dynamic int8 of the matrix products.

Input ``waveforms`` [B, S] float32 at 16 kHz; output ``hidden_states`` [N + 1, B, T, D], the last of which is the
model's output. Quantising the convolutions, too, would save little more and be slower than float32.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhubert_lib import files, pretrained
from fedhubert_lib.audio import HOP, RECEPTIVE_FIELD
from fedhubert_lib.export import formats
from fedhubert_lib.hubert import Hubert, LogMel

OPSET = 18
INT8_COSINE = 0.99
"""Smallest mean cosine between a frame of the last layer in int8 and in float32."""


class HiddenStates(nn.Module):
    """All N + 1 hidden states of a model, [N + 1, B, T, D]."""

    def __init__(self, model: Hubert) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        if isinstance(model.feature_extractor, LogMel):
            self.model.feature_extractor = ConvLogMel()
        self.eval()

    def forward(self, waveforms: Tensor) -> Tensor:
        """Waveforms [B, S]."""
        return torch.stack(self.model(waveforms, hidden_states=True).hidden)


class ConvLogMel(LogMel):
    """``LogMel`` as one convolution, its squared size, and a matrix of mel filters: ONNX has no such Fourier transform.

    Removing the mean, pre-emphasis, window and Fourier transform are linear in the 400 samples of a frame: one matrix.
    """

    def __init__(self) -> None:
        super().__init__()
        of_samples = self.spectrum(torch.eye(RECEPTIVE_FIELD, dtype=torch.float64))
        transform = torch.cat([of_samples.real, of_samples.imag], dim=1).T.float()
        self.register_buffer("transform", transform[:, None])

    def forward(self, waveforms: Tensor) -> Tensor:
        """Waveforms [B, S] to [B, T, 160]."""
        real, imaginary = functional.conv1d(waveforms[:, None], self.transform, stride=HOP // 2).square().chunk(2, 1)
        # A convolution of width one, so that quantising matrix products spares it: power spectra span many decades.
        return self.stacked(functional.conv1d(real + imaginary, self.mels.T[..., None]).mT)


def export(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Write ``model.onnx`` and ``model.int8.onnx`` of ``checkpoint`` into ``folder`` and compare both.

    Returns ``difference``, the largest of a float32 hidden state; ``int8_cosine``, the mean over frames of the last
    layer; and the ``bytes`` and ``int8_bytes`` of the files; ``onnx.json`` has the same. Raises ExportError where a
    limit is exceeded.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, _ = pretrained.load(checkpoint)
    with files.atomic(folder) as temporary:
        temporary.mkdir()
        path, int8_path = temporary / "model.onnx", temporary / "model.int8.onnx"
        _trace(pretrained.load(checkpoint)[0], path)
        facts = {"difference": formats.compare(model, lambda waveforms: run(path, waveforms))}
        seven = {"weight_type": QuantType.QInt8, "reduce_range": True}  # bits: sums of eight saturate without VNNI
        quantize_dynamic(path, int8_path, op_types_to_quantize=["MatMul"], **seven)
        facts["int8_cosine"] = _cosine(model, int8_path)
        facts |= {"bytes": path.stat().st_size, "int8_bytes": int8_path.stat().st_size}
        if facts["int8_cosine"] < INT8_COSINE:
            raise formats.ExportError(f"int8 frames have cosine {facts['int8_cosine']:.4f}; the limit is {INT8_COSINE}")
        files.write_json(temporary / "onnx.json", {"opset": OPSET, **facts})
    return facts


def _trace(model: Hubert, path: Path) -> None:
    """Trace ``model``, which becomes part of the exported module, with any number of clips and samples."""
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC(min=RECEPTIVE_FIELD)},)
    names = {"input_names": ["waveforms"], "output_names": ["hidden_states"]}
    options = {"dynamo": True, "opset_version": OPSET, "dynamic_shapes": shapes, "verbose": False}
    program = torch.onnx.export(HiddenStates(model), (torch.zeros(2, 16_000),), **options, **names)
    program.save(path, external_data=False)


def run(path: Path, waveforms: Tensor) -> Tensor:
    """Hidden states [N + 1, B, T, D] of ``waveforms`` [B, S] by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"waveforms": waveforms.numpy()})[0])


@torch.no_grad()
def _cosine(model: Hubert, path: Path) -> float:
    """Mean cosine between frames of the last layer of ``model`` and of ``path``, over ``formats.SHAPES``."""
    noises = [formats.noise(*shape) for shape in formats.SHAPES]
    cosines = [functional.cosine_similarity(model(x).last, run(path, x)[-1], dim=-1).flatten() for x in noises]
    return float(torch.cat(cosines).mean())
