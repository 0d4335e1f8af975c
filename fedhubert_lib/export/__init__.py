"""A trained model for other people's software: Hugging Face, torchaudio, s3prl, ONNX, and a card that describes it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMATS = {
    "huggingface": "a folder for transformers' AutoModel and AutoFeatureExtractor",
    "torchaudio": "a folder for torchaudio.models.wav2vec2_model",
    "hubert-local": "a file for s3prl's upstream hubert_local (needs: make s3prl)",
    "onnx": "a folder with float32 and int8 ONNX, for any number of clips of any length",
    "card": "a model card (README.md): data, partition, privacy, results and licence of a run's checkpoint",
}
NEEDS = {"huggingface": ["transformers"], "onnx": ["onnx", "onnxruntime", "onnxscript"]}
"""Packages that `make export` installs."""


def write(form: str, checkpoint: Path, out: Path) -> dict[str, float]:
    """Write ``checkpoint`` as ``form``, one of ``FORMATS``, to ``out``; returns what the comparison measured.

    Raises ExportError where a package is missing, ``out`` exists, or the export cannot be made or differs.
    """
    from fedhubert_lib.export import card, formats, onnx, s3prl  # here: the command needs FORMATS, and no torch

    if missing := [name for name in NEEDS.get(form, []) if importlib.util.find_spec(name) is None]:
        raise formats.ExportError(f"export {form} needs {', '.join(missing)}, which is not installed; run: make export")
    if out.exists():
        raise formats.ExportError(f"{out} is there already; name another, or remove it")
    exporters: dict[str, Callable[[Path, Path], Any]] = {
        "huggingface": formats.to_huggingface,
        "torchaudio": formats.to_torchaudio,
        "hubert-local": s3prl.to_hubert_local,
        "onnx": onnx.export,
        "card": card.export,
    }
    result = exporters[form](checkpoint, out)
    return result if isinstance(result, dict) else {"difference": result}
