"""A client's frames: the features of each utterance computed once, kept in the client's folder, read back normalised.

``config`` is that of the message, see ``client``. Features are memory-mapped: a client's speech need
not fit into memory. Hidden layers are kept as float16 (5e-4 of a value, far below the spread of a cluster), MFCCs as
float32.
"""

import collections
import hashlib
import importlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhubert_lib import audio, features, files, labels, seeds
from fedhubert_lib.federated.handlers import Answer
from fedhubert_lib.federated.protocol import ClientHome

BATCH_SAMPLES = 600 * audio.SAMPLE_RATE
"""Audio that is read and turned into features at once: several forward passes of a checkpoint (hidden.py)."""
BATCH_VALUES = 2**23
"""Numbers of kept features that are read back at once: 32 MiB as float32."""
READERS = 4
"""Threads that decode files; libsndfile works outside Python's lock."""
FIT_FRAMES = 360_000
"""Frames that a client holds at most to fit a codebook of its own: two hours. One hour is enough for MFCCs (Hsu et al.
2021, table IV); Lloyd rounds stream and see all that is sampled."""
LONG = 100 * audio.SAMPLE_RATE
"""Samples beyond which a recording may be cut to its beginning, to fit a codebook or choose a layer."""
DELTAS = 2 * audio.HOP
"""Samples beside a piece of a long recording that its MFCCs need: delta and its delta look two frames ahead each."""

Scales = Mapping[str, Sequence[Tensor]]
"""Mean and standard deviation [D] by speaker; empty: features stay as they are."""


def utterances(home: ClientHome) -> pd.DataFrame:
    """All utterances of the client, those for training first."""
    columns = ["utterance", "path", "speaker", "samples"]
    parts = [pd.read_parquet(home.data / f"{part}.parquet", columns=columns) for part in ("train", "validation")]
    return pd.concat(parts, ignore_index=True)


def rank(config: Mapping[str, Any], utterances: Iterable[str]) -> np.ndarray:
    """A draw in [0, 1) for each utterance, the same whoever owns it."""
    return np.array([seeds.derive(config["seed"], "kmeans-sample", utterance) / 2**63 for utterance in utterances])


def sampled(home: ClientHome, config: Mapping[str, Any]) -> pd.DataFrame:
    """The training utterances that codebooks are fitted on: each by its own draw, one at least."""
    table = pd.read_parquet(home.data / "train.parquet", columns=["utterance", "path", "speaker", "samples"])
    draws = rank(config, table.utterance)
    return table[draws < max(config["sample_fraction"], np.nextafter(draws.min(initial=1), 1))]


def within(table: pd.DataFrame, config: Mapping[str, Any], frames: int) -> pd.DataFrame:
    """As many utterances of ``table``, in the order of their draws, as have at most ``frames`` frames together.

    Of a recording longer than 100 s and than an equal part of ``frames`` only its beginning counts: ``samples`` is its
    length then.
    """
    order = np.argsort(rank(config, table.utterance), kind="stable")
    table = table.assign(samples=table.samples.clip(upper=max(LONG, frames // max(1, len(order)) * audio.HOP)))
    lengths = table.samples.map(audio.frame_count).to_numpy()
    return table.iloc[np.sort(order[np.cumsum(lengths[order]) <= frames])]


def in_memory(home: ClientHome, config: Mapping[str, Any], table: pd.DataFrame | None = None) -> Tensor:
    """Frames of ``table`` in memory, normalised: [N, D]; default: of the sampled utterances, ``FIT_FRAMES`` at most."""
    if table is None:
        table = within(sampled(home, config), config, FIT_FRAMES)
    frames = torch.empty(int(table.samples.map(audio.frame_count).sum()), config["width"], device=home.device)
    free = frames  # filled as it is read: lists of parts would take the memory twice
    for part in itertools.chain.from_iterable(stream(home, config, table)):
        free[: len(part)] = part
        free = free[len(part) :]
    return frames


def stream(home: ClientHome, config: Mapping[str, Any], table: pd.DataFrame) -> Iterator[list[Tensor]]:
    """Features of the utterances of ``table`` in its order, a batch at a time, [frames, D] for each: of as many of its
    samples as ``table`` says."""
    scales = _scales(home, config)
    cached = labels.Ragged(home.state / "features", "features", dtype_of(config), config["width"])
    for rows in _batches(table, BATCH_VALUES // config["width"] * audio.HOP):
        kept = (cached[row.utterance][: audio.frame_count(row.samples)] for row in rows.itertuples())
        parts = [torch.tensor(frames, device=home.device).float() for frames in kept]
        yield normalised(parts, rows.speaker, scales)


def normalised(parts: Sequence[Tensor], speakers: Iterable[str], scales: Scales) -> list[Tensor]:
    """Features of utterances, [frames, D] each, scaled by mean and standard deviation of their speakers."""
    if not scales:
        return list(parts)
    return [(part - scales[name][0]) / scales[name][1] for part, name in zip(parts, speakers, strict=True)]


def dtype_of(config: Mapping[str, Any]) -> np.dtype:
    """How features are kept."""
    return np.dtype("<f2" if config["features"] == "hidden" else "<f4")


def compute(home: ClientHome, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Answer:
    """Handler: compute the features of all utterances, or those that are missing, and keep them in the client's folder.

    Raises OSError before anything is computed when the disk does not hold them.
    """
    table, dtype = utterances(home), dtype_of(config)
    made_by = {name: config[name] for name in ("features", "layer", "checkpoint")}
    folder = folder_for(home.state / "features", {**made_by, "utterances": digest(table)})

    def frames(missing: pd.DataFrame) -> Iterator[list[np.ndarray]]:
        require_space(folder, missing.samples.map(audio.frame_count).sum() * config["width"] * dtype.itemsize)
        for rows, parts in extracted(arrays, config, missing, home.device):
            yield [_rounded(name, part[0], dtype) for name, part in zip(rows.utterance, parts, strict=True)]

    labels.write(folder, "features", table, dtype, config["width"], frames)
    return {}, {}


def _rounded(utterance: str, frames: Tensor, dtype: np.dtype) -> np.ndarray:
    values = frames.cpu().numpy()
    if dtype.itemsize == 2 and len(values) and not np.abs(values).max() < np.finfo(np.float16).max:
        raise ValueError(f"{utterance}: the layer gives values beyond float16 (65,504), or NaN; choose another layer")
    return values.astype(dtype)


def state_space(stage: Path, p: Any, log: Callable[[dict[str, Any]], None]) -> None:
    """Report what features will take of this disk, and refuse where it does not hold those of all clients.

    A client of a real federation looks at its own disk.
    """
    table = stage.parent / "01_partition" / "clients.parquet"
    if p.engine == "deployment" or not table.exists():
        return
    frames = 3600 * float(pd.read_parquet(table, columns=["hours"]).hours.sum()) * audio.SAMPLE_RATE / audio.HOP
    size = frames * (4 * features.MFCC_DIMENSION if p.features == "mfcc" else 2 * optional("hidden").width(p))
    log({"kind": "disk", "feature_bytes": int(size)})
    written = sum(path.stat().st_size for path in stage.glob("clients/*/features/features.bin"))
    require_space(stage, size - written)


def require_space(folder: Path, size: float) -> None:
    """Raise OSError when ``size`` bytes are more than what is free where ``folder`` is."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if size > free:
        raise OSError(
            f"{folder}: features take {size / 1e9:.1f} GB of disk until labels are written, and {free / 1e9:.1f} GB are"
            " free; make room, or put the run on a larger disk (FEDHUBERT_OUTPUTS)"
        )


def extracted(
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    table: pd.DataFrame,
    device: str,
    layers: Sequence[int] | None = None,
) -> Iterator[tuple[pd.DataFrame, list[Tensor]]]:
    """Features of each batch of utterances of ``table``, computed: float32 [L, frames, D] for each utterance.

    Those of the message have L = 1; ``layers`` asks for other layers of its checkpoint. Recordings longer than a batch
    are read in equal pieces; a model that normalises its input does so piece by piece. MFCCs are those of the whole, to
    the bit.
    """
    hidden = optional("hidden") if config["features"] == "hidden" else None
    model = hidden and hidden.model_of(arrays, config, device)
    beside = 0 if hidden else DELTAS  # a model sees no piece but its own

    def computed(waveforms: Sequence[Tensor]) -> list[Tensor]:
        if hidden:
            return list(hidden.states(model, waveforms, layers or [config["layer"]], device))
        return [frames[None, ::2] for frames in features.mfcc([waveform.to(device) for waveform in waveforms])]

    def in_pieces(path: str, samples: int) -> Tensor:
        count, parts = audio.frame_count(samples), []
        size = -(-count // -(-count * audio.HOP // BATCH_SAMPLES))  # equal ones, as in hidden.states
        for first in range(0, count, size):
            last, start = min(count, first + size), max(0, first * audio.HOP - beside)
            stop = min(samples, (last - 1) * audio.HOP + audio.RECEPTIVE_FIELD + beside)
            (states,) = computed([audio.read(path, start, stop)])
            parts.append(states[:, first - start // audio.HOP :][:, : last - first])
        return torch.cat(parts, dim=1)

    with ThreadPoolExecutor(READERS) as readers:
        for rows in _batches(table, BATCH_SAMPLES):
            short = rows[rows.samples <= BATCH_SAMPLES]
            parts = iter(computed(list(readers.map(_read, short.path, short.samples))))
            lengths = zip(rows.path, rows.samples, strict=True)
            yield rows, [next(parts) if n <= BATCH_SAMPLES else in_pieces(path, n) for path, n in lengths]


def optional(name: str) -> Any:
    """The module ``hidden`` or ``private`` of this package, which studies of MFCCs, or without noise, do not import."""
    return importlib.import_module(f"fedhubert_lib.kmeans.{name}")


def _batches(table: pd.DataFrame, samples: int) -> Iterator[pd.DataFrame]:
    """``table`` in stretches of about this many ``samples``."""
    batch = (table.samples.cumsum() - table.samples) // samples
    for _, rows in table.groupby(batch.to_numpy(), sort=True):
        yield rows


def _read(path: str, samples: int) -> Tensor:
    """All of an utterance; of one of ``LONG`` or more, which ``within`` may have cut, so many samples."""
    return audio.read(path, samples=samples) if samples < LONG else audio.read(path, 0, samples)


def speaker_statistics(parts: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation [D] of each speaker's frames, from pairs of speaker and frames [N, D]; a standard
    deviation is 1 where nothing varies."""
    sums: dict[str, list[Any]] = collections.defaultdict(lambda: [0.0, 0.0, 0])
    for speaker, part in parts:
        frames = part.double()
        added = frames.sum(0), frames.square().sum(0), len(frames)
        sums[speaker] = [a + b for a, b in zip(sums[speaker], added, strict=True)]
    statistics = {}
    for speaker, (total, squares, count) in sums.items():
        mean = total / max(count, 1)
        variance = (squares / max(count, 1) - mean.square()).clamp(min=0)
        varies = variance > 1e-10 * (1 + mean.square())  # above the rounding of float32 features
        statistics[speaker] = mean.float(), torch.where(varies, variance.sqrt(), 1.0).float()
    return statistics


def _scales(home: ClientHome, config: Mapping[str, Any]) -> Scales:
    """What features are normalised by: statistics of speakers, computed once, of all that the client has."""
    if config["normalisation"] == "none":
        return {}
    if config["normalisation"] != "speaker":  # an earlier version of the server knew one scale for everybody, too
        raise ValueError(f"normalisation {config['normalisation']!r}: server and clients need one version of fedhubert")
    path = home.state / "features" / "speakers.safetensors"
    if not path.exists():
        everything = utterances(home)
        parts = itertools.chain.from_iterable(stream(home, {**config, "normalisation": "none"}, everything))
        pairs = zip(everything.speaker, parts, strict=True)
        with files.atomic(path) as temporary:
            save_file({s: torch.stack(both).cpu() for s, both in speaker_statistics(pairs).items()}, temporary)
    return {speaker: both.to(home.device).unbind() for speaker, both in load_file(path).items()}


def folder_for(folder: Path, settings: Mapping[str, Any]) -> Path:
    """``folder``, holding nothing but work of ``settings``.

    Work of other settings moves to ``.previous`` beside it, and comes back from there when its settings do.
    """

    def aside(settings: str) -> Path:
        number = hashlib.sha256(settings.encode()).hexdigest()[:12]
        return folder.parent / ".previous" / f"{folder.name}-{number}"

    path, text = folder / "settings.json", json.dumps(dict(settings), sort_keys=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before != text:
        if folder.exists():
            aside(before).parent.mkdir(exist_ok=True)  # work without settings may be there already
            folder.rename(aside(before + str(time.time_ns()) if aside(before).exists() else before))
        if aside(text).exists():
            aside(text).rename(folder)
        else:
            files.write_text(path, text)
    return folder


def digest(table: pd.DataFrame) -> str:
    """One name for the utterances of ``table``, their speakers and lengths, wherever their files are."""
    return hashlib.sha256(table[["utterance", "speaker", "samples"]].to_csv(index=False).encode()).hexdigest()[:16]
