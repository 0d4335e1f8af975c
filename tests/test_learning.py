"""Minutes of training on the built-in corpus show the curve that a sound HuBERT shows: A13 of the recipe."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fedhubert_lib import audio, batching, features, hubert, objectives, params, seeds, training
from fedhubert_lib.corpora import synthetic
from fedhubert_lib.kmeans import clustering

pytest.importorskip("espeakng_loader", reason="needs the extra fedhubert[synthetic]")

CLUSTERS = 50
CONFIG = hubert.preset(
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
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Half an hour of 24 voices, and k-means labels of MFCCs normalised per voice: (table, labels).

    Fewer minutes are seen so often that masked frames are learned by heart, and then they are ahead.
    """
    folder = tmp_path_factory.mktemp("speech")
    synthetic.speech(folder, params.Corpus(speakers=24, minutes=30.0, test_speakers=1, test_minutes=0.1, seed=0))
    paths = sorted((folder / synthetic.TRAIN_SUBSET).rglob("*.flac"))
    waveforms = [audio.read(path) for path in paths]
    frames = [part[::2] for part in features.mfcc(waveforms)]
    speakers = np.array([path.parts[-3] for path in paths])
    for speaker in np.unique(speakers):
        own = np.flatnonzero(speakers == speaker)
        together = torch.cat([frames[i] for i in own])
        for i in own:
            frames[i] = (frames[i] - together.mean(0)) / together.std(0)
    centroids, _ = clustering.fit(torch.cat(frames).double(), CLUSTERS, np.random.default_rng(0))
    labels = {path.stem: clustering.nearest(x, centroids).numpy() for path, x in zip(paths, frames, strict=True)}
    rows = [(path.stem, str(path), len(x)) for path, x in zip(paths, waveforms, strict=True)]
    return pd.DataFrame(rows, columns=["utterance", "path", "samples"]), labels


@pytest.mark.slow
def test_unmasked_frames_are_known_better_than_masked_ones_and_both_better_than_chance(corpus):
    """1,000 steps of 8 s, about a minute: labels that lie beside their frames teach no more than the commonest label.

    Measured: the loss stands at the labels' entropy for 200 steps, then unmasked accuracy passes the masked one near
    step 600 and is .10 against .09 at the end.
    """
    table, labels = corpus
    module = nn.ModuleDict({"model": hubert.Hubert(CONFIG), "head": hubert.Head(CONFIG, CLUSTERS)})
    for part in module.values():
        hubert.initialise(part, seeds.torch_generator(0))
    settings = training.Settings(learning_rate=1e-3, warmup_steps=60, precision="auto")
    optimiser = training.adamw(module, settings)
    objective = partial(objectives.masked_prediction, module["model"], module["head"])
    rows = []
    for number in range(10):
        stream = batching.batches(
            table, labels, seed=0, round=number, client="all", steps=100, batch_seconds=8.0, crop_seconds=2.0
        )
        sums = training.local_update(
            module,
            stream,
            objective,
            settings,
            first_step=100 * number,
            total_steps=1_000,
            seed=number,
            optimiser=optimiser,
        )
        rows.append(objectives.averages(sums))
    counts = np.bincount(np.concatenate(list(labels.values())), minlength=CLUSTERS)
    commonest = counts.max() / counts.sum()
    assert rows[0]["accuracy_masked"] < commonest
    masked, unmasked = (np.mean([row[f"accuracy_{which}"] for row in rows[-3:]]) for which in ("masked", "unmasked"))
    assert unmasked > masked > 1.5 * commonest, rows
    assert masked > 3 / CLUSTERS
