"""A client's frames: the features of each utterance computed once, kept in the client's folder, read back normalised.

``config`` and ``arrays`` are those of the message, see ``client``. Features are memory-mapped: a client's speech need
not fit into memory. Hidden layers are kept as float16 (5e-4 of a value, far below the spread of a cluster), MFCCs as
float32.
"""

import collections
import concurrent.futures
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhubert_lib import audio, features, files, labels, resources, seeds, threads
from fedhubert_lib.federated.protocol import ClientHome
from fedhubert_lib.hubert import Hubert, HubertConfig

BATCH_SAMPLES = 600 * audio.SAMPLE_RATE
"""Audio that is read and turned into features at once."""
BATCH_VALUES = 2**23
"""Numbers of kept features that are read back at once: 32 MiB as float32."""
READERS = 4
"""Threads that decode files; libsndfile works outside Python's lock."""
FIT_FRAMES = 360_000
"""Frames that a client holds at most to fit a codebook of its own: two hours. One hour is enough for MFCCs (Hsu et al.
2021, table IV); Lloyd rounds stream and see all that is sampled."""
FORWARD_SAMPLES = 5000 * audio.HOP
"""Longest stretch that one forward pass of a checkpoint sees: 100 s, as in fairseq's feature dump."""

_MODELS: dict[str, Hubert] = {}


def utterances(home: ClientHome) -> pandas.DataFrame:
    """All utterances of the client, those for training first."""
    columns = ["utterance", "path", "speaker", "samples"]
    parts = [pandas.read_parquet(home.data / f"{part}.parquet", columns=columns) for part in ("train", "validation")]
    return pandas.concat(parts, ignore_index=True)


def rank(config: Mapping[str, Any], utterances: Sequence[str]) -> np.ndarray:
    """A draw in [0, 1) for each utterance, the same whoever owns it."""
    return np.array([seeds.derive(config["seed"], "kmeans-sample", utterance) / 2**63 for utterance in utterances])


def sampled(home: ClientHome, config: Mapping[str, Any]) -> pandas.DataFrame:
    """The training utterances that codebooks are fitted on: each by its own draw, one at least."""
    table = pandas.read_parquet(home.data / "train.parquet", columns=["utterance", "path", "speaker", "samples"])
    if config["sample_share"] == 1 or table.empty:
        return table
    draws = rank(config, table.utterance.tolist())
    return table[draws < max(config["sample_share"], np.nextafter(draws.min(), 1))]


def within(table: pandas.DataFrame, config: Mapping[str, Any], frames: int) -> pandas.DataFrame:
    """As many utterances of ``table``, in the order of their draws, as have at most ``frames`` frames together."""
    order = np.argsort(rank(config, table.utterance.tolist()), kind="stable")
    lengths = table.samples.map(audio.frame_count).to_numpy()
    return table.iloc[np.sort(order[np.cumsum(lengths[order]) <= frames])]


def in_memory(
    home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any], most: int = FIT_FRAMES
) -> Tensor:
    """The sampled frames in memory, normalised: [N, D], N <= ``most``, whole utterances."""
    parts = [part for _, part in stream(home, arrays, config, within(sampled(home, config), config, most))]
    return torch.cat(parts) if parts else torch.zeros(0, config["width"])


def stream(
    home: ClientHome,
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    table: pandas.DataFrame,
    normalisation: str | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Features of the utterances of ``table`` in its order, a batch at a time, end to end: frames of each, [N, D]."""
    normalisation = normalisation or config["normalisation"]
    speakers = _speaker_statistics(home, config) if normalisation == "speaker" else {}
    for rows, parts in _kept(home, config, table):
        if normalisation == "speaker":
            parts = [(part - speakers[s][0]) / speakers[s][1] for s, part in zip(rows.speaker, parts, strict=True)]
        frames = torch.cat(parts)
        if normalisation == "global":
            frames = (frames - arrays["mean"].to(frames)) / arrays["deviation"].to(frames)
        yield [len(part) for part in parts], frames


def _kept(
    home: ClientHome, config: Mapping[str, Any], table: pandas.DataFrame
) -> Iterator[tuple[pandas.DataFrame, list[Tensor]]]:
    """Features at 50 Hz, not normalised, of each batch of utterances of ``table``."""
    cached = labels.Ragged(home.state / "features", "features", dtype_of(config), config["width"])
    for rows in _batches(table, BATCH_VALUES // config["width"] * audio.HOP):
        yield rows, [torch.tensor(cached[name], device=home.device).float() for name in rows.utterance]


def dtype_of(config: Mapping[str, Any]) -> np.dtype:
    """How features are kept."""
    return np.dtype("<f2" if config["features"] == "hidden" else "<f4")


def compute(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Compute the features of all utterances of the client, or what is missing of them, and keep them in its folder.

    Raises OSError before anything is computed when the disk does not hold them.
    """
    folder = home.state / "features"
    start_over_unless(folder, {key: config[key] for key in ("features", "layer", "checkpoint")})
    if (folder / "index.parquet").exists():
        return
    table, dtype, data = utterances(home), dtype_of(config), folder / "features.bin"
    size = table.samples.map(audio.frame_count).sum() * config["width"] * dtype.itemsize
    require_space(folder, size - (data.stat().st_size if data.exists() else 0))
    with labels.writing(folder, "features", dtype, config["width"]) as writer:
        # Batches are those of all utterances, so that one that was cut short by a kill is computed as it was.
        batches = [rows for rows in _batches(table, BATCH_SAMPLES) if not writer.done.keys() >= set(rows.utterance)]
        for rows, parts in extracted(arrays, config, batches, home.device):
            by_name = dict(zip(rows.utterance, parts, strict=True))
            writer.append({u: _rounded(u, part, dtype) for u, part in by_name.items() if u not in writer.done})


def _rounded(utterance: str, frames: Tensor, dtype: np.dtype) -> np.ndarray:
    values = frames.cpu().numpy()
    if dtype.itemsize == 2 and len(values) and not np.abs(values).max() < np.finfo(np.float16).max:
        raise ValueError(f"{utterance}: the layer gives values beyond float16 (65,504), or NaN; choose another layer")
    return values.astype(dtype)


def require_space(folder: Path, size: float) -> None:
    """Raise OSError when ``size`` bytes are more than what is free where ``folder`` is."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if size > free:
        raise OSError(
            f"{folder}: features take {size / 1e9:.1f} GB of disk until labels are written, and {free / 1e9:.1f} GB are"
            " free; make room, or put the run on a larger disk (FEDHUBERT_OUTPUTS)"
        )


def extracted(
    arrays: Mapping[str, Tensor], config: Mapping[str, Any], batches: Sequence[pandas.DataFrame], device: str
) -> Iterator[tuple[pandas.DataFrame, list[Tensor]]]:
    """Features of each batch of utterances, computed: float32 [frames, D] for each."""
    model = model_of(arrays, config, device) if config["features"] == "hidden" else None
    for rows, waveforms in _read(batches):
        if model is None:
            yield rows, [frames[::2] for frames in features.mfcc([waveform.to(device) for waveform in waveforms])]
        else:
            yield rows, [layers[0] for layers in hidden(model, waveforms, [config["layer"]], device)]


def hidden(model: Hubert, waveforms: Sequence[Tensor], layers: Sequence[int], device: str = "cpu") -> Iterator[Tensor]:
    """Outputs of transformer ``layers`` (1 is the first; 0 is its input) for each waveform: float32 [L, frames, D].

    In bfloat16 where the device is faster with it. Utterances pass one by one, without padding, which a group-norm
    front end would take for speech; on a CPU one on each core, so that neither company nor cores change a bit. One
    longer than 100 s passes in pieces of 5,000 frames; its frames are as many as in one pass.
    """

    def one(waveform: Tensor) -> Tensor:
        pieces = [torch.zeros(len(layers), 0, model.config.hidden_size)]
        with torch.inference_mode(), resources.autocast(device, "auto"):
            for start in range(0, audio.frame_count(len(waveform)) * audio.HOP, FORWARD_SAMPLES):
                piece = waveform[start : start + FORWARD_SAMPLES + audio.RECEPTIVE_FIELD - audio.HOP].to(device)
                states = model(piece[None], hidden_states=True).hidden
                pieces.append(torch.stack([states[layer][0].float() for layer in layers]).cpu())
        return torch.cat(pieces, dim=1)

    return threads.each(one, waveforms) if torch.device(device).type == "cpu" else map(one, waveforms)


def _batches(table: pandas.DataFrame, samples: int) -> Iterator[pandas.DataFrame]:
    """``table`` in stretches of about so many ``samples``."""
    batch = (table.samples.cumsum() - table.samples) // samples
    for _, rows in table.groupby(batch.to_numpy(), sort=True):
        yield rows


def _read(batches: Sequence[pandas.DataFrame]) -> Iterator[tuple[pandas.DataFrame, list[Tensor]]]:
    """The audio of each batch, decoded by several threads while the one before is worked on."""
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
        for rows in batches:
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


def model_of(arrays: Mapping[str, Tensor], config: Mapping[str, Any], device: str) -> Hubert:
    """The checkpoint whose hidden layer is clustered, out of the message; the last one stays loaded in this process."""
    key = json.dumps([config["checkpoint"], config["model"], device])
    if key in _MODELS:
        return _MODELS[key]
    _MODELS.clear()
    model = Hubert(HubertConfig(**config["model"]))
    prefix = "model/"
    weights = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    model.load_state_dict(weights)
    _MODELS[key] = model.to(device).eval()
    return _MODELS[key]


def _speaker_statistics(home: ClientHome, config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each speaker's features [D], from all that this client has of a speaker.

    Computed once and kept with the features. A dimension that does not vary (digital silence) has deviation 1.
    """
    path = home.state / "features" / "speakers.safetensors"
    if not path.exists():
        sums: dict[str, list] = {}
        for rows, parts in _kept(home, config, utterances(home)):
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
