"""A Hugging Face folder: ``AutoModel`` and ``AutoFeatureExtractor`` load it, offline."""

from pathlib import Path

from torch import Tensor

from fedhubert_lib import files, hubert
from fedhubert_lib.export import checks


def export(checkpoint: Path, folder: Path) -> float:
    """Write the model of ``checkpoint`` into ``folder`` and compare; returns the largest difference.

    What only pretraining needs is left out. Raises ExportError for an architecture that transformers does not know, or
    where transformers gives other numbers.
    """
    model, _ = hubert.load(checkpoint)
    checks.require_published(model, "transformers")
    with files.atomic(folder) as temporary:
        hubert.save(temporary, model)
        return check(model, temporary)


def check(model: hubert.Hubert, folder: Path) -> float:
    """Largest difference between ``model`` and what transformers loads from ``folder``."""
    from transformers import AutoFeatureExtractor, AutoModel

    theirs = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    rate = extractor.sampling_rate

    def encode(waveforms: Tensor) -> tuple[Tensor, ...]:
        inputs = extractor(
            list(waveforms.numpy()), sampling_rate=rate, return_tensors="pt", return_attention_mask=False
        )
        output = theirs(inputs.input_values, output_hidden_states=True)
        # The last of hidden_states has the final norm of pre-norm models in some versions of transformers only.
        return *output.hidden_states[:-1], output.last_hidden_state

    return checks.compare(model, encode)
