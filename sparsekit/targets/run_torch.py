"""torch.export archives (`.pt2`) in PyTorch. Run by latency_worker.py; needs numpy and torch.

Options: `device` ("cpu" or "cuda"), `compile` ("1": through torch.compile), `precision` ("float32" keeps CUDA from
TF32; "native" lets it).
"""

from __future__ import annotations

import os
from typing import Any


def describe(options: dict[str, str]) -> dict[str, Any]:
    if options["compile"]:
        os.environ["TORCHINDUCTOR_FREEZING"] = "1"  # read on import: weights are constants, as in any deployment
    import torch

    torch.set_num_interop_threads(1)
    torch.set_grad_enabled(False)
    device = {}
    if options["device"] == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no CUDA device here")
        device = {"device": torch.cuda.get_device_name()}
        exact = options["precision"] == "float32"
        torch.backends.cudnn.allow_tf32 = not exact
        torch.backends.cuda.matmul.allow_tf32 = not exact
    how = "torch.compile" if options["compile"] else "eager"
    return {"runtime": f"torch {torch.__version__} {how} {options['device']}", "device": device}


class Session:
    """An exported program; `channels_last` where an input has four dimensions and the program can."""

    note = ""

    def __init__(self, path: str, threads: int, options: dict[str, str]) -> None:
        import torch

        torch.set_num_threads(threads)
        program = torch.export.load(path)
        self.device = options["device"]
        self.module: Any = program.module().to(self.device)
        self.call = torch.compile(self.module, dynamic=False) if options["compile"] else self.module
        given = set(program.graph_signature.user_inputs)
        values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
        self.inputs = [
            (
                str(i),
                str(value.dtype).split(".")[1],
                [size if isinstance(size, int) else str(size) for size in value.shape],
            )
            for i, value in enumerate(values)
        ]
        kinds = {str(x.dtype).split(".")[1] for x in self.module.parameters() if x.is_floating_point()}
        self.precision = "+".join(sorted(kinds)) or "float32"
        if self.device == "cuda" and options["precision"] == "native":
            self.precision += " with TF32"

    def bind(self, feeds: dict[str, Any]) -> None:
        import torch

        self.args = [torch.from_numpy(feed).to(self.device) for feed in feeds.values()]
        self.unproven = any(x.ndim == 4 for x in self.args)
        if self.unproven:
            self.lay_out(torch.channels_last)

    def lay_out(self, layout: Any) -> None:
        import torch

        self.note = str(layout).split(".")[1]
        self.module.to(memory_format=layout)
        self.args = [x.contiguous(memory_format=layout if x.ndim == 4 else torch.contiguous_format) for x in self.args]

    def once(self) -> Any:
        """One run; the first finds out whether the program holds in channels_last: some views do not."""
        import torch

        if not self.unproven:
            return self.call(*self.args)
        self.unproven = False
        try:
            return self.call(*self.args)
        except RuntimeError as error:
            if "view" not in str(error):
                raise
            self.lay_out(torch.contiguous_format)
            return self.call(*self.args)

    def run(self, num_runs: int) -> None:
        import torch

        with torch.no_grad():
            for _ in range(num_runs):
                self.once()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def outputs(self) -> list[Any]:
        import torch
        from torch.utils import _pytree as pytree

        with torch.no_grad():
            values = pytree.tree_leaves(self.once())
        return [
            value.detach().float().cpu().contiguous().numpy() for value in values if isinstance(value, torch.Tensor)
        ]


def load(path: str, threads: int, batch_size: int, options: dict[str, str]) -> Session:
    return Session(path, threads, options)
