"""One trained SNGAN, half of its generator's multiply-accumulates, ways to get there, as many seeds as one likes.

    python -m benchmarks.gan_compression FASHION_MNIST_ROOT WORK_FOLDER [--seeds N ...] [--jobs N] [--limit N]
        [--dense-epochs N] [--prune-epochs N] [--retrain-epochs N] [--ways NAME ...]

Fashion-MNIST at its own 28x28, generator 64 wide, discriminator 32. Every way starts from the same dense networks of
its seed and trains for as many epochs behind them: Algorithm 2 and GAN-Slimming's form prune and then fine-tune, the
one-shot ways, and the dense networks themselves, only fine-tune. The ticket is the exception: Algorithm 2's channels,
trained from the initial weights as long as the dense network was. Distances are of a ResNet-20's features, which is
trained on the same images first, `fd_resnet20`.

All runs are `compress_gan`'s and stay in WORK_FOLDER with their reports, files and pictures; what is there already is
not done again. A row per way: by point of the run (dense, pruned, recovered, compact) `fd`, `f8` and `f1/8` of every
seed, mean and standard deviation (n - 1). Latency is no part of it: jobs share the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import rows
from sparsekit.data import image_task
from sparsekit.gan.recipe import GanRecipe
from sparsekit.gan.training import train
from sparsekit.gan_ingredients import build, load_data
from sparsekit.gan_pipeline import compress_gan
from sparsekit.gan_report import GanReport
from sparsekit.images import load_images
from sparsekit.networks import build_network
from sparsekit.task import Schedule
from sparsekit.training import fit

FEATURES = "resnet20"
# The published strength needs 100 epochs to bring scales near 0; in one it must be stronger.
SHORT = {"rho": 0.01}
WAYS: dict[str, dict[str, Any]] = {
    "Algorithm 2": {"method": "channel_pruning", "options": SHORT},
    "Algorithm 2 by sixteens, least squares from noise": {
        **{"method": "channel_pruning", "options": SHORT, "recover": "lsq"},
        "round_to": 16,  # what ONNX Runtime's convolutions are fast at
    },
    "Algorithm 2, ticket": {"method": "channel_pruning", "options": SHORT, "retrain": "rewind"},
    "GAN-Slimming": {"method": "gan_slimming"},
    "dense, trained on": {"method": "magnitude", "budget": "macs<=1x"},
    "one-shot magnitude": {"method": "magnitude"},
    "neuron merging, least squares from noise": {"method": "neuron_merging", "recover": "lsq"},
}
_TRAINED = ("channel_pruning", "gan_slimming")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gan_compression", description=__doc__)
    parser.add_argument("fashion_mnist", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=7000)
    parser.add_argument("--dense-epochs", type=int, default=6)
    parser.add_argument("--prune-epochs", type=int, default=1)
    parser.add_argument("--retrain-epochs", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    base = GanRecipe(
        model="sngan",
        data="fashion-mnist",
        data_root=str(chosen.fashion_mnist),
        download=False,
        ch=64,
        discriminator_ch=32,
        limit=chosen.limit,
        dense_epochs=chosen.dense_epochs,
        # For some 1,300 steps of the generator instead of 50,000: smaller batches, one step of the discriminator for
        # each, which learns faster for it, and an average over fewer steps.
        batch_size=32,
        generator_batch_size=32,
        num_critic_steps=1,
        discriminator_lr=4e-4,
        average_decay=0.99,
        features=FEATURES,
        feature_weights=str(_features(chosen.fashion_mnist, chosen.work)),
        num_samples=2500,
    )
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        dense = [pool.submit(_dense, base, chosen.work, seed) for seed in chosen.seeds]
        jobs = {
            (way, seed): pool.submit(
                _compress, _recipe(trained.result(), way, chosen), chosen.work / _folder(way, seed)
            )
            for seed, trained in zip(chosen.seeds, dense, strict=True)
            for way in chosen.ways
        }
        reports = {key: job.result() for key, job in jobs.items()}
    for way in chosen.ways:
        _append(way, [reports[way, seed] for seed in chosen.seeds], chosen)


def _features(root: Path, work: Path) -> Path:
    """Weights of the classifier whose features tell images apart."""
    path = work / f"{FEATURES}.safetensors"
    if path.exists():
        return path
    images = load_images("fashion-mnist", data_root=root, download=False)
    torch.manual_seed(0)
    network = build_network(FEATURES, num_classes=images.num_classes, in_channels=1)
    task = image_task(images, augment=(), limit=20_000)
    fit(network, task, Schedule(epochs=3, lr=0.1, warmup_epochs=0.2), stage="features", checkpoint_dir=work)
    print(f"{FEATURES}: {task.evaluate(network):.1%} of the test images", flush=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return path


def _dense(base: GanRecipe, work: Path, seed: int) -> GanRecipe:
    """The recipe with the files of the seed's trained networks."""
    files = [work / f"{part}-{seed}.safetensors" for part in ("generator", "discriminator")]
    recipe = dataclasses.replace(base, seed=seed)
    if not all(file.exists() for file in files):
        data = load_data(recipe)
        gan = build(recipe, data).gan
        schedule = recipe.schedule("dense", flip=data.flip)
        folder = work / f"dense-{seed}"
        folder.mkdir(exist_ok=True)
        trained = train(gan, data.train_images, schedule, labels=data.train_labels, checkpoint_dir=folder)
        for network, file in zip((trained.average, gan.discriminator), files, strict=True):
            save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)
    return dataclasses.replace(recipe, weights=str(files[0]), discriminator_weights=str(files[1]))


def _recipe(dense: GanRecipe, way: str, chosen: argparse.Namespace) -> GanRecipe:
    """The way's recipe; the same training for all but tickets, which start anew."""
    recipe = dataclasses.replace(dense, **WAYS[way])
    if recipe.retrain == "rewind":
        epochs = chosen.dense_epochs
    else:
        epochs = chosen.retrain_epochs + (0 if recipe.method in _TRAINED else chosen.prune_epochs)
    return dataclasses.replace(recipe, epochs=chosen.prune_epochs, retrain_epochs=epochs)


def _compress(recipe: GanRecipe, folder: Path) -> GanReport:
    report = compress_gan(recipe, folder, resume=True)
    print(folder.name, dict(report.metrics), flush=True)
    return report


def _folder(way: str, seed: int) -> str:
    return f"{way.replace(',', '').replace(' ', '_').lower()}-{seed}"


def _append(way: str, reports: list[GanReport], chosen: argparse.Namespace) -> None:
    points = reports[0].metrics
    metrics = {
        point: {
            name: {
                "of_seeds": values,
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
            }
            for name in points[point]
            for values in [[report.metrics[point][name] for report in reports]]
        }
        for point in points
    }
    recipe = {name: value for name, value in reports[0].recipe.items() if name not in ("seed", "data_root")}
    rows.append(
        "gan_compression",
        {
            "way": way,
            "seeds": chosen.seeds,
            "macs_ratio": [report.ratio["num_macs"] for report in reports],
            "params_ratio": [report.ratio["num_params"] for report in reports],
            "metrics": metrics,
            "seconds": [dict(report.seconds) for report in reports],
            "recipe": recipe,
        },
    )


if __name__ == "__main__":
    main()
