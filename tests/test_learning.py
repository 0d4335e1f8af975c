"""What training on the built-in corpus must reach in seconds, with the recipe and with the published loss."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fedhubert_lib import audio, batching, features, hubert, objectives, params, seeds, training
from fedhubert_lib.corpora import synthetic
from fedhubert_lib.evaluation import extraction, layers, probes, systems
from fedhubert_lib.kmeans import clustering

pytest.importorskip("espeakng_loader", reason="needs the extra fedhubert[synthetic]")

CLUSTERS = 50
SMALLER = hubert.preset(
    "tiny",
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=512,
    conv_dim=(64,) * 7,
    classifier_proj_size=64,
    feature_grad_mult=1.0,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, np.ndarray], Path]:
    """Half an hour of 24 voices, and k-means labels of MFCCs normalised per voice: (table, labels, folder).

    Fewer minutes are seen so often that masked frames are learned by heart, and then they are ahead.
    """
    folder = tmp_path_factory.mktemp("speech")
    synthetic.speech(folder, params.Corpus(speakers=24, minutes=30.0, test_speakers=6, test_minutes=2.0, seed=0))
    paths = sorted((folder / synthetic.TRAIN_SUBSET).rglob("*.flac"))
    waveforms = [audio.read(path) for path in paths]
    frames = [part[::2] for part in features.mfcc(waveforms)]
    speakers = np.array([path.parts[-3] for path in paths])
    for speaker in np.unique(speakers):
        utterances = np.flatnonzero(speakers == speaker)
        together = torch.cat([frames[i] for i in utterances])
        for i in utterances:
            frames[i] = (frames[i] - together.mean(0)) / together.std(0)
    centroids = clustering.fit(torch.cat(frames).double(), CLUSTERS, np.random.default_rng(0))
    labels = {path.stem: clustering.nearest(x, centroids).numpy() for path, x in zip(paths, frames, strict=True)}
    rows = [(path.stem, str(path), len(x)) for path, x in zip(paths, waveforms, strict=True)]
    return pd.DataFrame(rows, columns=["utterance", "path", "samples"]), labels, folder


def train(
    corpus,
    config: hubert.HubertConfig,
    *,
    learning_rate: float,
    steps: int,
    batch_seconds: float,
    crop_seconds: float,
    unmasked_weight: float = 0.0,
) -> tuple[list[dict], hubert.Hubert]:
    """The ledger of ``steps`` optimiser steps on all of the corpus, averages over tenths of them, and the model."""
    table, labels, _ = corpus
    module = nn.ModuleDict({"model": hubert.Hubert(config), "head": hubert.Head(config, CLUSTERS)})
    for part in module.values():
        hubert.initialise(part, seeds.torch_generator(0))
    p = params.Pretrain(
        learning_rate=learning_rate, warmup_fraction=0.06, batch_seconds=batch_seconds, crop_seconds=crop_seconds
    )
    optimiser = training.adamw(module, p)

    def objective(batch: batching.Batch, progress: float) -> objectives.Sums:
        weight = objectives.unmasked_weight(unmasked_weight, params.Pretrain().unmasked_decay, progress)
        return objectives.masked_prediction(module["model"], module["head"], batch, unmasked_weight=weight)

    rows, part = [], steps // 10
    for number in range(10):
        stream = batching.batches(table, labels, p, (0, number, "all"), part)
        schedule = {"first_step": part * number, "total_steps": steps, "seed": number}
        sums = training.local_update(module, stream, objective, p, **schedule, optimiser=optimiser)
        rows.append(objectives.averages(sums))
    return rows, module["model"].eval()


def commonest_label(corpus) -> float:
    """Fraction of all frames that have the commonest label."""
    counts = np.bincount(np.concatenate(list(corpus[1].values())), minlength=CLUSTERS)
    return counts.max() / counts.sum()


def phone_accuracy(corpus, model: hubert.Hubert) -> float:
    """Of the phone probe on the test voices, best layer."""
    folder = corpus[2]
    phones = pd.read_parquet(folder / "phones.parquet")
    paths = sorted((folder / synthetic.TEST_SUBSET).rglob("*.flac"))
    rows = [(path.stem, str(path), path.parts[-3], len(audio.read(path))) for path in paths]
    table = pd.DataFrame(rows, columns=["utterance", "path", "speaker", "samples"])
    frames = extraction.utterances(systems.of_model(model, torch.device("cpu")), table, folder / f"{id(model)}.npy")
    labels, speakers = layers.phone_labels(table, phones)
    known = labels >= 0
    return max(
        probes.leave_speakers_out(frames[known, layer], labels[known], speakers[known], seed=0, folds=3)[0]
        for layer in range(frames.shape[1])
    )


@pytest.mark.slow
@pytest.mark.parametrize("weight", [params.Pretrain().unmasked_weight, 0.0], ids=["recipe", "published loss"])
def test_the_recipe_learns_phones_in_seconds_where_the_published_loss_does_not(corpus, weight):
    """Seconds of training: with two layers and 50 clusters masked accuracy gets beyond the commonest label with either
    loss, phones get beyond those of random weights only where frames that are heard are scored, too."""
    config = hubert.replace(SMALLER, front_end="logmel")
    untrained = hubert.Hubert(config)
    hubert.initialise(untrained, seeds.torch_generator(0))
    recipe = {"learning_rate": 2e-3, "steps": 200, "batch_seconds": 16.0, "crop_seconds": 4.0}
    rows, model = train(corpus, config, **recipe, unmasked_weight=weight)
    assert rows[-1]["accuracy_masked"] > 1.5 * commonest_label(corpus) > rows[0]["accuracy_masked"], rows
    phones = phone_accuracy(corpus, model) > phone_accuracy(corpus, untrained.eval()) + 0.05
    assert phones == (weight > 0)
    assert (rows[-1]["accuracy_unmasked"] > 3 * rows[-1]["accuracy_masked"]) == (weight > 0), rows
