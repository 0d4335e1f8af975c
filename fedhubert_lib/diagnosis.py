"""The usual causes of a curve that is not normal, as far as the records of a run show them. docs/curves.md shows each.

Every cause rests on figures of 02_kmeans and 03_pretrain, which its words name; nothing is guessed without one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import entropy

from fedhubert_lib import files, records
from fedhubert_lib.federated import handlers
from fedhubert_lib.kmeans import client, public, reading
from fedhubert_lib.labels import Labels

LAGS = range(-25, 26)
"""Frames by which labels are looked for before and after their audio: half a second."""
SPEECH = 20
"""Utterances that this is done with."""
NEAR = 0.1
"""Nats within which a loss is that of guessing, and beyond which it has moved."""


def causes(run: Path) -> list[str]:
    """The causes that the records of pretraining show, in the order in which they should be looked into."""
    p = records.parameters(run / "03_pretrain")
    rows = files.read_rows(run / "03_pretrain" / "metrics.jsonl")
    rounds = pd.DataFrame([row for row in rows if row["kind"] == "round"])
    if rounds.empty or rounds.loss.isna().all():  # with privacy a round may have no loss
        return []
    last = rounds.select_dtypes("number").tail(max(1, len(rounds) // 10)).mean()
    path = run / "02_kmeans" / "codebooks" / p["codebook"] / "counts.npy"
    shared = path.exists() and p["head"] == "shared"  # a personal head guesses by its own client's frequencies
    frequencies = (counts := np.load(path)) / counts.sum() if shared else None
    shown = _plateau(last, frequencies), _shifted(run, p, last, frequencies), _rate(p, rows, rounds, frequencies)
    return [cause for cause in (*shown, _codebooks(run, p, rows)) if cause]


def _plateau(last: pd.Series, frequencies: np.ndarray | None) -> str:
    """The model says the commonest label everywhere, or each label as often as it occurs."""
    if frequencies is None or last.accuracy_masked > 1.25 * frequencies.max():
        return ""
    guessing = entropy(frequencies)  # the loss of a model that hears nothing; NaN where no label is counted
    if not abs(last.loss - guessing) <= NEAR:
        return ""
    return (
        f"plateau at the commonest label: masked accuracy {last.accuracy_masked:.3f} is about the fraction of the"
        f" commonest label, {frequencies.max():.3f}, and the loss of {last.loss:.2f} nats about the entropy of the"
        f" labels, {guessing:.2f}. Left by unmasked_weight 1, a longer training, or another rate"
    )


def _shifted(run: Path, p: Mapping[str, Any], last: pd.Series, frequencies: np.ndarray | None) -> str:
    """Labels do not lie beside their audio: by the audio itself where it is here, else by what was learned."""
    if (measured := agreement(run, p["codebook"])) is not None:
        lag = int(measured.idxmax())
        if lag == 0:
            return ""
        side = "before" if lag > 0 else "after"
        figures = f"{measured[lag]:.0%} of the labels fit the audio {20 * abs(lag)} ms {side} them,"
        figures += f" {measured[0]:.0%} that beside them"
    else:
        learns = p["unmasked_weight"] and frequencies is not None and last.loss < entropy(frequencies) - NEAR
        if not learns or last.accuracy_unmasked > last.accuracy_masked:
            return ""
        figures = f"loss falls, to {last.loss:.2f}, but frames that are heard are not known better than hidden ones:"
        figures += f" accuracy {last.accuracy_unmasked:.3f} and {last.accuracy_masked:.3f}"
    return f"labels shifted against the audio: {figures}. Run 02_kmeans again, and look at how its labels were replaced"


def agreement(run: Path, codebook: str) -> pd.Series | None:
    """The fraction of labels that the audio gives again, by lag (frames that labels come after their audio).

    From the first utterances of the first client, the beginning of a long one. None where its audio is not on this
    machine, where the codebook is not one for all, or where a checkpoint's features were clustered.
    """
    folder = run / "02_kmeans" / "codebooks" / codebook
    homes = [handlers.home(run, path.name, "kmeans", "cpu", True) for path in sorted(run.glob("02_kmeans/clients/*"))]
    homes = [home for home in homes if (home.labels / codebook / "index.parquet").exists()]
    stored = {path.stem: torch.from_numpy(np.load(path)) for path in folder.glob("*.npy")}
    settings = (records.read_json(folder / "codebook.json") or {}).get("settings", {})
    if not homes or "centroids" not in stored or settings.get("features") != "mfcc":
        return None
    table = reading.utterances(homes[0]).head(SPEECH)
    table = table.assign(samples=table.samples.clip(upper=reading.LONG))
    if settings["normalisation"] == "global" or not all(Path(path).exists() for path in table.path):
        return None  # global: one scale for everybody, of an earlier version
    parts = [part[0] for part in public.extracted({}, settings, table, "cpu")]
    labels, lists = Labels(homes[0].labels / codebook), public.normalised(parts, table.speaker, settings)
    pairs = [
        (client.assign(x, stored).numpy(), labels[u][: len(x)]) for x, u in zip(lists, table.utterance, strict=True)
    ]
    pairs = [pair for pair in pairs if len(pair[1]) > 2 * max(LAGS)]
    if not pairs:
        return None
    same = {lag: [_fitting(*pair, lag) for pair in pairs] for lag in LAGS}
    return pd.Series({lag: np.concatenate(fits).mean() for lag, fits in same.items()})


def _fitting(heard: np.ndarray, labels: np.ndarray, lag: int) -> np.ndarray:
    """Whether label i is what is heard at frame i - ``lag``."""
    return labels[max(lag, 0) : len(labels) + min(lag, 0)] == heard[max(-lag, 0) : len(heard) - max(lag, 0)]


def _rate(
    p: Mapping[str, Any], rows: list[dict[str, Any]], rounds: pd.DataFrame, frequencies: np.ndarray | None
) -> str:
    """Steps lead away: the loss rises again, or beyond that of a model that says all labels alike, or to no number."""
    loss = rounds.set_index("round").loss.dropna().iloc[1:]  # with fresh weights it is a little worse than guessing
    loss = loss.rolling(max(1, len(loss) // 10), min_periods=1).median()  # a round is of few clients
    rise, figures = loss - loss.cummin(), []
    if rise.max() > NEAR:
        figures.append(f"the loss rises by {rise.max():.2f} nats until round {rise.idxmax()}")
    if frequencies is not None and loss.max() > (alike := np.log(len(frequencies))) + NEAR / 2:
        figures.append(f"the loss of round {loss.idxmax()}, {loss.max():.2f}, is above {alike:.2f}, guessing at random")
    if diverged := sum("DivergedError" in row["reason"] for row in rows if row["kind"] == "failure"):
        figures.append(f"{diverged} updates were left out since loss or gradient were not finite")
    norms = pd.DataFrame([row for row in rows if "gradient_norm" in row], columns=["round", "gradient_norm"])
    norms = norms.groupby("round").gradient_norm.mean()
    if len(norms) and (grown := norms.iloc[-1] / norms.iloc[0]) > 2:
        figures.append(f"the norm of the gradients has grown {grown:.1f} times")
    return f"learning rate too high, at {p['learning_rate']:g}: {'; '.join(figures)}. Lower it" if figures else ""


def _codebooks(run: Path, p: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """One head for labels that mean something else at each client."""
    quality = (records.read_json(run / "02_kmeans" / "quality.json") or {}).get("codebooks", {}).get(p["codebook"], {})
    same = quality.get("agreement_same")
    if p["head"] != "shared" or same is None or same > 0.5:
        return ""
    accuracies = pd.Series({row["client"]: row["accuracy_masked"] for row in rows if row["kind"] == "client"})
    return (
        f"client codebooks under a shared head: codebook {p['codebook']}, head shared, and two clients give"
        f" {same:.0%} of the same frames the same label; masked accuracy is {accuracies.min():.3f} to"
        f" {accuracies.max():.3f} among clients. codebook federated, or head personal"
    )
