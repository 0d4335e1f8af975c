"""A client's frames: its utterances, read and turned into features a batch at a time, normalised.

Nothing here holds all features. ``config`` and ``arrays`` are those of the message, see ``client``.
"""

import collections
import concurrent.futures
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhubert_lib import audio, features, files, labels, seeds
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.hubert import Hubert, HubertConfig

BATCH_SAMPLES = 60 * audio.SAMPLE_RATE
"""Audio that is read and turned into features at once."""
READERS = 4
"""Threads that decode files; libsndfile works outside Python's lock."""
FIT_FRAMES = 360_000
"""Frames that a client holds at most to fit a codebook of its own: two hours. One hour is enough for MFCCs (Hsu et al.
2021, table IV); Lloyd rounds stream and see all that is sampled."""
SPEAKER_SECONDS = 300
"""Audio of a speaker at most that the ``speaker`` normalisation takes its mean and deviation from."""

FEATURES = np.dtype("<f4")
_MODELS: dict[str, Hubert] = {}


def utterances(home: ClientHome) -> pandas.DataFrame:
    """All utterances of the client, those for training first."""
    columns = ["utterance", "path", "speaker", "samples"]
    parts = [pandas.read_parquet(home.data / f"{part}.parquet", columns=columns) for part in ("train", "validation")]
    return pandas.concat(parts, ignore_index=True)


def _rank(config: Mapping[str, Any], utterances: list[str]) -> np.ndarray:
    """A draw in [0, 1) for each utterance, the same whoever owns it."""
    return np.array([seeds.derive(config["seed"], "kmeans-sample", utterance) / 2**63 for utterance in utterances])


def sampled(home: ClientHome, config: Mapping[str, Any]) -> pandas.DataFrame:
    """The training utterances that codebooks are fitted on: each by its own draw, one at least."""
    table = pandas.read_parquet(home.data / "train.parquet", columns=["utterance", "path", "speaker", "samples"])
    if config["sample_share"] == 1 or table.empty:
        return table
    rank = _rank(config, table.utterance.tolist())
    return table[rank < max(config["sample_share"], np.nextafter(rank.min(), 1))]


def within(home: ClientHome, config: Mapping[str, Any], frames: int) -> pandas.DataFrame:
    """As many of the sampled utterances, in the order of their draws, as have at most ``frames`` frames together."""
    table = sampled(home, config)
    order = np.argsort(_rank(config, table.utterance.tolist()), kind="stable")
    lengths = table.samples.map(audio.frame_count).to_numpy()
    return table.iloc[np.sort(order[np.cumsum(lengths[order]) <= frames])]


def in_memory(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """The sampled frames in memory, normalised: [N, D], N <= FIT_FRAMES, whole utterances."""
    parts = [part for _, part in stream(home, arrays, config, within(home, config, FIT_FRAMES))]
    return torch.cat(parts) if parts else torch.zeros(0, 1)


def stream(
    home: ClientHome,
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    table: pandas.DataFrame,
    normalisation: str | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Features of the utterances of ``table`` in its order, a batch at a time, end to end: frames of each, [N, D]."""
    normalisation = normalisation or config["normalisation"]
    speakers = _speaker_statistics(home, arrays, config) if normalisation == "speaker" else {}
    for rows, parts in _features(home, arrays, config, table):
        if normalisation == "speaker":
            parts = [(part - speakers[s][0]) / speakers[s][1] for s, part in zip(rows.speaker, parts, strict=True)]
        frames = torch.cat(parts)
        if normalisation == "global":
            frames = (frames - arrays["mean"].to(frames)) / arrays["deviation"].to(frames)
        yield [len(part) for part in parts], frames


def _features(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any], table: pandas.DataFrame
) -> Iterator[tuple[pandas.DataFrame, list[Tensor]]]:
    """Features at 50 Hz, not normalised, of each batch of utterances; out of the cache where there is to be one."""
    if config["cache_features"]:
        cached = cache(home, arrays, config)
        for rows in _batches(table):
            yield rows, [torch.tensor(cached[utterance], device=home.device) for utterance in rows.utterance]
        return
    yield from _extracted(home, arrays, config, table)


def cache(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> labels.Ragged:
    """Features of all utterances of the client, kept in its folder: computed once, or what is missing of them."""
    folder = home.state / "features"
    start_over_unless(folder, _features_settings(config))
    if not (folder / "index.parquet").exists():
        table, width = utterances(home), config["width"]
        with labels.writing(folder, "features", FEATURES, width) as writer:
            missing = table[~table.utterance.isin(list(writer.done))]
            for rows, parts in _extracted(home, arrays, config, missing):
                writer.append({u: part.cpu().numpy() for u, part in zip(rows.utterance, parts, strict=True)})
    return labels.Ragged(folder, "features", FEATURES, config["width"])


def _features_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("features", "layer", "checkpoint")}


def _extracted(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any], table: pandas.DataFrame
) -> Iterator[tuple[pandas.DataFrame, list[Tensor]]]:
    model = _model(arrays, config, home.device) if config["features"] == "hidden" else None
    for rows, waveforms in _read(table):
        waveforms = [waveform.to(home.device) for waveform in waveforms]
        if model is None:
            yield rows, [frames[::2] for frames in features.mfcc(waveforms)]
        else:
            yield rows, features.hidden(model, waveforms, config["layer"])


def _batches(table: pandas.DataFrame) -> Iterator[pandas.DataFrame]:
    """``table`` in stretches of about ``BATCH_SAMPLES`` samples."""
    batch = (table.samples.cumsum() - table.samples) // BATCH_SAMPLES
    for _, rows in table.groupby(batch.to_numpy(), sort=True):
        yield rows


def _read(table: pandas.DataFrame) -> Iterator[tuple[pandas.DataFrame, list[Tensor]]]:
    """The audio of ``table`` in batches, each decoded by several threads while the one before is worked on."""
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
        for rows in _batches(table):
            files_and_lengths = zip(rows.path, rows.samples, strict=True)
            waiting.append((rows, [readers.submit(_read_one, *one) for one in files_and_lengths]))
            if len(waiting) > 1:
                rows, futures = waiting.popleft()
                yield rows, [future.result() for future in futures]
        for rows, futures in waiting:
            yield rows, [future.result() for future in futures]


def _read_one(path: str, samples: int) -> Tensor:
    waveform = audio.read(path)
    if len(waveform) != samples:
        raise audio.AudioError(f"{path}: {len(waveform)} samples, {samples} when scanned; run 00_corpus again")
    return waveform


def _model(arrays: Mapping[str, Tensor], config: Mapping[str, Any], device: str) -> Hubert:
    """The checkpoint whose hidden layer is clustered, out of the message; the last one stays loaded in this process."""
    key = f"{config['checkpoint']} {device}"
    if key in _MODELS:
        return _MODELS[key]
    _MODELS.clear()
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in config["model"].items()}
    model = Hubert(HubertConfig(**values))
    prefix = "model/"
    weights = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    model.load_state_dict(weights)
    _MODELS[key] = model.to(device).eval()
    return _MODELS[key]


def _speaker_statistics(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of each speaker's features [D], from up to five minutes of what this client has of a speaker.

    Computed once and kept in the client's folder. A dimension that does not vary (digital silence) has deviation 1.
    """
    folder = home.state / "speakers"
    start_over_unless(folder, {**_features_settings(config), "seed": config["seed"]})
    path = folder / "statistics.safetensors"
    if not path.exists():
        table = utterances(home)
        rank = pandas.Series(_rank(config, table.utterance.tolist()), index=table.index)
        table = table.loc[rank.sort_values(kind="stable").index]
        before = table.groupby("speaker").samples.cumsum() - table.samples
        table = table[before < SPEAKER_SECONDS * audio.SAMPLE_RATE].sort_index()
        sums: dict[str, list] = {}
        for rows, parts in _features(home, arrays, config, table):
            for speaker, part in zip(rows.speaker, parts, strict=True):
                part = part.double()
                added = [part.sum(0), part.square().sum(0), len(part)]
                sums[speaker] = [a + b for a, b in zip(sums[speaker], added, strict=True)] if speaker in sums else added
        with files.atomic(path) as temporary:
            save_file({s: torch.stack(standardiser(*values)).cpu() for s, values in sums.items()}, temporary)
    return {speaker: tuple(both.to(home.device)) for speaker, both in load_file(path).items()}


def standardiser(total: Tensor, squares: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation, from sums over ``count`` frames; a dimension that does not vary gets deviation 1."""
    mean = total / max(count, 1)
    variance = (squares / max(count, 1) - mean.square()).clamp(min=0)
    varies = variance > 1e-10 * (1 + mean.square())  # above the rounding of float32 features
    return mean.float(), torch.where(varies, variance.sqrt(), 1.0).float()


def start_over_unless(folder: Path, settings: Mapping[str, Any], keep: str = "") -> None:
    """Empty ``folder``, but for the file ``keep``, unless it was made with the same ``settings``; note these in it."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(dict(settings)))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == settings:
        return
    for old in folder.glob("*"):
        if old.name != keep:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    files.write_json(path, settings)
