"""How far generated images are from real ones: Frechet distance, inception-style score, precision and recall.

All are of features that some network gives, whose name theirs carry: `fd_resnet56`. FID and IS are those of Inception
only. Images are compared as the bytes that anyone would look at.

Sources: Heusel et al. 2017, arXiv:1706.08500 (Frechet distance); Salimans et al. 2016, arXiv:1606.03498 (score);
Sajjadi et al. 2018, arXiv:1806.00035 (precision and recall of distributions).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.gan.features import FeatureNetwork
from sparsekit.gan.grids import to_bytes
from sparsekit.image_cache import default_cache_dir

# N images, D features, K classes

NUM_SPLITS = 10
BETA = 8.0  # F_8 weighs recall this much more than precision, F_1/8 the other way round
NUM_CLUSTERS, NUM_ANGLES, NUM_RUNS = 20, 1001, 10
NUM_KEPT = 10_000  # features of the reference that precision and recall may use
_CACHE_VERSION = 1  # raise it when what is cached changes


@dataclass(frozen=True, eq=False)
class Moments:
    """A Gaussian fitted to features: mean [D] and unbiased covariance [D, D], float64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """What the real images are in a network's eyes.

    Attributes:
        moments: of the features of all images.
        features: of up to `NUM_KEPT` images in random order, float32 [M, D].
    """

    network: FeatureNetwork
    moments: Moments
    features: Tensor


def evaluate(
    sample: Callable[[int], Tensor],
    reference: Reference,
    *,
    num_samples: int = 10_000,
    batch_size: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """`fd`, `is`, `f8` (recall) and `f1/8` (precision) of generated images, under the names that carry the network.

    Args:
        sample: a number N -> as many new images each time, [N, C, H, W] in [-1, 1].
        reference: the real images, from `reference_of`.
        num_samples: images in all. Distances depend on their number, so only those of equal numbers compare.
        batch_size: images at once.
        seed: of the clusters behind `f8` and `f1/8`.

    Raises:
        DataError: images that are not finite, or too few.
    """
    sizes = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
    features, logits = _extracted(reference.network, (_drawn(sample, size) for size in sizes))
    f8, f1_8 = precision_recall(reference.features, features, seed=seed)
    values = {
        "fd": moments_distance(reference.moments, moments(features)),
        "is": inception_score(logits.double().softmax(1)),
        "f8": f8,
        "f1/8": f1_8,
    }
    return {reference.network.metric(name): value for name, value in values.items()}


def reference_of(
    images: Tensor,
    network: FeatureNetwork,
    *,
    batch_size: int = 100,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """The real images as `network` sees them, from the disk where they have been seen before.

    Args:
        images: uint8 [N, C, H, W], at least 2.
        cache_dir: by default `$SPARSEKIT_CACHE`, else `~/.cache/sparsekit`.
        progress: called with (done, total) images.

    Raises:
        DataError: images of another type, or too few.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or len(images) < 2:
        raise DataError(f"real images: expected uint8 [N, C, H, W], at least 2, got {images.dtype} {[*images.shape]}")
    path = (cache_dir or default_cache_dir()) / f"reference-{_key(images, network)}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        stored = load_file(path)
        return Reference(network, Moments(stored["mean"], stored["covariance"]), stored["features"])
    features, _ = _extracted(network, _counted(images, batch_size, progress))
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    reference = Reference(network, moments(features), features[order[:NUM_KEPT]])
    with suppress(OSError):  # a full or read-only disk: computed anew the next time
        _store(reference, path)
    return reference


def moments(features: Tensor) -> Moments:
    """Of features [N, D], N at least 2.

    Raises:
        DataError: fewer, or not finite.

    >>> fitted = moments(torch.tensor([[0.0], [2.0]]))
    >>> fitted.mean.item(), fitted.covariance.item()
    (1.0, 2.0)
    """
    if features.dim() != 2 or len(features) < 2:
        raise DataError(f"features: expected [N, D] of at least 2 images, got {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise DataError("features: not finite")
    features = features.double()
    return Moments(features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + Tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) of Gaussians fitted to features [N, D].

    Raises:
        DataError: features of fewer than 2 images, or not finite.

    >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
    9.0
    """
    return moments_distance(moments(features_a), moments(features_b))


def moments_distance(a: Moments, b: Moments) -> float:
    """The Frechet distance of two Gaussians, at least 0."""
    # The trace of the root of a product of covariances R R' and S S' is the sum of the singular values of R'S. Unlike
    # a matrix root it needs no detour where a covariance is singular, as of fewer images than features.
    shared = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    apart = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    return max(0.0, float(apart - 2 * shared))


def inception_score(probabilities: Tensor, *, num_splits: int = NUM_SPLITS) -> float:
    """exp(mean KL(p(y|x) || p(y))), from 1 to K: high where single images are clear and all together varied.

    Args:
        probabilities: of classes, [N, K], rows sum to 1; best float64.
        num_splits: parts of the images, in their order, whose scores are averaged.

    Raises:
        DataError: fewer images than splits.

    >>> round(inception_score(torch.eye(4).repeat(10, 1)), 6)
    4.0
    """
    if len(probabilities) < num_splits:
        raise DataError(f"score: {len(probabilities)} images are fewer than {num_splits} splits")
    scores = []
    for part in probabilities.double().tensor_split(num_splits):
        # Mean KL = entropy of the mean - mean entropy; `entr` knows that 0 log 0 = 0.
        scores.append(float((torch.special.entr(part.mean(0)) - torch.special.entr(part).mean(0)).sum().exp()))
    return sum(scores) / len(scores)


def precision_recall(real: Tensor, fake: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """F_8, which is recall, and F_1/8, which is precision, both in [0, 1].

    Real and fake features [N, D], [M, D] are clustered together, the first of both, equally many. How they share the
    clusters gives a curve of precision over recall, averaged over runs; each F is the largest along it.

    Raises:
        DataError: fewer features than clusters.
    """
    from sklearn.cluster import MiniBatchKMeans  # seconds of start-up

    num = min(len(real), len(fake))
    if num < NUM_CLUSTERS:
        raise DataError(f"precision and recall: {num} images are fewer than {NUM_CLUSTERS} clusters")
    pooled = torch.cat([real[:num], fake[:num]]).float().cpu().numpy()
    curves = []
    for run in range(NUM_RUNS):
        clusters = MiniBatchKMeans(NUM_CLUSTERS, n_init=10, random_state=seed + run).fit(pooled).labels_
        shares = (np.bincount(half, minlength=NUM_CLUSTERS) / num for half in (clusters[:num], clusters[num:]))
        curves.append(prd_curve(*shares))
    precision, recall = np.mean(curves, axis=0)
    return _best_f(precision, recall, BETA), _best_f(precision, recall, 1 / BETA)


def prd_curve(real: NDArray[np.float64], fake: NDArray[np.float64]) -> NDArray[np.float64]:
    """Precision and recall, [2, NUM_ANGLES], at slopes from almost 0 to almost infinite.

    Args:
        real: shares of the clusters, [NUM_CLUSTERS], which sum to 1.
        fake: likewise.
    """
    slope_A1 = np.tan(np.linspace(0, math.pi / 2, NUM_ANGLES + 2)[1:-1])[:, None]
    precision = np.minimum(slope_A1 * real, fake).sum(1)
    recall = np.minimum(real, fake / slope_A1).sum(1)
    return np.stack([precision, recall])


def _best_f(precision: NDArray[np.float64], recall: NDArray[np.float64], beta: float) -> float:
    weighted = beta**2 * precision + recall
    # Without any overlap all are 0.
    f = (1 + beta**2) * precision * recall / np.where(weighted > 0, weighted, 1)
    return float(f.max())


def _drawn(sample: Callable[[int], Tensor], size: int) -> Tensor:
    """New images as bytes."""
    with torch.no_grad():
        images = sample(size)
    if len(images) != size:
        raise DataError(f"generated images: asked for {size}, got {list(images.shape)}")
    if not torch.isfinite(images).all():
        raise DataError("generated images: not finite")
    return to_bytes(images)


def _extracted(network: FeatureNetwork, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Features and logits of all images, on the CPU."""
    parts = [[x.float().cpu() for x in network.extract(pixels)] for pixels in batches]
    features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
    return features, logits


def _counted(images: Tensor, batch_size: int, progress: Callable[[int, int], None] | None) -> Iterator[Tensor]:
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]
        if progress:
            progress(min(start + batch_size, len(images)), len(images))


def _root(covariance: Tensor) -> Tensor:
    """R with R R' = covariance. Rounding may leave eigenvalues below 0, which no covariance has."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _key(images: Tensor, network: FeatureNetwork) -> str:
    digest = hashlib.sha256(f"{_CACHE_VERSION} {network.key} {list(images.shape)}".encode())
    for part in images.split(1024):  # which may be a map of a file larger than the memory
        digest.update(part.cpu().contiguous().numpy())
    return digest.hexdigest()[:32]


def _store(reference: Reference, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    tensors = {"mean": reference.moments.mean, "covariance": reference.moments.covariance}
    save_file(tensors | {"features": reference.features.contiguous()}, partial)
    partial.replace(path)
