"""K-means itself, without files or federations: nearest centroids, k-means++, Lloyd, matching of codebooks.

Which centroid is nearest to a frame depends neither on how frames were batched nor on how many clients hold them, and
sums are float64: (sum, count) messages add up to what pooled data would give. Labels are the same to the bit across
batches, clients, engines, threads and kills; across kinds of processors they are not, since features round otherwise.
"""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import kmeans_plusplus
from threadpoolctl import ThreadpoolController
from torch import Tensor

CHUNK = 4096
"""Frames whose distances to all centroids a GPU holds at once."""
SCORES = 2**18
"""Distances that a core computes at once: 1 MiB."""
PAIRS = 4096
"""Pairs of frame and centroid whose distances are computed at once where a near tie is decided."""
SEEDING_POINTS = 30_000
"""K-means++ looks at this many frames at most, as scikit-learn's MiniBatchKMeans does with batches of 10,000."""


def nearest(frames: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each frame: int64 [N], of ``frames`` [N, D] and ``centroids`` [K, D], on one device.

    Of equally near centroids the first is taken. The label of a frame depends on nothing else in the batch, nor on the
    number of threads: a matrix product rounds a row differently by its place and by the shape, so it decides only where
    the best centroid is ahead by more than the product's largest rounding error; elsewhere the candidates within that
    error are compared in float64, in a fixed order of summation.
    """
    # Around the centroids' mean, where |x|^2 / 2 - x.c + |c|^2 / 2 loses the fewest digits.
    exact = centroids.double()
    shift = exact.mean(0).float()
    centred = exact - shift.double()
    half_norms = centred.square().sum(1) / 2
    # float64 on a CPU would take twice as long as scikit-learn.
    eps = torch.finfo(torch.float32 if frames.device.type == "cpu" else torch.float64).eps
    reach, offset = float(centred.norm(dim=1).max()), float(half_norms.max())

    def margin(norms: Any) -> Any:
        """How far apart the scores of a frame have to be to be surely in order: twice the error of a sum of D + 1
        products in any order, factors rounded before (Higham 2002, section 3.1)."""
        return (frames.shape[1] + 8) * eps * (norms * reach + offset)

    if frames.device.type == "cpu":
        codes = torch.cat([-centred, half_norms[:, None]], dim=1).float().T.contiguous()
        return _nearest_on_cpu(frames.numpy(), exact.numpy(), shift.numpy(), codes.numpy(), margin)
    labels = torch.empty(len(frames), dtype=torch.int64, device=frames.device)
    for start in range(0, len(frames), CHUNK):
        part = frames[start : start + CHUNK]
        rows = part.double() - shift
        scores = torch.addmm(half_norms, rows, centred.T, alpha=-1)
        best, first = scores.min(1)
        candidates = scores <= (best + margin(rows.norm(dim=1)))[:, None]
        if len(tied := torch.nonzero(candidates.sum(1) > 1).flatten()):
            decided = _decide(part[tied].cpu().numpy(), exact.cpu().numpy(), candidates[tied].cpu().numpy())
            first[tied] = torch.from_numpy(decided).to(first)
        labels[start : start + CHUNK] = first
    return labels


def _nearest_on_cpu(
    points: np.ndarray, exact: np.ndarray, shift: np.ndarray, codes: np.ndarray, margin: Callable
) -> Tensor:
    labels = np.empty(len(points), np.int64)
    height = min(max(SCORES // len(exact), 16), 1024)
    starts = range(0, len(points), height)
    threads = max(1, min(torch.get_num_threads(), len(starts)))

    def work(thread: int) -> None:
        buffer = np.ones((height, len(codes)), np.float32)
        products = np.empty((height, len(exact)), np.float32)
        for start in starts[thread::threads]:
            part = points[start : start + height]
            every = np.arange(len(part))
            rows, scores = buffer[: len(part)], products[: len(part)]
            np.subtract(part, shift, out=rows[:, :-1], casting="same_kind")
            np.matmul(rows, codes, out=scores)
            first = scores.argmin(1)
            best = scores[every, first]
            limit = best + margin(np.sqrt(np.einsum("nd,nd->n", rows, rows)))
            scores[every, first] = np.inf
            if len(tied := np.flatnonzero(scores.min(1) <= limit)):
                scores[tied, first[tied]] = best[tied]
                first[tied] = _decide(part[tied], exact, scores[tied] <= limit[tied, None])
            labels[start : start + height] = first

    # A thread for each core from end to end: threads that meet after every product wait for each other half the time.
    with _libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return torch.from_numpy(labels)


def _decide(points: np.ndarray, centroids: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The nearest of each point's ``candidates`` (bool [N, K]), the first of equals: int64 [N]."""
    rows, columns = np.nonzero(candidates)
    distances = np.full(candidates.shape, np.inf)
    for start in range(0, len(rows), PAIRS):
        row, column = rows[start : start + PAIRS], columns[start : start + PAIRS]
        # numpy sums along a contiguous axis pairwise, in an order that depends on its length alone.
        distances[row, column] = np.square(points[row].astype(np.float64) - centroids[column]).sum(1)
    return distances.argmin(1)


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def statistics(
    frames: Tensor, labels: Tensor, centroids: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per cluster the sum of its frames [K, D], their number [K] and their squared distances to it [K], all float64.

    ``weights`` [N] count each frame so many times.
    """
    clusters, codes = len(centroids), centroids.double()
    if frames.device.type == "cpu":
        points, number = frames.numpy(), np.arange(len(frames))
        ones = np.ones(len(frames)) if weights is None else weights.double().numpy()
        member = scipy.sparse.csr_array((ones, (labels.numpy(), number)), shape=(clusters, len(frames)))
        sums = torch.from_numpy(member @ points)
        norms = torch.from_numpy(np.einsum("nd,nd->n", points, points, dtype=np.float64))
    else:  # adding up by index on a GPU has no fixed order; a product with the one-hot labels has
        sums, norms = torch.zeros_like(codes), frames.double().square().sum(1)
        for start in range(0, len(frames), CHUNK):
            member = torch.nn.functional.one_hot(labels[start : start + CHUNK], clusters).double()
            if weights is not None:
                member *= weights[start : start + CHUNK, None]
            sums += member.T @ frames[start : start + CHUNK].double()
    weights = None if weights is None else weights.double()
    counts = torch.bincount(labels, weights=weights, minlength=clusters).double()
    within = torch.bincount(labels, weights=norms if weights is None else norms * weights, minlength=clusters)
    inertias = within - 2 * (sums * codes).sum(1) + counts * codes.square().sum(1)
    return sums, counts, inertias.clamp(min=0)


def inertia(frames: Tensor, centroids: Tensor) -> float:
    """Sum of the squared distances of frames to their nearest centroids."""
    return float(statistics(frames, nearest(frames, centroids), centroids)[2].sum())


def plus_plus(points: Tensor, clusters: int, rng: np.random.Generator, weights: Tensor | None = None) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): K of ``points`` [N, D], float64 [K, D]; scikit-learn's.

    ``weights`` [N] count each point so many times. Raises ValueError when there are fewer than K points.
    """
    if len(points) < clusters:
        raise ValueError(f"{clusters} clusters from {len(points)} points; lower clusters or bring more frames")
    with _libraries().limit(limits=1):  # by the number of threads a product may round differently
        chosen, _ = kmeans_plusplus(
            points.double().numpy(),
            clusters,
            sample_weight=None if weights is None else weights.double().numpy(),
            random_state=int(rng.integers(2**32)),
        )
    return torch.from_numpy(chosen)


def update(sums: Tensor, counts: Tensor, inertias: Tensor, centroids: Tensor, rng: np.random.Generator) -> Tensor:
    """New centroids from what all clients reported: means of clusters, empty clusters re-seeded. [K, D] float64.

    No frame is known here to move an empty centroid to. So each takes half of one of the clusters of greatest inertia:
    it and that cluster's centroid are put a tenth of the cluster's deviation to either side of the mean, in a random
    direction.
    """
    full = counts > 0
    means = torch.where(full[:, None], sums / counts.clamp(min=1)[:, None], centroids.double())
    empty = torch.nonzero(~full).flatten().tolist()
    order = torch.argsort(inertias, descending=True, stable=True).tolist()
    for hollow, crowded in zip(empty, [cluster for cluster in order if inertias[cluster] > 0], strict=False):
        deviation = math.sqrt(float(inertias[crowded]) / float(counts[crowded]))
        direction = torch.from_numpy(rng.standard_normal(means.shape[1])).to(means.device)
        step = 0.1 * deviation * direction / direction.norm()
        means[hollow] = means[crowded] - step
        means[crowded] += step
    return means


def lloyd(
    points: Tensor,
    centroids: Tensor,
    rng: np.random.Generator,
    *,
    rounds: int = 100,
    tolerance: float = 1e-4,
    weights: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Lloyd's algorithm on points in memory: centroids [K, D] float64, and the inertia before the last update.

    Stops after ``rounds``, or when the inertia falls by a smaller share than ``tolerance``.
    """
    before = None
    for _ in range(rounds):
        sums, counts, inertias = statistics(points, nearest(points, centroids), centroids, weights)
        total = float(inertias.sum())
        centroids = update(sums, counts, inertias, centroids, rng)
        if before is not None and before - total <= tolerance * before and bool((counts > 0).all()):
            break
        before = total
    return centroids, total


def fit(points: Tensor, clusters: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """K-means of frames in memory: centroids [K, D] float64 and frames in each [K] float64.

    K-means++ and Lloyd until it stands still on a sample, then Lloyd on all: the passes over all frames are few.
    """
    sample = points
    if len(points) > SEEDING_POINTS:
        sample = points[torch.from_numpy(np.sort(rng.choice(len(points), SEEDING_POINTS, replace=False)))]
    centroids = plus_plus(sample.cpu(), clusters, rng).to(points.device)
    centroids, _ = lloyd(sample, centroids, rng)
    if len(points) > SEEDING_POINTS:
        centroids, _ = lloyd(points, centroids, rng, tolerance=1e-3)
    return centroids, torch.bincount(nearest(points, centroids), minlength=clusters).double()


def matched(centroids: Tensor, reference: Tensor) -> Tensor:
    """``centroids`` in the order in which they fit ``reference`` best: the Hungarian method on squared distances."""
    rows, columns = linear_sum_assignment(torch.cdist(reference.double(), centroids.double()).square().numpy())
    return centroids[torch.from_numpy(columns[np.argsort(rows)])]
