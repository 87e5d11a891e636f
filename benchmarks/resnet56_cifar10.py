"""ResNet-56 with given weights on CIFAR-10 at half the MACs: transport beside magnitude, two epochs each.

    python -m benchmarks.resnet56_cifar10 WEIGHTS.safetensors CIFAR10_FOLDER [METHOD ...]

Accuracy is over all 10,000 test images. Transport trains its masks for one epoch and fine-tunes for one; magnitude
selects at once and fine-tunes for two.
"""

from __future__ import annotations

import sys
import tempfile

from benchmarks import rows

METHODS = {
    "transport": ["--epochs", "1"],
    "magnitude": ["--epochs", "2"],
}


def main(weights: str, folder: str, *methods: str) -> None:
    for method in methods or METHODS:
        with tempfile.TemporaryDirectory() as out:
            report = rows.compress(
                *("--model", "resnet56", "--weights", weights, "--data", f"imagefolder:{folder}"),
                *("--budget", "macs<=0.5x", "--method", method, *METHODS[method], "--out", f"{out}/out"),
            )
        values = rows.summary(report)
        # Local paths say nothing to a reader; the hash of the recipe covers the weights themselves.
        values["recipe"] |= {"weights": "resnet56-cifar10.safetensors", "data": "imagefolder:cifar10"}
        rows.append("resnet56_cifar10", {"method": method} | values)


if __name__ == "__main__":
    main(*sys.argv[1:])
