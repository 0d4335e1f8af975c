"""Speech as text: the cluster of every frame of a hidden layer, as spoken-language models take it (GSLM, textless).

A line for each recording, ``name|12 12 7 ...``: its path below the folder without the suffix, then 50 units a second,
or one for each run of the same unit. Clusters are k-means of the layer as it is, fitted on these recordings or on
earlier ones. Recordings pass through the model one by one: their units depend on nothing else in the folder.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fedhubert_lib import audio, files, pretrained, resources, seeds, threads, units
from fedhubert_lib.corpora import scan
from fedhubert_lib.export.formats import ExportError
from fedhubert_lib.federated.protocol import digest
from fedhubert_lib.hubert import Hubert, HubertConfig
from fedhubert_lib.kmeans import clustering, hidden, reading

NAMED = 5
"""Recordings that an error names, of all that it is about."""


def write(
    checkpoint: Path,
    folder: Path,
    out: Path,
    *,
    codebook: Path | None = None,
    layer: int | None = None,
    clusters: int | None = None,
    seed: int | None = None,
    deduplicate: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """Write the units of all recordings in ``folder`` to the text file ``out``; returns what it holds.

    ``codebook`` is the file of an earlier call. Without it, ``clusters`` (100) are fitted on ``layer`` (1 is the first;
    the default is the middle one) from ``seed`` (0) and kept beside ``out``, named OUT.codebook.safetensors. The same
    call after one that was killed takes them from there, and resumes OUT.ID.part, which becomes ``out`` when whole.

    Raises ExportError where ``out`` exists or is being written, a recording cannot be used, or the codebook is of
    another model or of other settings than are given.
    """
    if out.exists():
        raise ExportError(f"{out} is there already; name another, or remove it")
    device = resources.resolve(device)
    model = pretrained.load(checkpoint)[0].to(device)
    table = recordings(folder)
    place = codebook or out.with_name(f"{out.name}.codebook.safetensors")
    asked = {"layer": layer, "clusters": clusters, "seed": seed}
    made: dict[str, Any] = {"model": digest(model.state_dict())}
    made |= {name: value for name, value in asked.items() if value is not None}
    speech = _hash(table[["name", "samples", "fingerprint"]].to_csv())
    depth = model.config.num_hidden_layers
    if layer is not None and not 1 <= layer <= depth:
        raise ExportError(f"layer {layer} asked for; the layers of {checkpoint} are 1 to {depth}")
    if codebook is None:
        made = {"layer": max(1, depth // 2), "clusters": 100, "seed": 0} | made | {"speech": speech}
    out.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is told before k-means
    with files.locked(out.with_name(f".{out.name}.lock")) as free, files.naming(out):
        if not free or out.exists():
            raise ExportError(f"{out}: another process writes it or has done so; name another file")
        if codebook is None and not place.exists():
            _fit(model, table, made, place, device)
        centroids, layer = _read(place, made, model.config)
        same = json.dumps([made, speech, layer, deduplicate, digest({"centroids": centroids})])
        part = out.with_name(f"{out.name}.{_hash(same)}.part")
        written = part.read_bytes() if part.exists() else b""
        with part.open("ab") as text:
            text.truncate(written.rfind(b"\n") + 1)  # without a line that a kill has cut off
            for name, states in _states(model, table[written.count(b"\n") :], layer, device, "units"):
                labels = clustering.nearest(states, centroids).numpy()
                line = f"{name}|{' '.join(map(str, units.runs(labels) if deduplicate else labels))}\n"
                text.write(line.encode())
            text.flush()
            os.fsync(text.fileno())
        used, runs = _count(part, len(centroids))
        part.replace(out)
    frames, hours = table.samples.map(audio.frame_count).sum(), table.samples.sum() / audio.SAMPLE_RATE / 3600
    counted = {"recordings": len(table), "hours": float(hours), "units used": used, "mean run": float(frames / runs)}
    return {"layer": layer, **counted}


def _count(path: Path, clusters: int) -> tuple[int, int]:
    """How many units the text ``path`` uses, and how many runs of one unit it has."""
    used, runs = np.zeros(clusters, bool), 0
    with path.open(encoding="utf-8", newline="\n") as text:
        for line in text:
            labels = np.array(line.rpartition("|")[2].split(), int)
            used[labels], runs = True, runs + len(units.runs(labels))
    return int(used.sum()), runs


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recordings(folder: Path) -> pd.DataFrame:
    """Name, path, samples and fingerprint of all .wav and .flac files below ``folder``, in order of path.

    Raises ExportError, before anything is computed, where there is none, or where one is not 16 kHz mono speech.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder}: no such folder; give one of .wav or .flac files")
    table = scan.scan([folder])
    table = table[table.path.str.lower().str.endswith((".wav", ".flac"))].reset_index(drop=True)
    if table.empty:
        raise ExportError(f"{folder}: holds no .wav or .flac file; other formats have to be converted first")
    table["name"] = [str(Path(path).relative_to(folder.absolute()).with_suffix("")) for path in table.path]
    refused = table.reason != ""
    named = table.path.mask(refused, table.path + ": " + table.reason)
    for wrong, remedy in (
        (refused, ". Convert with: sox IN.wav -r 16000 -c 1 OUT.wav, or move what is no speech away"),
        (table.name.str.contains(r"[|\n\r]"), ": no line can hold a name with | or a line break; rename it"),
        (table.name.duplicated(keep=False), ": differ in their suffix alone; move one away"),
    ):
        if wrong.any():
            more = f" and {wrong.sum() - NAMED} more" if wrong.sum() > NAMED else ""
            raise ExportError("; ".join(named[wrong][:NAMED]) + more + remedy)
    return table


def _fit(model: Hubert, table: pd.DataFrame, made: dict[str, Any], place: Path, device: str) -> None:
    """K-means of a layer on recordings that the seed draws, ``FIT_FRAMES`` frames at most; kept in ``place``."""
    counts = table.samples.map(audio.frame_count).to_numpy()
    if not 1 <= made["clusters"] <= counts.sum():
        possible = f"--clusters has to be from 1 to the {counts.sum()} frames that there are"
        raise ExportError(f"{made['clusters']} clusters asked for; {possible}")
    order = seeds.numpy_generator(made["seed"], "units-sample").permutation(len(table))
    before = np.cumsum(counts[order]) - counts[order]
    chosen = table.iloc[order[before < reading.FIT_FRAMES]]
    parts = [states for _, states in _states(model, chosen, made["layer"], device, "k-means")]
    frames = torch.cat(parts)[: reading.FIT_FRAMES]
    centroids = clustering.fit(frames, made["clusters"], seeds.numpy_generator(made["seed"], "units"))
    with files.atomic(place) as temporary:
        save_file({"centroids": centroids.float()}, temporary, {"units": json.dumps(made)})


def _read(place: Path, expected: dict[str, Any], config: HubertConfig) -> tuple[Tensor, int]:
    """Centroids [K, D] and layer of the codebook ``place``. Raises ExportError unless it was made as ``expected``, and
    fits the model."""
    try:
        with safe_open(place, "pt") as stored:
            made, centroids = json.loads(stored.metadata()["units"]), stored.get_tensor("centroids")
            layer = int(made["layer"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ExportError(f"{place}: no codebook of fedhubert units ({error})") from error
    if differing := [name for name, value in expected.items() if made.get(name) != value]:
        raise ExportError(
            f"{place}: made with another {' and another '.join(differing)}; name another output, or give what it is of"
        )
    fits = centroids.ndim == 2 and len(centroids) > 0 and centroids.shape[1] == config.hidden_size
    if not (fits and centroids.isfinite().all() and 1 <= layer <= config.num_hidden_layers):
        raise ExportError(f"{place}: its centroids, or its layer {layer}, do not fit the model; fit it anew")
    return centroids.float(), layer


def _states(model: Hubert, table: pd.DataFrame, layer: int, device: str, title: str) -> Iterator[tuple[str, Tensor]]:
    """Name and frames [T, D] of ``layer`` of each recording of ``table``, in its order, with a bar of progress."""
    with tqdm(total=len(table), desc=title, unit="file") as bar:
        for start in range(0, len(table), threads.count()):
            rows = table.iloc[start : start + threads.count()]
            waveforms = [audio.read(path, samples=count) for path, count in zip(rows.path, rows.samples, strict=True)]
            for name, states in zip(rows.name, hidden.states(model, waveforms, [layer], device), strict=True):
                yield name, states[0]
                bar.update()
