"""A folder for torchaudio: the arguments of ``torchaudio.models.wav2vec2_model`` and the weights under its names.

    import json, safetensors.torch, torchaudio
    settings = json.load(open("FOLDER/torchaudio.json"))
    model = torchaudio.models.wav2vec2_model(**settings["model"])
    model.load_state_dict(safetensors.torch.load_file("FOLDER/model.safetensors"))

With ``normalize`` true in the file, waveforms must be given zero mean and unit variance first, as for torchaudio's own
large bundles. ``extract_features`` gives the N layers without the input of the first.
"""

import json
from pathlib import Path

import torch
import torchaudio
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhubert_lib import files, hubert
from fedhubert_lib.export import checks, twin


def export(checkpoint: Path, folder: Path) -> float:
    """Write the model of ``checkpoint`` for torchaudio and compare; returns the largest difference.

    Raises ExportError for an architecture that torchaudio does not know, or where it gives other numbers.
    """
    model, _ = hubert.load(checkpoint)
    checks.require_published(model, "torchaudio")
    settings = {"model": twin.arguments(model.config), "normalize": model.config.do_normalize, "sample_rate": 16_000}
    with files.atomic(folder) as temporary:
        temporary.mkdir()
        (temporary / "torchaudio.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(twin.weights(model), temporary / "model.safetensors")
        return check(model, temporary)


def check(model: hubert.Hubert, folder: Path) -> float:
    """Largest difference between the layers of ``model`` and those that torchaudio gives from ``folder``."""
    settings = json.loads((folder / "torchaudio.json").read_text(encoding="utf-8"))
    theirs = torchaudio.models.wav2vec2_model(**settings["model"])
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    theirs.eval()

    def encode(waveforms: Tensor) -> list[Tensor]:
        if settings["normalize"]:
            waveforms = torch.nn.functional.layer_norm(waveforms, waveforms.shape[-1:])
            waveforms = waveforms.view(len(waveforms), -1)
        layers, _ = theirs.extract_features(waveforms)
        if settings["model"]["encoder_layer_norm_first"]:  # extract_features leaves the final norm out, forward has it
            layers = [*layers[:-1], theirs(waveforms)[0]]
        return layers

    return checks.compare(model, encode, skip=1)
