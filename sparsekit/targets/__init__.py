"""What latency is measured on: a runtime, on a machine.

    onnxruntime[:PROVIDER]       ONNX Runtime, on the CPU unless another execution provider is named
    openvino[:DEVICE]            ONNX files in OpenVINO
    ncnn                         ONNX files in ncnn on the CPU, converted by pnnx
    torch[:compile][:cuda]       torch.export archives (.pt2) in PyTorch; `prepare` writes them
    executorch                   `.pte` programs, lowered to XNNPACK, on the CPU; `prepare` writes them
    ssh://[user@]host[:port]     another machine; `?runtime=` one of the above there (onnxruntime), `&python=` the
                                 interpreter there (python3), `&config=` an ssh configuration file

`?precision=native` at the end lets the runtime compute in what it likes; without it, it is held to float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import parse_qsl, urlsplit

from torch import Tensor, nn

from sparsekit.errors import MeasurementError, UsageError, nearest
from sparsekit.targets.conversion import to_executorch, to_ncnn, to_torch
from sparsekit.targets.machine import Here, Machine, Site
from sparsekit.targets.runtimes import Runtime, parse_runtime
from sparsekit.targets.ssh import Ssh
from sparsekit.targets.worker import Conditions, start

SUFFIXES = (".onnx", ".ncnn", ".pt2", ".pte")
# By the suffix of the file, what writes it from the network; all others come from the ONNX file.
WRITERS = {".pt2": to_torch, ".pte": to_executorch}
KEYS = ("precision",)
SSH_KEYS = ("precision", "runtime", "python", "config")


@dataclass(frozen=True)
class Target:
    """A runtime on a machine.

    Attributes:
        name: as the user wrote it.
    """

    name: str
    runtime: Runtime
    machine: Machine

    def fingerprint(self) -> dict[str, str]:
        """Device, runtime, versions and precision: equal where latencies may be compared. Starts a process there.

        Raises:
            MeasurementError: the runtime does not start there.
        """
        options = self.runtime.options
        with self.site([]) as site, start(self.name, site, [], Conditions(1, 1, None, options)) as worker:
            return {"runtime": worker.runtime, "precision": options["precision"], **worker.device}

    @contextmanager
    def site(self, files: Sequence[Path], batch_size: int = 1) -> Iterator[Site]:
        """Where workers can be started that run `files`; ONNX files are converted for runtimes that run others.

        Raises:
            MeasurementError: a file is none that this runtime runs, or cannot be converted; no machine answers.
        """
        with TemporaryDirectory(prefix="sparsekit-") as folder:
            made = [
                self._runnable(file, Path(folder, f"{i}{self.runtime.suffix}"), batch_size)
                for i, file in enumerate(files)
            ]
            with self.machine.site(self.runtime.script, made) as site:
                yield site

    def _runnable(self, file: Path, to: Path, batch_size: int) -> Path:
        if file.suffix == self.runtime.suffix or file.suffix not in SUFFIXES:
            return file  # of names that say nothing the runtime is the judge
        if (file.suffix, self.runtime.suffix) != (".onnx", ".ncnn"):
            raise MeasurementError(f"{file}: {self.name} runs {self.runtime.suffix} files")
        to_ncnn(file, to, batch_size, self.runtime.options["precision"])
        return to

    def prepare(self, network: nn.Module, example_inputs: tuple[Tensor, ...], onnx_path: Path, folder: Path) -> Path:
        """The file that this runtime runs for `network`: `onnx_path`, which holds it, or a new one in `folder`.

        A new one has the same stem: beside its ONNX file it is measured with its output error.

        Raises:
            ExportError: the network cannot be written for this runtime.
            MeasurementError: the ONNX file cannot be converted.
        """
        path = folder / f"{onnx_path.stem}{self.runtime.suffix}"
        if self.runtime.suffix not in WRITERS:
            return self._runnable(onnx_path, path, 1)
        WRITERS[self.runtime.suffix](network, example_inputs, path)
        return path


def parse_target(text: str) -> Target:
    """The target that `text` names.

    Raises:
        UsageError: a name or key that means nothing, with the nearest that does.
        MeasurementError: the runtime is not installed, with what to install.

    >>> parse_target("onnxruntime").runtime.options["precision"]
    'float32'
    >>> parse_target("ssh://pi@board:2222?precision=native").machine
    Ssh(destination='pi@board', port=2222, python='python3', config=None)
    """
    name, _, query = text.partition("?")
    remote = name.startswith("ssh://")
    known = SSH_KEYS if remote else KEYS
    keys = dict(parse_qsl(query, keep_blank_values=True))
    for key in keys:
        if key not in known:
            raise UsageError(f"target {text!r}: unknown key {key!r}{nearest(key, list(known))}")
    runtime = parse_runtime(keys.get("runtime", "onnxruntime") if remote else name, keys.get("precision", "float32"))
    if remote:
        return Target(text, runtime, _ssh(text, name, keys))
    runtime.check()
    return Target(text, runtime, Here())


def _ssh(text: str, url: str, keys: Mapping[str, str]) -> Ssh:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"target {text!r}: {error}") from None
    if not parts.hostname or parts.path or parts.fragment or parts.password:
        raise UsageError(f"target {text!r}: expected ssh://[user@]host[:port]")
    # As it was written: a Host of the ssh configuration may have capitals.
    destination = parts.netloc if port is None else parts.netloc.rpartition(":")[0]
    return Ssh(destination.replace("[", "").replace("]", ""), port, keys.get("python", "python3"), keys.get("config"))
