"""K-means itself, without files or federations: nearest centroids, k-means++, Lloyd, matching of codebooks.

Which centroid is nearest to a frame depends neither on how frames were batched nor on how many clients hold them, and
sums are float64: (sum, count) messages add up to what pooled data would give.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from threadpoolctl import ThreadpoolController
from torch import Tensor

CHUNK = 4096
"""Frames whose distances to all centroids a GPU holds at once."""
SCORES = 2**18
"""Distances that a core computes at once: 1 MiB."""
SEEDING_POINTS = 30_000
"""K-means++ looks at this many frames at most, as scikit-learn's MiniBatchKMeans does with batches of 10,000."""


def nearest(frames: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each frame: int64 [N], of ``frames`` [N, D] and ``centroids`` [K, D], on one device.

    Which one does not depend on what else is in the batch. Of equally near centroids the first is taken.
    """
    # Around the centroids' mean, where |x|² - 2 x.c + |c|² loses the fewest digits.
    middle = centroids.double().mean(0)
    centred = centroids.double() - middle
    half_norms = centred.square().sum(1) / 2
    if frames.device.type != "cpu":
        labels = torch.empty(len(frames), dtype=torch.int64, device=frames.device)
        for start in range(0, len(frames), CHUNK):
            chunk = frames[start : start + CHUNK].double() - middle
            labels[start : start + CHUNK] = torch.addmm(half_norms, chunk, centred.T, alpha=-1).argmin(1)
        return labels
    # On a CPU float64 would take twice as long as scikit-learn's float32. In float32 a score must not depend on the
    # number of rows, by which BLAS may choose another order of summation: every product has the same shape.
    codes = torch.cat([-centred, half_norms[:, None]], dim=1).float().T.contiguous().numpy()
    shift, points, labels = middle.float().numpy(), frames.numpy(), np.empty(len(frames), np.int64)
    height = min(max(SCORES // len(centroids), 16), 1024)
    starts = range(0, len(frames), height)
    threads = max(1, min(torch.get_num_threads(), len(starts)))

    def work(thread: int) -> None:
        rows = np.ones((height, len(codes)), np.float32)
        scores = np.empty((height, len(centroids)), np.float32)
        for start in starts[thread::threads]:
            part = points[start : start + height]
            np.subtract(part, shift, out=rows[: len(part), :-1])
            np.matmul(rows, codes, out=scores)
            labels[start : start + height] = scores[: len(part)].argmin(1)

    # A thread for each core from end to end: threads that meet after every product wait for each other half the time.
    with _libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return torch.from_numpy(labels)


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def statistics(
    frames: Tensor, labels: Tensor, centroids: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per cluster the sum of its frames [K, D], their number [K] and their squared distances to it [K], all float64.

    ``weights`` [N] count each frame so many times.
    """
    clusters, width = centroids.shape
    frames = frames.double()
    middle = centroids.double().mean(0)
    centred = frames - middle
    norms = centred.square().sum(1)
    if weights is not None:
        weights = weights.double()
        centred, norms = centred * weights[:, None], norms * weights
    counts = torch.bincount(labels, weights=weights, minlength=clusters).double()
    sums = torch.zeros(clusters, width, dtype=torch.float64, device=frames.device)
    if frames.device.type == "cpu":
        sums.index_add_(0, labels, centred)
    else:  # index_add_ on a GPU adds in no fixed order; a product with the one-hot labels does
        for start in range(0, len(frames), CHUNK):
            member = torch.nn.functional.one_hot(labels[start : start + CHUNK], clusters).double()
            sums += member.T @ centred[start : start + CHUNK]
    codes = centroids.double() - middle
    within = torch.bincount(labels, weights=norms, minlength=clusters)
    inertias = within - 2 * (sums * codes).sum(1) + counts * codes.square().sum(1)
    return sums + counts[:, None] * middle, counts, inertias.clamp(min=0)


def inertia(frames: Tensor, centroids: Tensor) -> float:
    """Sum of the squared distances of frames to their nearest centroids."""
    return float(statistics(frames, nearest(frames, centroids), centroids)[2].sum())


def plus_plus(points: Tensor, clusters: int, rng: np.random.Generator, weights: Tensor | None = None) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): K of ``points`` [N, D], float64 [K, D].

    Each step draws 2 + ln K candidates and takes the best, as scikit-learn does. ``weights`` [N] count each point so
    many times. Raises ValueError when there are fewer than K points.
    """
    if len(points) < clusters:
        raise ValueError(f"{clusters} clusters from {len(points)} points; lower clusters or bring more frames")
    points = points.double()
    weights = torch.ones(len(points), dtype=torch.float64) if weights is None else weights.double()
    norms = points.square().sum(1)
    candidates = 2 + int(math.log(clusters))
    chosen = [int(np.searchsorted(np.cumsum(weights.numpy()), rng.random() * float(weights.sum())))]
    closest = (norms + norms[chosen[0]] - 2 * points @ points[chosen[0]]).clamp_(min=0)
    for _ in range(1, clusters):
        potential = np.cumsum((closest * weights).numpy())
        if potential[-1] == 0:  # every point is a centroid already: repeat points, their clusters stay empty
            drawn = rng.integers(len(points), size=1)
        else:
            drawn = np.searchsorted(potential, rng.random(candidates) * potential[-1]).clip(max=len(points) - 1)
        drawn = torch.from_numpy(drawn)
        distances = (norms[None] + norms[drawn, None] - 2 * points[drawn] @ points.T).clamp_(min=0)
        distances = torch.minimum(distances, closest)
        best = int((distances @ weights).argmin())
        closest = distances[best]
        chosen.append(int(drawn[best]))
    return points[chosen]


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
