"""Masks, batches, the objective and the local update."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch import nn

from fedhubert_lib import audio, batching, hubert, masking, objectives, seeds, training

CONFIG = hubert.preset(
    "tiny",
    "logmel",
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    num_conv_pos_embedding_groups=4,
    classifier_proj_size=24,
)
DRAWS = {"seed": 0, "round": 1, "client": "client-000"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve clips of 1.2 to 4 s whose samples and labels are their own positions: (table, labels)."""
    folder = tmp_path_factory.mktemp("audio")
    rows, labels = [], {}
    for i, samples in enumerate(np.linspace(19_300, 64_000, 12).astype(int)):
        ramp = (np.arange(samples) % 30_000).astype(np.int16)
        soundfile.write(folder / f"{i}.flac", ramp, 16_000)
        rows.append({"utterance": f"u{i}", "path": str(folder / f"{i}.flac"), "samples": samples})
        labels[f"u{i}"] = np.arange(audio.frame_count(int(samples)), dtype=np.uint16)
    return pd.DataFrame(rows), labels


def make(clusters: int = 250) -> nn.ModuleDict:
    module = nn.ModuleDict({"model": hubert.Hubert(CONFIG), "head": hubert.Head(CONFIG, clusters)})
    for part in module.values():
        hubert.initialise(part, seeds.torch_generator(0))
    return module


def objective(module: nn.ModuleDict):
    return partial(objectives.masked_prediction, module["model"], module["head"])


def test_masks_are_whole_spans_with_the_published_share():
    masks = [masking.spans(781, seeds.numpy_generator(0, i)) for i in range(400)]
    assert np.mean(masks) == pytest.approx(0.567, abs=0.015)
    for mask in masks:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        assert (edges[1::2] - edges[::2]).min() >= 10
    with pytest.raises(ValueError, match="9 frames"):
        masking.spans(9, seeds.numpy_generator(0))


def test_crops_carry_their_own_labels(corpus):
    table, labels = corpus
    seen = 0
    for batch in batching.batches(table, labels, **DRAWS, steps=8, batch_seconds=8.0, crop_seconds=2.5):
        frames = audio.frame_count(batch.waveforms.shape[1])
        assert batch.labels.shape == batch.mask.shape == (len(batch.utterances), frames)
        assert batch.seconds <= 8.0
        starts = (batch.waveforms[:, 0] * 32_768).long()
        # The waveform is its own clock and so are the labels: label i belongs to sample 320 i exactly.
        assert torch.equal(starts % 30_000, batch.labels[:, 0] * 320 % 30_000)
        assert torch.equal(batch.labels, batch.labels[:, :1] + torch.arange(frames))
        seen += len(batch.utterances)
    assert seen > 12


def test_batches_depend_on_their_keys_alone(corpus):
    table, labels = corpus
    draw = partial(batching.batches, table, labels, steps=5, batch_seconds=8.0, crop_seconds=4.0)
    for a, b in zip(draw(**DRAWS), draw(**DRAWS, workers=3), strict=True):
        assert torch.equal(a.waveforms, b.waveforms)
        assert torch.equal(a.mask, b.mask)
    other = next(draw(**(DRAWS | {"round": 2})))
    assert other.utterances != next(draw(**DRAWS)).utterances


def test_wrong_number_of_labels_is_an_error(corpus):
    table, labels = corpus
    short = {name: values[:-1] for name, values in labels.items()}
    with pytest.raises(ValueError, match="run 02_kmeans again"):
        next(batching.batches(table, short, **DRAWS, steps=1, batch_seconds=8.0, crop_seconds=4.0))


def train(corpus, steps: int = 3, **settings) -> tuple[nn.ModuleDict, dict[str, float]]:
    table, labels = corpus
    module = make()
    stream = batching.batches(
        table, labels, **DRAWS, steps=steps * settings.get("accumulate", 1), batch_seconds=8.0, crop_seconds=4.0
    )
    metrics = training.local_update(
        module,
        stream,
        objective(module),
        training.Settings(learning_rate=1e-3, warmup_steps=2, **settings),
        first_step=0,
        total_steps=10,
        seed=0,
    )
    return module, metrics


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_seed_same_weights(corpus, precision):
    first, metrics = train(corpus, precision=precision)
    second, _ = train(corpus, precision=precision)
    initial = make()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first["head"].label_embeddings, initial["head"].label_embeddings)
    averages = objectives.averages(metrics)
    assert averages["loss"] == pytest.approx(np.log(250), abs=0.5)
    assert metrics["masked_frames"] > 100


def test_diverging_batch_is_named(corpus):
    table, labels = corpus
    module = make()
    with torch.no_grad():
        module["head"].final_proj.weight.fill_(float("nan"))
    stream = batching.batches(table, labels, **DRAWS, steps=2, batch_seconds=8.0, crop_seconds=4.0)
    settings = training.Settings(learning_rate=1e-3, warmup_steps=2)
    with pytest.raises(training.DivergedError, match="batch u"):
        training.local_update(module, stream, objective(module), settings, first_step=0, total_steps=9, seed=0)
