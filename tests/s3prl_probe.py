"""s3prl's own probe, of its own parts, on given features: run by the Python of s3prl's environment, see test_s3prl.

    python s3prl_probe.py GIVEN STEPS RATE OUT

GIVEN (safetensors) holds frames [clips, layers, T, D], labels, validation, test (indices), order [steps, 32] (of
clips), and the weights that the probe starts from. OUT gets what it predicts for the test clips.
"""

import sys

import torch
from s3prl.downstream.model import UtteranceLevel
from s3prl.upstream.interfaces import Featurizer
from safetensors.torch import load_file, save_file
from torch import nn

tensors, steps, rate, out = load_file(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
frames, labels = tensors["frames"], tensors["labels"]


class Upstream(nn.Module):
    """Says the given frames of the clips whose index each waveform holds."""

    def get_downsample_rates(self, key):
        return 320

    def forward(self, wavs):
        clips = torch.stack([wav[0] for wav in wavs]).long() % len(frames)
        return {"hidden_states": tuple(frames[clips].transpose(0, 1))}


upstream = Upstream()
featurizer = Featurizer(upstream, upstream_device="cpu")
projector = nn.Linear(frames.shape[-1], 256)
model = UtteranceLevel(input_dim=256, output_dim=int(labels.max()) + 1, pooling="MeanPooling")
for name, module in (("projection", projector), ("classifier", model.post_net.linear)):
    module.load_state_dict({key: tensors[f"{name}.{key}"] for key in ("weight", "bias")})
parameters = [*featurizer.parameters(), *projector.parameters(), *model.parameters()]
optimiser = torch.optim.Adam(parameters, lr=rate)


def logits(clips):
    wavs = [torch.full((16_000,), float(clip)) for clip in clips]
    features = featurizer(wavs, upstream(wavs))
    lengths = torch.IntTensor([len(sequence) for sequence in features])
    return model(projector(nn.utils.rnn.pad_sequence(features, batch_first=True)), lengths)[0]


best = -1.0
for step, drawn in enumerate(tensors["order"], start=1):
    nn.functional.cross_entropy(logits(drawn), labels[drawn]).backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    optimiser.zero_grad()
    if step % max(1, steps // 20) == 0 or step == steps:
        with torch.no_grad():
            accuracy = (logits(tensors["validation"]).argmax(1) == labels[tensors["validation"]]).float().mean()
            if accuracy > best:
                best, predicted = accuracy, logits(tensors["test"]).argmax(1)
save_file({"predicted": predicted}, out)
