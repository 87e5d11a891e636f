"""Horses into deer: CycleGAN on two classes of CIFAR-10 at 32x32, its generator cut to half the MACs.

    python -m benchmarks.gan_cyclegan CIFAR10_FOLDER RESNET56_WEIGHTS OUT [--limit N] [--dense-epochs N]
        [--prune-epochs N] [--retrain-epochs N]

An unpaired task of real images, small enough for a CPU: generators 32 wide with four blocks, batches of four. All four
networks train; then the way from horse to deer is pruned by Algorithm 2 and the cycle trains on around it. The distance
is that of test horses, translated, to the training deer, in the features of ResNet-56 (`fd_resnet56`); `given` is that
of the horses as they are. OUT is the folder of `sparsekit gan compress`, with the report and its pictures. One row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import rows
from sparsekit.gan.grids import from_bytes
from sparsekit.gan.metrics import evaluate, reference_of
from sparsekit.gan.recipe import GanRecipe
from sparsekit.gan_ingredients import build, build_features, load_data
from sparsekit.gan_pipeline import compress_gan

HORSE, DEER = 7, 4


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gan_cyclegan", description=__doc__)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("resnet56", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=10_000, help="images of all ten classes together")
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--prune-epochs", type=int, default=3)
    parser.add_argument("--retrain-epochs", type=int, default=6)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    recipe = GanRecipe(
        model="cyclegan",
        data=f"imagefolder:{chosen.cifar10}",
        domains=(HORSE, DEER),
        limit=chosen.limit,
        ch=32,
        discriminator_ch=32,
        num_blocks=4,
        batch_size=4,
        generator_batch_size=4,
        options={"batch_size": 4, "rho": 0.01},
        dense_epochs=chosen.dense_epochs,
        epochs=chosen.prune_epochs,
        retrain_epochs=chosen.retrain_epochs,
        features="resnet56",
        feature_weights=str(chosen.resnet56),
        num_samples=1000,
    )
    data = load_data(recipe)
    network, _ = build_features(recipe, data)
    assert network is not None
    horses = from_bytes(data.test_images[data.test_labels == HORSE]).split(100)
    parts = iter(horses)
    reference = reference_of(build(recipe, data).images, network)
    given = evaluate(lambda _: next(parts), reference, num_samples=100 * len(horses))
    report = compress_gan(recipe, chosen.out, resume=True)
    rows.append(
        "gan_cyclegan",
        {
            "metrics": {"given": given, **report.metrics},
            "ratio": report.ratio,
            "latency": (report.latency or {})["ratio"],
            "seconds": report.seconds,
            "recipe": {name: value for name, value in report.recipe.items() if name not in ("data", "feature_weights")},
        },
    )


if __name__ == "__main__":
    main()
