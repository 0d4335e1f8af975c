"""K-means itself, without files or federations: nearest centroids, k-means++, Lloyd, matching of codebooks.

Labels are the same to the bit across batches, clients, engines, threads and kills; across kinds of processors they are
not, since features round otherwise. Sums are float64: (sum, count) messages add up to what pooled data would give.
Lloyd's algorithm in memory is the one of the federation, ``statistics`` and ``update``, in one place.
"""

import math

import numpy as np
import scipy
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from fedhubert_lib import threads

CHUNK = 4096
"""Frames that a GPU compares with all centroids, or adds up, at once."""
SCORES = 2**18
"""Distances that a core computes at once: 1 MiB."""
PAIRS = 4096
"""Pairs of frame and centroid whose distances are computed at once where a near tie is decided."""
VALUES = 2**26
"""Numbers that a CPU adds up at once: 0.5 GiB, in float64."""
SEEDING_POINTS = 30_000
"""Frames that k-means++ draws from at most, as in scikit-learn's MiniBatchKMeans with batches of 10,000."""


def nearest(frames: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each frame: int64 [N], of ``frames`` [N, D] and ``centroids`` [K, D], on one device.

    Of equally near centroids the first is taken. A matrix product rounds a row differently by its place and by the
    shape, so it decides only where the best centroid is ahead by more than the product's largest rounding error;
    elsewhere the candidates within that error are compared in float64, in a fixed order of summation.
    """
    on_cpu = frames.device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.float64  # float64 on a CPU would take twice as long as scikit-learn
    # Around the centroids' mean, where |x|^2 / 2 - x.c + |c|^2 / 2 loses the fewest digits.
    exact = centroids.double()
    shift = exact.mean(0).float()
    centred = exact - shift.double()
    half_norms = centred.square().sum(1) / 2
    codes, offsets = centred.T.to(dtype).contiguous(), half_norms.to(dtype)
    # Twice the error of a sum of D + 1 products in any order, factors rounded before (Higham 2002, section 3.1).
    error = (frames.shape[1] + 8) * torch.finfo(dtype).eps
    reach, offset = float(centred.norm(dim=1).max()), float(half_norms.max())

    def label(part: Tensor) -> Tensor:
        rows = part.to(dtype) - shift
        scores = torch.addmm(offsets, rows, codes, alpha=-1)
        # numpy's argmin is four times as fast as torch's.
        first = torch.from_numpy(scores.numpy().argmin(1)[:, None]) if on_cpu else scores.argmin(1, keepdim=True)
        limit = scores.gather(1, first)[:, 0] + error * (rows.norm(dim=1) * reach + offset)
        scores.scatter_(1, first, torch.inf)
        if len(tied := torch.nonzero(scores.amin(1) <= limit).flatten()):
            candidates = (scores[tied] <= limit[tied, None]).scatter_(1, first[tied], True)
            first[tied, 0] = _decide(part[tied], exact, candidates)
        return first[:, 0]

    parts = frames.split(min(max(SCORES // len(centroids), 16), 1024) if on_cpu else CHUNK)
    # On a CPU a thread per core from end to end: threads that meet after every product mostly wait for each other.
    return torch.cat(list(threads.each(label, parts) if on_cpu and len(parts) > 8 else map(label, parts)))


def _decide(points: Tensor, centroids: Tensor, candidates: Tensor) -> Tensor:
    """The nearest of each point's ``candidates`` (bool [N, K]), the first of equals: int64 [N]."""
    frames, codes = points.double().cpu().numpy(), centroids.cpu().numpy()
    rows, columns = np.nonzero(candidates.cpu().numpy())
    distances = np.full(candidates.shape, np.inf)
    for start in range(0, len(rows), PAIRS):
        row, column = rows[start : start + PAIRS], columns[start : start + PAIRS]
        # numpy sums along a contiguous axis pairwise, in an order that depends on its length alone.
        distances[row, column] = np.square(frames[row] - codes[column]).sum(1)
    return torch.from_numpy(distances.argmin(1)).to(points.device)


def statistics(
    frames: Tensor, labels: Tensor, centroids: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per cluster the sum of its frames [K, D], their number [K] and their squared distances to it [K], all float64.

    ``weights`` [N], on the CPU alone, count each frame this many times.
    """
    clusters, codes = len(centroids), centroids.double()
    if frames.device.type == "cpu":
        sums, (counts, within) = torch.zeros_like(codes), codes.new_zeros(2, clusters)
        weights = torch.ones(len(frames)) if weights is None else weights
        parts = (values.split(max(1, VALUES // frames.shape[1])) for values in (frames, labels, weights.double()))
        for part, index, counted in zip(*parts, strict=True):  # scipy makes a copy of part in float64
            points, ones = part.numpy(), np.ones(len(part))
            norms = np.einsum("nd,nd->n", points, points, dtype=np.float64)
            places = index.numpy(), np.arange(len(part))
            member = scipy.sparse.csr_array((counted.numpy(), places), (clusters, len(part)))
            for total, values in zip((sums, counts, within), (points, ones, norms), strict=True):
                total += torch.from_numpy(member @ values)
    else:  # adding up by index on a GPU has no fixed order; a product with the one-hot labels has
        totals = codes.new_zeros(clusters, frames.shape[1] + 2)
        for part, index in zip(frames.split(CHUNK), labels.split(CHUNK), strict=True):
            part = part.double()
            member = torch.nn.functional.one_hot(index, clusters).double()
            rows = [part, part.new_ones(len(part), 1), part.square().sum(1, keepdim=True)]
            totals += member.T @ torch.cat(rows, dim=1)
        sums, counts, within = totals[:, :-2], totals[:, -2], totals[:, -1]
    inertias = within - 2 * (sums * codes).sum(1) + counts * codes.square().sum(1)
    return sums, counts, inertias.clamp(min=0)


def inertia(frames: Tensor, centroids: Tensor) -> float:
    """Sum of the squared distances of frames to their nearest centroids."""
    return float(statistics(frames, nearest(frames, centroids), centroids)[2].sum())


def plus_plus(points: Tensor, clusters: int, rng: np.random.Generator, weights: Tensor | None = None) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): K of ``points`` [N, D], float64 [K, D]; scikit-learn's.

    ``weights`` [N] count each point this many times. Raises ValueError when there are fewer than K points.
    """
    from sklearn.cluster import kmeans_plusplus  # here, since a process of each message would import it, for seconds

    if len(points) < clusters:
        raise ValueError(f"{clusters} clusters from {len(points)} points; lower clusters or bring more frames")
    frames, counts = points.double().numpy(), None if weights is None else weights.double().numpy()
    with threadpool_limits(1):  # by the number of threads a product may round differently
        chosen, _ = kmeans_plusplus(frames, clusters, sample_weight=counts, random_state=int(rng.integers(2**32)))
    return torch.from_numpy(chosen)


def update(sums: Tensor, counts: Tensor, inertias: Tensor, centroids: Tensor, rng: np.random.Generator) -> Tensor:
    """New centroids from what all clients reported: means of clusters, empty clusters re-seeded. [K, D] float64.

    No frame is at hand to move an empty centroid to, which is why scikit-learn's Lloyd would not do. So each takes half
    of one of the clusters of greatest inertia: it and that cluster's centroid are put a tenth of the cluster's standard
    deviation to either side of the mean, in a random direction.
    """
    full = counts > 0
    means = torch.where(full[:, None], sums / torch.where(full, counts, 1)[:, None], centroids.double())
    empty = torch.nonzero(~full).flatten().tolist()
    order = torch.argsort(inertias, descending=True, stable=True).tolist()
    for hollow, crowded in zip(empty, [cluster for cluster in order if inertias[cluster] > 0], strict=False):
        std = math.sqrt(float(inertias[crowded]) / float(counts[crowded]))
        direction = torch.from_numpy(rng.standard_normal(means.shape[1])).to(means.device)
        step = 0.1 * std * direction / direction.norm()
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
) -> Tensor:
    """Lloyd's algorithm on points in memory: centroids [K, D] float64.

    Stops after ``rounds``, or when the inertia falls by a smaller fraction than ``tolerance``.
    """
    before = None
    for _ in range(rounds):
        sums, counts, inertias = statistics(points, nearest(points, centroids), centroids, weights)
        total = float(inertias.sum())
        centroids = update(sums, counts, inertias, centroids, rng)
        full = bool((counts > 0).all())
        if before is not None and before - total <= tolerance * before and full:
            break
        before = total if full else None  # an empty cluster that begins anew may raise the inertia
    return centroids


def fit(points: Tensor, clusters: int, rng: np.random.Generator) -> Tensor:
    """K-means of frames in memory: centroids [K, D] float64.

    K-means++ and Lloyd until it stands still on a sample, then Lloyd on all: the passes over all frames are few.

    >>> centroids = fit(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), 2, np.random.default_rng(0))
    >>> centroids.shape, len(set(nearest(torch.tensor([[0.5], [8.5], [9.0]]), centroids).tolist()))
    (torch.Size([2, 1]), 2)
    """
    sample = points
    if len(points) > SEEDING_POINTS:
        sample = points[torch.from_numpy(np.sort(rng.choice(len(points), SEEDING_POINTS, replace=False)))]
    centroids = lloyd(sample, plus_plus(sample.cpu(), clusters, rng).to(points.device), rng)
    if len(points) > SEEDING_POINTS:
        centroids = lloyd(points, centroids, rng, tolerance=1e-3)
    return centroids


def matched(centroids: Tensor, reference: Tensor) -> Tensor:
    """``centroids`` in the order in which they fit ``reference`` best: the Hungarian method on squared distances."""
    distances = torch.cdist(reference.double(), centroids.double()).square()
    _, columns = scipy.optimize.linear_sum_assignment(distances.numpy())
    return centroids[torch.from_numpy(columns)]
