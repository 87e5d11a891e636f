"""`.pte` programs in ExecuTorch, lowered to XNNPACK. Run by latency_worker.py; needs numpy, torch and executorch.

Options: none but `precision`, which changes nothing: what a program computes in was decided when it was written.
"""

from __future__ import annotations

from typing import Any

# torch's numbers of its scalar types.
TYPES = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}


def describe(options: dict[str, str]) -> dict[str, Any]:
    from importlib.metadata import version

    import executorch.runtime  # noqa: F401

    return {"runtime": f"executorch {version('executorch')} XNNPACK"}


class Session:
    """A loaded program."""

    precision, note = "float32", ""

    def __init__(self, path: str, threads: int, options: dict[str, str]) -> None:
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        # It has no other way to set the number of threads, and nothing runs yet.
        portable_lib._unsafe_reset_threadpool(threads)
        self.program = Runtime.get().load_program(path)  # the method does not keep it alive
        self.method = self.program.load_method("forward")
        metas = [self.method.metadata.input_tensor_meta(i) for i in range(self.method.metadata.num_inputs())]
        self.inputs = [(str(i), TYPES[meta.dtype()], list(meta.sizes())) for i, meta in enumerate(metas)]

    def bind(self, feeds: dict[str, Any]) -> None:
        import torch

        self.args = [torch.from_numpy(feed) for feed in feeds.values()]

    def run(self, num_runs: int) -> None:
        for _ in range(num_runs):
            self.method.execute(self.args)

    def outputs(self) -> list[Any]:
        return [value.float().contiguous().numpy() for value in self.method.execute(self.args)]


def load(path: str, threads: int, batch_size: int, options: dict[str, str]) -> Session:
    return Session(path, threads, options)
