"""The hardware and software a number was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PACKAGES = ("sparsekit", "torch", "torchvision", "onnx", "onnxruntime", "numpy")
# The x86 and Arm instruction sets that decide which kernels a runtime picks.
_CPU_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    *("neon", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True)
class Environment:
    """Hardware and software of a run; neither host names nor paths.

    Attributes:
        packages: version by package name, None where the package is not installed.
        num_cores: cores this process may use.
        num_threads: torch's intra-op threads, None while torch is not imported.
        gpu: name of the first CUDA device; None without one, or while torch is not imported.
    """

    python: str
    packages: Mapping[str, str | None]
    os: str
    machine: str
    cpu: str
    cpu_flags: tuple[str, ...]
    num_cores: int
    num_threads: int | None
    gpu: str | None

    @classmethod
    def collect(cls) -> Environment:
        """This process's environment. Imports nothing, so that asking costs milliseconds."""
        torch = sys.modules.get("torch")
        cpu, cpu_flags = _cpu()
        return cls(
            python=platform.python_version(),
            packages={name: _version(name) for name in _PACKAGES},
            os=f"{platform.system()} {platform.release()}",
            machine=platform.machine(),
            cpu=cpu,
            cpu_flags=cpu_flags,
            num_cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
            num_threads=torch.get_num_threads() if torch else None,
            gpu=torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else None,
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, tuple[str, ...]]:
    """The processor's model name and which of `_CPU_FLAGS` it has; only Linux tells the flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = {key.strip(): text.strip() for key, _, text in (line.partition(":") for line in lines)}
    flags = pairs.get("flags", pairs.get("Features", "")).split()
    model = pairs.get("model name") or platform.processor() or platform.machine()
    return model, tuple(flag for flag in _CPU_FLAGS if flag in flags)
