"""Fashion-MNIST as the authors normalise it: (pixel - 0.5) / 0.5."""

from __future__ import annotations

from dataclasses import replace

from sparsekit.data import image_task
from sparsekit.images import load_images
from sparsekit.task import Task


def task() -> Task:
    return image_task(replace(load_images("fashion-mnist"), mean=(0.5,), std=(0.5,)))
