"""`.ncnn` files in ncnn on the CPU. Run by latency_worker.py; needs numpy and ncnn.

A `.ncnn` file is a zip of `model.param`, `model.bin` and `inputs.json`, the [name, dtype, shape] of every input.
Options: `precision` ("float32" keeps ncnn's 16-bit storage and arithmetic off; "native" leaves them on).
"""

from __future__ import annotations

import json
import zipfile
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np


def describe(options: dict[str, str]) -> dict[str, Any]:
    import ncnn

    return {"runtime": f"ncnn {ncnn.__version__}"}


class Session:
    """A network; `precision` is that of its weights and of what ncnn may store and compute in."""

    note = ""

    def __init__(self, path: str, threads: int, options: dict[str, str]) -> None:
        import ncnn

        float32 = options["precision"] == "float32"
        self.precision = "float32" if float32 else "float16 weights"
        self.net = ncnn.Net()
        self.net.opt.num_threads = threads
        if float32:
            for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
                setattr(self.net.opt, f"use_{option}", False)
        with zipfile.ZipFile(path) as file, TemporaryDirectory() as folder:
            file.extractall(folder)
            self.inputs = json.loads(file.read("inputs.json"))
            if self.net.load_param(f"{folder}/model.param") or self.net.load_model(f"{folder}/model.bin"):
                raise SystemExit("ncnn cannot load it")

    def bind(self, feeds: dict[str, Any]) -> None:
        import ncnn

        self.mats = [ncnn.Mat(feed, batch_index=0).clone() for feed in feeds.values()]

    def extract(self) -> list[Any]:
        outputs = []
        with self.net.create_extractor() as extractor:
            for i, name in enumerate(self.net.input_names()):
                extractor.input(name, self.mats[i])
            for name in self.net.output_names():
                status, output = extractor.extract(name)
                if status:
                    raise SystemExit(f"ncnn cannot run it: status {status}")
                outputs.append(output)
        return outputs

    def run(self, num_runs: int) -> None:
        for _ in range(num_runs):
            self.extract()

    def outputs(self) -> list[Any]:
        return [np.array(output) for output in self.extract()]


def load(path: str, threads: int, batch_size: int, options: dict[str, str]) -> Session:
    return Session(path, threads, options)
