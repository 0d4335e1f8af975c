"""Our models inside s3prl: an upstream that is registered when s3prl starts, no fork and no copied folder.

``export.s3prl`` starts it in s3prl's own environment; it needs ``pretrained`` and the model alone. As a program,

    python -m fedhubert_lib.export.s3prl_entry run ARGUMENTS OF s3prl.run_downstream ... -u fedhubert -k CHECKPOINT
    python -m fedhubert_lib.export.s3prl_entry states UPSTREAM CHECKPOINT WAVEFORMS STATES

the first is s3prl's own command with ``fedhubert`` among its upstreams; the second writes the hidden states that an
upstream gives for waveforms, for comparisons.
"""

import sys
from collections.abc import Sequence
from types import ModuleType

import soundfile
import torch
import torchaudio
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedhubert_lib import pretrained
from fedhubert_lib.audio import HOP


class Upstream(nn.Module):
    """s3prl's upstream interface over a checkpoint folder: all N + 1 hidden states, 50 frames a second.

    Clips pass in groups of equal length and are never padded, so that no clip's features depend on its batch. Shorter
    ones are filled up after encoding, with their last frame: s3prl may keep one more than they have.
    """

    def __init__(self, ckpt: str, model_config: str | None = None, refresh: bool = False, **options: object) -> None:
        super().__init__()
        self.model, _ = pretrained.load(ckpt)
        self.model.encoder.layerdrop = 0.0  # s3prl asserts a constant number of states, and skipped layers repeat one

    def get_downsample_rates(self, key: str) -> int:
        """Samples from one frame to the next."""
        return HOP

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...] | Tensor]:
        """Waveforms [samples] at 16 kHz to ``hidden_states``, each [B, T, D], and ``last_hidden_state``."""
        encoded: dict[int, Tensor] = {}
        for length in dict.fromkeys(map(len, wavs)):
            indices = [index for index, wav in enumerate(wavs) if len(wav) == length]
            states = self.model(torch.stack([wavs[index] for index in indices]), hidden_states=True).hidden
            encoded |= dict(zip(indices, torch.stack(states, dim=1), strict=True))
        frames_first = [encoded[index].transpose(0, 1) for index in range(len(wavs))]
        most = max(map(len, frames_first))
        filled = [torch.cat([frames, frames[-1:].expand(most - len(frames), -1, -1)]) for frames in frames_first]
        hidden = torch.stack(filled).unbind(2)
        return {"hidden_states": hidden, "last_hidden_state": hidden[-1]}


def apply_effects_file(path: str, effects: Sequence[Sequence[str]]) -> tuple[Tensor, int]:
    """The effects that s3prl's speech_commands asks of libsox, which few machines have: mono at 16 kHz, and a gain.

    Equal to libsox's (3e-8) on 16 kHz mono files. Raises ValueError for any other file or effect.
    """
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if rate != 16_000 or samples.shape[1] != 1:
        raise ValueError(f"{path}: {rate} Hz, {samples.shape[1]} channels; 16000 Hz mono is needed here")
    waveform = torch.from_numpy(samples.T.copy())
    for name, value in effects:
        if name == "gain":
            waveform = waveform * 10 ** (float(value) / 20)
        elif (name, value) not in (("channels", "1"), ("rate", "16000")):
            raise ValueError(f"effect {name} {value} is not one that speech_commands uses")
    return waveform, rate


def states(hub: ModuleType, upstream: str, checkpoint: str, waveforms: str, out: str) -> None:
    """Write the hidden states of each tensor [B, S] of the file ``waveforms`` under its name: [layers, B, T, D]."""
    entry = getattr(hub, upstream)(ckpt=checkpoint).eval()
    with torch.no_grad():
        clips = load_file(waveforms).items()
        save_file({name: torch.stack(entry(list(tensor))["hidden_states"]).contiguous() for name, tensor in clips}, out)


def main(arguments: Sequence[str]) -> None:
    """The program described above."""
    torchaudio.sox_effects.apply_effects_file = apply_effects_file  # before s3prl imports libsox's
    from s3prl import hub

    hub.fedhubert = Upstream
    if arguments[0] == "states":
        states(hub, *arguments[1:])
    else:
        from s3prl import run_downstream

        sys.argv = ["run_downstream", *arguments[1:]]
        run_downstream.main()


if __name__ == "__main__":
    main(sys.argv[1:])
