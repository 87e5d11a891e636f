"""Recovery beyond plain ResNets: a MobileNetV2, a ViT, and networks that Torch-Pruning pruned.

    python -m benchmarks.recovery_networks WEIGHTS_DIR CIFAR10_FOLDER FASHION_MNIST_ROOT [--networks NAME ...]
        [--keep RATIO ...] [--ways NAME ...] [--layers PATTERN ...] [--num-images N] [--distill-s SECONDS]

Inner channels keep a share, residual streams stay whole: the hidden channels of inverted residuals, the hidden units
and the dimensions of heads of a ViT, the first convolution of every block of ResNet-56. A network is read from
WEIGHTS_DIR/NAME.safetensors; the first two are trained and written there where the file is missing, in some ten minutes
each on one core. ResNet-56's file is given: github.com/akamaster/pytorch_resnet_cifar10 as safetensors.

Accuracy and agreement (class probabilities shared with the dense network) are over all 10,000 test images. Recovery
sees training images, drawn after their labels were erased. Seconds are those of selection and repair together, `cpu_s`
the processor's, evaluation included; distillation gets what the other steps leave of its budget, by the clock.

Torch-Pruning prunes the same layers to the same widths by its magnitude importance. What it kept becomes a plan, by
layer name and position; `difference` is that between its network and ours of that plan, in float64. Recovery then works
on its network itself. A row per network, way and keep ratio.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import MobileNetV2

from benchmarks import rows
from benchmarks.recovery_torch_pruning import torch_pruned
from sparsekit import Budget, compact, fit, trace
from sparsekit.data import image_task
from sparsekit.images import ImageData, load_images
from sparsekit.models import MODELS
from sparsekit.networks import load_weights
from sparsekit.pruners import PRUNERS
from sparsekit.recovery import recover, unlabelled
from sparsekit.selection import allocate
from sparsekit.task import Schedule, Task

# name -> method, its options, steps of recovery
L1: tuple[str, dict[str, object]] = ("magnitude", {"norm": "l1"})
SUBSET: tuple[str, dict[str, object]] = ("column_subset", {})
THEIRS: tuple[str, dict[str, object]] = ("torch_pruning", {})
WAYS: dict[str, tuple[str, dict[str, object], tuple[str, ...]]] = {
    "l1": (*L1, ()),
    "neuron merging": ("neuron_merging", {}, ()),
    "l1, bn": (*L1, ("bn",)),
    "l1, lsq": (*L1, ("lsq",)),
    "l1, bn + bias + lsq": (*L1, ("bn", "bias", "lsq")),
    "l1, bn + bias + lsq + distill": (*L1, ("bn", "bias", "lsq", "distill")),
    "column subset": (*SUBSET, ()),
    "column subset, bn + bias + lsq": (*SUBSET, ("bn", "bias", "lsq")),
    "column subset, bn + bias + lsq + distill": (*SUBSET, ("bn", "bias", "lsq", "distill")),
    "torch-pruning": (*THEIRS, ()),
    "torch-pruning, bn": (*THEIRS, ("bn",)),
    "torch-pruning, bn + bias + lsq": (*THEIRS, ("bn", "bias", "lsq")),
    "torch-pruning, bn + bias + lsq + distill": (*THEIRS, ("bn", "bias", "lsq", "distill")),
}


@dataclass(frozen=True)
class Subject:
    """A network and its task.

    Attributes:
        build: makes it, freshly initialised.
        data: "cifar10" or "fashion-mnist".
        layers: patterns of the groups to prune.
        schedule: how it is trained, None where weights must be given.
        batch_size: of training.
        augment: of training, see `image_task`.
    """

    build: Callable[[], nn.Module]
    data: str
    layers: tuple[str, ...]
    schedule: Schedule | None = None
    batch_size: int = 64
    augment: tuple[str, ...] = ()


def mobilenet_v2() -> nn.Module:
    """torchvision's, for 32x32 images: nine blocks, two strides, 0.3 M parameters."""
    # expansion, out channels, blocks, stride of the first block
    stages = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 40, 3, 2], [4, 80, 3, 2]]
    network: nn.Module = MobileNetV2(num_classes=10, inverted_residual_setting=stages, dropout=0.0)
    stem = network.get_submodule("features.0.0")
    stem.stride = (1, 1)  # type: ignore[assignment]
    return network


def vit() -> nn.Module:
    """timm's, for 28x28 grey images: 49 patches, four blocks 96 wide, 0.5 M parameters."""
    network: nn.Module = VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=3
    )
    for module in network.modules():
        if isinstance(module, Attention):
            # The fused one's scale follows the size of the heads, the other's is a number.
            module.fused_attn = False  # type: ignore[misc]
    return network


SUBJECTS = {
    "mobilenet_v2-cifar10": Subject(
        mobilenet_v2,
        "cifar10",
        ("features.*.conv.0.0",),
        Schedule(epochs=6, lr=0.1, warmup_epochs=0.5),
        augment=("shift", "flip"),
    ),
    "vit-fashion_mnist": Subject(
        vit,
        "fashion-mnist",
        ("*.mlp.fc1", "*.attn.qkv#2"),
        Schedule(epochs=4, lr=1e-3, optimizer="adamw", weight_decay=0.05, warmup_epochs=0.5),
    ),
    "resnet56-cifar10": Subject(MODELS["resnet56"], "cifar10", ("layer*.conv1",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery_networks", description=__doc__)
    parser.add_argument("weights_dir", type=Path)
    parser.add_argument("cifar10")
    parser.add_argument("fashion_mnist", type=Path)
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", nargs="+", help="patterns of groups instead of the networks' own")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--distill-s", type=float, default=60.0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.networks:
        subject = SUBJECTS[name]
        if subject.data == "cifar10":
            images = load_images(f"imagefolder:{chosen.cifar10}")
        else:
            images = load_images(subject.data, data_root=chosen.fashion_mnist, download=False)
        dense = _trained(name, subject, images, chosen.weights_dir / f"{name}.safetensors")
        bench = _Bench.of(dense, images, chosen.num_images)
        settings = {"network": name, "layers": chosen.layers or list(subject.layers)}
        settings |= {"num_images": chosen.num_images, "distill_s": chosen.distill_s, "num_threads": 1}
        for keep in chosen.keep:
            for way in chosen.ways:
                values = {"way": way, "keep": keep, "dense_accuracy": bench.accuracy(bench.dense_logits)}
                row = settings | values | _run(bench, way, keep, settings["layers"], chosen.distill_s)
                rows.append("recovery_networks", row)


def _trained(name: str, subject: Subject, images: ImageData, path: Path) -> nn.Module:
    torch.manual_seed(0)
    dense = subject.build()
    if path.exists() or subject.schedule is None:
        load_weights(dense, path)
        return dense.eval()
    start = time.perf_counter()
    task = image_task(images, batch_size=subject.batch_size, augment=subject.augment)
    records = fit(dense, task, subject.schedule, stage=name, checkpoint_dir=path.parent, progress=_print_epoch)
    seconds = time.perf_counter() - start
    save_file({key: value.contiguous() for key, value in dense.state_dict().items()}, path)
    trained = {"network": name, "way": "dense", "accuracy": task.evaluate(dense), "seconds": seconds}
    rows.append(
        "recovery_networks", trained | {"schedule": dataclasses.asdict(subject.schedule), "loss": records[-1]["loss"]}
    )
    return dense.eval()


def _print_epoch(stage: str, done: int, total: int, record: Mapping[str, float]) -> None:
    if done % 100 == 0:
        print(stage, done, total, dict(record), flush=True)


@dataclass(frozen=True, eq=False)
class _Bench:
    """A dense network, unlabelled training images, and the test images.

    Attributes:
        dense: in eval mode.
        task: of the unlabelled images, whose labels are all 0.
        images: the same, [N, ...].
        test_inputs: [M, ...].
        test_labels: int64 [M].
        dense_logits: [M, classes], what the dense network makes of them.
    """

    dense: nn.Module
    task: Task
    images: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    dense_logits: Tensor

    @classmethod
    def of(cls, dense: nn.Module, images: ImageData, num_images: int) -> _Bench:
        blind = dataclasses.replace(images, train_labels=torch.zeros_like(images.train_labels))
        task = image_task(blind, batch_size=100, limit=num_images, augment=())
        test = dataclasses.replace(images, train_images=images.test_images, train_labels=images.test_labels)
        inputs, labels = (torch.cat(part) for part in zip(*image_task(test, augment=()).batches(0), strict=True))
        return cls(dense, task, unlabelled(task, num_images), inputs, labels, _logits(dense, inputs))

    def accuracy(self, logits: Tensor) -> float:
        """Share of the test images classified right."""
        return (logits.argmax(1) == self.test_labels).double().mean().item()

    def agreement(self, logits: Tensor) -> float:
        """How much of their class probabilities a network shares with the dense one, in [0, 1]."""
        return torch.minimum(logits.softmax(1), self.dense_logits.softmax(1)).sum(1).mean().item()


@torch.no_grad()
def _logits(network: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([network.eval()(batch) for batch in inputs.split(250)])


def _run(bench: _Bench, way: str, keep: float, layers: Sequence[str], distill_s: float) -> dict[str, object]:
    method, options, steps = WAYS[way]
    start, start_cpu_s = time.perf_counter(), time.process_time()
    graph = trace(bench.dense, bench.task.example_inputs)
    budget = Budget(keep=tuple((pattern, keep) for pattern in layers))
    values: dict[str, object] = {}
    if method == "torch_pruning":
        small, plan = torch_pruned(graph, bench.task.example_inputs, allocate(graph, budget))
        seconds = time.perf_counter() - start
        values["torch_pruning"] = version("torch-pruning")
        values["difference"] = _difference(compact(bench.dense, plan), small, bench.test_inputs[:8])
    else:
        plan = PRUNERS[method](**options)(graph, budget, bench.task)
        small = compact(bench.dense, plan)
        seconds = time.perf_counter() - start
    budget_s = distill_s if "distill" in steps else math.inf
    records = recover(bench.dense, small, plan, bench.images, steps=steps, budget_s=budget_s)
    cpu_s = time.process_time() - start_cpu_s
    logits = _logits(small, bench.test_inputs)
    return values | {
        "accuracy": bench.accuracy(logits),
        "agreement": bench.agreement(logits),
        "seconds": seconds + sum(record.seconds for record in records),
        "cpu_s": cpu_s,
        "steps": [dataclasses.asdict(record) for record in records],
    }


def _difference(ours: nn.Module, theirs: nn.Module, inputs: Tensor) -> float:
    """The largest difference of the outputs relative to the largest output, in float64."""
    a, b = (_logits(copy.deepcopy(network).double(), inputs.double()) for network in (ours, theirs))
    return ((a - b).abs().max() / a.abs().max()).item()


if __name__ == "__main__":
    main()
