"""Distances between sets of images against closed forms, and the names that they may carry."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsekit.errors import DataError, UsageError
from sparsekit.gan import features as features_module
from sparsekit.gan import metrics
from sparsekit.gan.features import FeatureNetwork, features_of, inception
from sparsekit.gan.metrics import (
    NUM_CLUSTERS,
    Moments,
    evaluate,
    frechet_distance,
    inception_score,
    moments,
    moments_distance,
    prd_curve,
    precision_recall,
    reference_of,
)
from sparsekit.images import MEAN, STD
from sparsekit.models import MODELS


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, seed: int) -> Tensor:
    found: Tensor = torch.cov(drawn(size, size + 3, seed=seed))
    return found


def with_moments(mean: Tensor, deviation: Tensor, num: int, seed: int) -> Tensor:
    """Features [num, D] whose mean and unbiased, diagonal covariance are exactly these."""
    x = drawn(num, len(mean), seed=seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    placed: Tensor = x * deviation + mean
    return placed


# Frechet distance


def test_the_distance_of_two_gaussians_along_the_axes_is_that_of_means_and_deviations() -> None:
    means = torch.tensor([[0.0, 1.0, -2.0], [3.0, 1.0, 2.0]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.5], [1.0, 5.0, 1.5]], dtype=torch.float64)
    a, b = (with_moments(means[i], deviations[i], 50 + i, seed=i) for i in (0, 1))
    # (9 + 0 + 16) + (0 + 9 + 1)
    assert frechet_distance(a, b) == pytest.approx(35.0, rel=1e-9)


def test_the_distance_has_scipy_s_matrix_root_in_it() -> None:
    a, b = (Moments(drawn(6, seed=i), covariance(6, seed=i)) for i in (1, 2))
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root).real
    assert moments_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_singular_covariances_give_what_a_little_on_their_diagonals_gives() -> None:
    a, b = drawn(5, 12, seed=1), drawn(7, 12, seed=2) + 1
    fitted = [moments(a), moments(b)]
    jittered = [x.covariance + 1e-6 * torch.eye(12) for x in fitted]
    root = scipy.linalg.sqrtm((jittered[0] @ jittered[1]).numpy())
    apart = (fitted[0].mean - fitted[1].mean).square().sum() + sum(x.covariance.trace() for x in fitted)
    # Each of 12 directions adds up to sqrt(1e-6 * largest variance, about 10) to the root.
    assert frechet_distance(a, b) == pytest.approx(float(apart) - 2 * np.trace(root).real, abs=12 * 2 * 4e-3)


@pytest.mark.parametrize("num_images", [4, 100])
def test_a_sample_is_at_no_distance_from_itself_in_any_order(num_images: int) -> None:
    x = drawn(num_images, 8)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)


def test_a_shift_is_its_square_and_sides_do_not_matter() -> None:
    x, y = drawn(30, 4), drawn(40, 4, seed=1)
    assert frechet_distance(x, x + 2) == pytest.approx(16.0)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))


def test_covariances_are_unbiased() -> None:
    x = drawn(7, 3).float()
    fitted = moments(x)
    assert np.allclose(fitted.covariance, np.cov(x.numpy().T, ddof=1))
    assert fitted.mean.dtype == fitted.covariance.dtype == torch.float64


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3), r"at least 2 images, got \[1, 3\]"),
        (torch.zeros(4), r"got \[4\]"),
        (torch.tensor([[0.0], [math.nan]]), "not finite"),
    ],
)
def test_features_without_moments_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        moments(x)


# Score


def test_the_score_of_unsure_predictions_is_one_and_of_sure_and_even_ones_the_number_of_classes() -> None:
    assert inception_score(torch.full((50, 10), 0.1)) == pytest.approx(1.0)
    assert inception_score(torch.eye(10).repeat(20, 1)) == pytest.approx(10.0)


def test_the_score_of_one_class_only_is_one() -> None:
    assert inception_score(torch.eye(10)[[3] * 40]) == pytest.approx(1.0)


def test_the_score_is_the_mean_over_splits_in_their_order() -> None:
    by_class = torch.eye(2).repeat_interleave(50, dim=0)  # each of 10 splits sees one class
    assert inception_score(by_class) == pytest.approx(1.0)
    assert inception_score(by_class, num_splits=1) == pytest.approx(2.0)


def test_the_score_of_a_hand_computed_case() -> None:
    # p(y) = (.75, .25): KL(1, 0) = log(1/.75), KL(.5, .5) = .5 log(.5/.75) + .5 log(.5/.25)
    kl = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    rows = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    assert inception_score(rows, num_splits=1) == pytest.approx(math.exp(kl))


def test_fewer_images_than_splits_have_no_score() -> None:
    with pytest.raises(DataError, match="9 images are fewer than 10 splits"):
        inception_score(torch.ones(9, 1))


# Precision and recall


def test_the_curve_of_a_hand_computed_case() -> None:
    real, fake = np.zeros(NUM_CLUSTERS), np.zeros(NUM_CLUSTERS)
    real[:2], fake[:2] = (0.5, 0.5), (0.75, 0.25)
    precision, recall = prd_curve(real, fake)
    middle = len(precision) // 2  # slope 1
    assert precision[middle] == pytest.approx(0.75)
    assert recall[middle] == pytest.approx(0.75)
    assert precision[-1] == pytest.approx(1.0)  # all that is fake lies where something is real
    assert recall[0] == pytest.approx(1.0)
    slopes = np.tan(np.linspace(0, math.pi / 2, len(precision) + 2)[1:-1])
    assert np.allclose(precision, recall * slopes)


def blobs(centres: Sequence[int], num_each: int, seed: int) -> Tensor:
    """Points around places far from each other, one cluster each."""
    places = 100 * torch.eye(NUM_CLUSTERS, dtype=torch.float64)[list(centres)]
    return (places.repeat(num_each, 1) + drawn(len(centres) * num_each, NUM_CLUSTERS, seed=seed)).float()


def test_a_set_beside_itself_has_full_precision_and_recall() -> None:
    x = drawn(300, 4).float()
    assert precision_recall(x, x) == pytest.approx((1.0, 1.0))


def test_disjoint_sets_have_neither() -> None:
    assert precision_recall(blobs(range(10), 30, 0), blobs(range(10, 20), 30, 1)) == (0.0, 0.0)


def test_missing_modes_cost_recall_and_invented_ones_precision() -> None:
    all_modes, half = blobs(range(20), 20, 0), blobs(range(10), 40, 1)
    recall, precision = precision_recall(all_modes, half)
    # Half of what is real is met. F_8 at recall .5, precision 1: 65 * .5 / 64.5
    assert recall == pytest.approx(0.504, abs=0.01)
    assert precision > 0.97
    assert precision_recall(half, all_modes) == pytest.approx((precision, recall), abs=0.02)


def test_the_same_seed_gives_the_same_clusters() -> None:
    x, y = drawn(60, 3).float(), drawn(60, 3, seed=1).float()
    assert precision_recall(x, y, seed=3) == precision_recall(x, y, seed=3)
    assert precision_recall(x, y, seed=3) != precision_recall(x, y, seed=30)


def test_runs_differ_in_their_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = drawn(60, 3).float(), drawn(60, 3, seed=1).float()
    averaged = precision_recall(x, y)
    monkeypatch.setattr(metrics, "NUM_RUNS", 1)
    assert precision_recall(x, y) != pytest.approx(averaged)


def test_the_smaller_set_says_how_many_of_the_larger_count() -> None:
    real, fake = blobs(range(20), 20, 0), blobs(range(20), 20, 1)
    outside = torch.cat([fake, blobs(range(10), 400, 2)])
    assert precision_recall(real, outside) == precision_recall(real, fake)


def test_too_few_features_to_cluster_are_refused() -> None:
    with pytest.raises(DataError, match="19 images are fewer than 20 clusters"):
        precision_recall(drawn(19, 2), drawn(100, 2))


# Features


class Tiny(nn.Module):
    """A classifier that counts its runs."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))
        return logits


def tiny(in_channels: int = 3, seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(in_channels)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_features_are_what_the_last_layer_reads_of_normalised_images() -> None:
    network = tiny()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    images = pixels(6, 3, 8, 8)
    features, logits = features_of(network, "tiny", mean=mean, std=std).extract(images)
    network.eval()
    x = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(features, network.norm(network.conv(x)).relu().mean((2, 3)), atol=1e-6)
    assert torch.allclose(logits, network(x), atol=1e-6)


def test_feature_maps_are_averaged_over_positions() -> None:
    network = tiny()
    found = features_of(network, "tiny", layer="norm")
    features, _ = found.extract(pixels(6, 3, 8, 8))
    assert features.shape == (6, 5)
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    x = (pixels(6, 3, 8, 8) / 255 - mean_C11) / std_C11
    assert torch.allclose(features, network.conv(x).mean((2, 3)), atol=1e-6)


def test_the_network_given_is_left_as_it_is_and_may_train_on() -> None:
    network = tiny().train()
    found = features_of(network, "tiny")
    before, _ = found.extract(pixels(4, 3, 8, 8))
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    network.conv.weight.data.zero_()
    after, _ = found.extract(pixels(4, 3, 8, 8))
    assert torch.equal(before, after)


def test_grey_images_get_the_channels_that_the_network_has() -> None:
    found = features_of(tiny(), "tiny")
    grey = pixels(4, 1, 8, 8)
    assert torch.equal(found.extract(grey)[0], found.extract(grey.repeat(1, 3, 1, 1))[0])
    with pytest.raises(DataError, match=r"tiny: takes images of 3 channels, got \[4, 2, 8, 8\]"):
        found.extract(pixels(4, 2, 8, 8))


def test_images_are_scaled_to_the_size_asked_for() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 2))
    found = features_of(network, "tiny", image_size=6)
    assert found.extract(pixels(2, 3, 9, 9))[0].shape == (2, 108)
    constant = torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)
    assert torch.allclose(found.extract(constant)[0], found.extract(constant[..., :6, :6])[0], atol=1e-6)


def test_a_layer_that_cannot_give_features_is_named() -> None:
    with pytest.raises(UsageError, match=r"layer 'linaer' of tiny: no such module; did you mean linear\?"):
        features_of(tiny(), "tiny", layer="linaer")
    with pytest.raises(UsageError, match="conv: has no linear layer"):
        features_of(nn.Conv2d(3, 4, 1), "conv")
    network = nn.Sequential(nn.Flatten(2), nn.Linear(16, 2), nn.Flatten(1))
    with pytest.raises(DataError, match=r"layer '1' of odd: reads \[2, 3, 16\]"):
        features_of(network, "odd").extract(pixels(2, 3, 4, 4))


def test_the_key_is_of_all_that_features_depend_on() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"layer": "norm"},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"image_size": 8},
    ]
    keys = [features_of(tiny(), "tiny", **setting).key for setting in settings]
    other = tiny()
    other.norm.get_buffer("running_mean").add_(1)
    keys += [features_of(tiny(seed=1), "tiny").key, features_of(other, "tiny").key]
    assert len(set(keys)) == len(keys)
    assert features_of(tiny(), "another name").key == keys[0]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "vgg16"])
def test_our_classifiers_give_features_without_naming_a_layer(name: str) -> None:
    features, logits = features_of(MODELS[name](), name).extract(pixels(2, 3, 32, 32))
    assert features.dim() == 2
    assert logits.shape == (2, 10)


# The reference, and all together


@pytest.fixture
def network() -> FeatureNetwork:
    return features_of(tiny(), "tiny")


def counting(network: FeatureNetwork) -> tuple[FeatureNetwork, list[int]]:
    seen: list[int] = []

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(images))
        return network.extract(images)

    return replace(network, extract=extract), seen


def test_a_reference_is_computed_once(network: FeatureNetwork, tmp_path: Path) -> None:
    images = pixels(50, 3, 8, 8)
    counted, seen = counting(network)
    told: list[tuple[int, int]] = []
    first = reference_of(images, counted, batch_size=20, cache_dir=tmp_path / "new", progress=lambda *t: told.append(t))
    assert seen == [20, 20, 10]
    assert told == [(20, 50), (40, 50), (50, 50)]
    again = reference_of(images, counted, batch_size=20, cache_dir=tmp_path / "new")
    assert sum(seen) == 50
    for name in ("mean", "covariance"):
        assert torch.equal(getattr(first.moments, name), getattr(again.moments, name))
    assert torch.equal(first.features, again.features)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_a_reference_keeps_features_of_images_from_all_over(
    network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = pixels(50, 3, 8, 8)
    order = {tuple(row): number for number, row in enumerate(network.extract(images)[0].tolist())}
    monkeypatch.setattr(metrics, "NUM_KEPT", 20)
    reference = reference_of(images, network, cache_dir=tmp_path)
    kept = [order[tuple(row)] for row in reference.features.tolist()]
    assert len(set(kept)) == 20
    assert max(kept) > 40
    everything = moments(network.extract(images)[0])
    assert torch.equal(reference.moments.covariance, everything.covariance)


@pytest.mark.parametrize("change", ["images", "network"])
def test_another_reference_is_not_taken_from_the_cache(change: str, network: FeatureNetwork, tmp_path: Path) -> None:
    images = pixels(50, 3, 8, 8)
    reference_of(images, network, cache_dir=tmp_path)
    counted, seen = counting(replace(network, key="other") if change == "network" else network)
    if change == "images":
        images[-1, -1, -1, -1] ^= 1
    reference_of(images, counted, cache_dir=tmp_path)
    assert sum(seen) == 50


def test_a_damaged_cache_is_made_anew_and_none_is_needed(network: FeatureNetwork, tmp_path: Path) -> None:
    images = pixels(50, 3, 8, 8)
    reference_of(images, network, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    counted, seen = counting(network)
    reference_of(images, counted, cache_dir=tmp_path)
    assert sum(seen) == 50
    assert load_file(file).keys() == {"mean", "covariance", "features"}
    blocked = tmp_path / "file"
    blocked.write_text("")
    reference_of(images, counted, cache_dir=blocked / "below")
    assert sum(seen) == 100


def test_real_images_are_bytes(network: FeatureNetwork, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"real images: expected uint8 .* got torch.float32 \[5, 3, 8, 8\]"):
        reference_of(torch.zeros(5, 3, 8, 8), network, cache_dir=tmp_path)


def sampler(images: Tensor) -> Callable[[int], Tensor]:
    """The images in their order, over and over, a part at a time, in [-1, 1]."""
    scaled, position = images.float() / 127.5 - 1, [0]

    def sample(num: int) -> Tensor:
        index = (position[0] + torch.arange(num)) % len(scaled)
        position[0] += num
        return scaled[index]

    return sample


def recorded(sample: Callable[[int], Tensor], asked: list[int]) -> Callable[[int], Tensor]:
    def recording(num: int) -> Tensor:
        asked.append(num)
        return sample(num)

    return recording


def test_the_real_images_themselves_are_no_distance_away(network: FeatureNetwork, tmp_path: Path) -> None:
    images = pixels(60, 3, 8, 8)
    reference = reference_of(images, network, cache_dir=tmp_path)
    found = evaluate(sampler(images), reference, num_samples=60, batch_size=25)
    assert list(found) == ["fd_tiny", "is_tiny", "f8_tiny", "f1/8_tiny"]
    assert found["fd_tiny"] == pytest.approx(0, abs=1e-9)
    assert (found["f8_tiny"], found["f1/8_tiny"]) == pytest.approx((1.0, 1.0))
    assert 1 <= found["is_tiny"] <= 4
    half = evaluate(sampler(images // 2), reference, num_samples=60)
    assert half["fd_tiny"] > 1e-3


def test_as_many_images_are_drawn_as_asked_for_and_batches_do_not_matter(
    network: FeatureNetwork, tmp_path: Path
) -> None:
    reference = reference_of(pixels(60, 3, 8, 8), network, cache_dir=tmp_path)
    found = []
    for batch_size, sizes in ((7, [7, 7, 7, 7, 2]), (100, [30])):
        asked: list[int] = []
        sample = recorded(sampler(pixels(60, 3, 8, 8, seed=1)), asked)
        found.append(evaluate(sample, reference, num_samples=30, batch_size=batch_size))
        assert asked == sizes
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_images_count_as_the_bytes_that_they_are_seen_as(network: FeatureNetwork, tmp_path: Path) -> None:
    reference = reference_of(pixels(60, 3, 8, 8), network, cache_dir=tmp_path)
    images = pixels(60, 3, 8, 8, seed=1)
    exact, less, more, other = (
        evaluate(sampler(images + by), reference, num_samples=60) for by in (0.0, -0.4, 0.4, 1.4)
    )
    assert exact == less == more != other


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda num: torch.full((num, 3, 8, 8), math.nan), "generated images: not finite"),
        (lambda num: torch.zeros(1, 3, 8, 8), r"generated images: asked for 60, got \[1, 3, 8, 8\]"),
    ],
)
def test_images_that_are_none_are_refused(
    bad: Callable[[int], Tensor], message: str, network: FeatureNetwork, tmp_path: Path
) -> None:
    reference = reference_of(pixels(60, 3, 8, 8), network, cache_dir=tmp_path)
    with pytest.raises(DataError, match=message):
        evaluate(bad, reference, num_samples=60)


def test_only_inception_s_distance_is_called_fid(network: FeatureNetwork, tmp_path: Path) -> None:
    impostor = features_of(tiny(), "inception")
    assert impostor.metric("fd") == "fd_inception"
    reference = reference_of(pixels(60, 3, 8, 8), replace(network, is_inception=True), cache_dir=tmp_path)
    assert list(evaluate(sampler(pixels(60, 3, 8, 8)), reference, num_samples=60)) == ["fid", "is", "f8", "f1/8"]


# Inception


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch-fidelity, which is not among what tests need."""

    class Extractor(nn.Module):
        def __init__(self, name: str, wanted: list[str], feature_extractor_weights_path: Any) -> None:
            super().__init__()
            self.names = wanted
            self.linear = nn.Linear(3, 4, bias=False)
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            assert self.names == ["2048", "logits_unbiased"]
            assert x.dtype == torch.uint8
            assert x.shape[1] == 3
            features = x.float().mean((2, 3))
            return features, self.linear(features)

    source = SimpleNamespace(FeatureExtractorInceptionV3=Extractor, URL_INCEPTION_V3="https://weights")
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(feature_extractor_inceptionv3=source))


def saved_weights(folder: Path, monkeypatch: pytest.MonkeyPatch, value: object) -> Path:
    """A file that passes for Inception's weights."""
    path = folder / "weights.pth"
    torch.save(value, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "_INCEPTION", f"weights-{digest[:8]}.pth")
    return path


@pytest.mark.usefixtures("package")
def test_inception_gives_features_and_logits_of_grey_images_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    found = inception(saved_weights(tmp_path, monkeypatch, {"linear.weight": weight}))
    assert found.is_inception
    features, logits = found.extract(pixels(5, 1, 8, 8))
    assert features.shape == (5, 3)
    assert torch.allclose(logits, features @ weight.T)


@pytest.mark.usefixtures("package")
def test_weights_that_hold_more_than_tensors_are_not_unpickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved_weights(tmp_path, monkeypatch, {"linear.weight": nn.Linear(3, 4)})
    with pytest.raises(DataError, match="holds more than tensors"):
        inception(path)


@pytest.mark.usefixtures("package")
def test_missing_and_other_weights_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}\S*: no such file; .* https://weights$"):
        inception()
    other = tmp_path / "other.pth"
    torch.save({"linear.weight": torch.zeros(4, 3)}, other)
    with pytest.raises(DataError, match="damaged, or not the weights that FID is defined by"):
        inception(other)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UsageError, match=r"torch-fidelity is not installed; pip install 'sparsekit\[gan\]'$"):
        inception()
