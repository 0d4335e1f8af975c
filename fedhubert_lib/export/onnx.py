"""ONNX for any number of clips of any length: float32, and dynamic int8 of the matrix products.

Input ``waveforms`` [B, S] float32 at 16 kHz; output ``hidden_states`` [N + 1, B, T, D], the last of which is the
model's output. Quantising the convolutions, too, would save little more and be slower than float32.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedhubert_lib import files, hubert
from fedhubert_lib.export import checks, twin

OPSET = 18
INT8_COSINE = 0.99
"""Least mean cosine between a frame of the last layer in int8 and in float32."""


def export(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Write ``model.onnx`` and ``model.int8.onnx`` of ``checkpoint`` into ``folder`` and compare both.

    Returns ``difference``, the largest of a float32 hidden state; ``int8_cosine``, the mean over frames of the last
    layer; and the ``bytes`` and ``int8_bytes`` of the files; the same lies in ``onnx.json``. Raises ExportError where
    they are not near enough.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, _ = hubert.load(checkpoint)
    with files.atomic(folder) as temporary:
        temporary.mkdir()
        whole, small = temporary / "model.onnx", temporary / "model.int8.onnx"
        write(model, whole)
        facts = {"difference": checks.compare(model, lambda waveforms: run(whole, waveforms))}
        quantize_dynamic(whole, small, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
        facts |= {
            "int8_cosine": cosine(model, small),
            "bytes": whole.stat().st_size,
            "int8_bytes": small.stat().st_size,
        }
        if facts["int8_cosine"] < INT8_COSINE:
            raise checks.ExportError(f"int8 frames have cosine {facts['int8_cosine']:.4f}; {INT8_COSINE} is asked")
        (temporary / "onnx.json").write_text(json.dumps({"opset": OPSET, **facts}, indent=2) + "\n", encoding="utf-8")
    return facts


def write(model: hubert.Hubert, path: Path) -> None:
    """Trace the model's twin with dynamic clips and samples."""
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        twin.Layers(model),
        (torch.zeros(2, 16_000),),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=(dynamic,),
        input_names=["waveforms"],
        output_names=["hidden_states"],
        verbose=False,
    )
    program.save(path, external_data=False)


def run(path: Path, waveforms: Tensor) -> Sequence[Tensor]:
    """Hidden states that onnxruntime gives on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(torch.from_numpy(session.run(None, {"waveforms": waveforms.numpy()})[0]))


@torch.no_grad()
def cosine(model: hubert.Hubert, path: Path) -> float:
    """Mean cosine between frames of the last layer of ``model`` and of ``path``, over ``checks.SHAPES``."""
    found = []
    for clips, samples in checks.SHAPES:
        waveforms = checks.noise(clips, samples)
        ours, theirs = model(waveforms).last, run(path, waveforms)[-1]
        found.append(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).flatten().numpy())
    return float(np.concatenate(found).mean())
