"""Compile a Triton kernel for GPUs that are not there, and say what the machine code needs.

Triton brings its assemblers along: neither a driver nor a CUDA toolkit is asked for.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default is about to change

CUDA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HIP = ("gfx90a", "gfx942", "gfx950")
# Bytes of shared memory that one block may have.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one GPU.

    Attributes:
        text: PTX, or AMD's assembly.
        registers: per thread.
        spilled: bytes of stack and local memory per thread, or registers on AMD.
        shared: bytes of shared memory per block.
    """

    text: str
    registers: int
    spilled: int
    shared: int

    @property
    def copies(self) -> list[int]:
        """Bytes of each asynchronous copy to shared memory in the PTX, sizes that are known there."""
        return [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x\w+|\d+)", self.text)]


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: str,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    unaligned: tuple[str, ...] = (),
) -> Compiled:
    """Compile `kernel`, a function under `triton.jit`.

    Args:
        signature: types of the arguments that are not constexpr, like {"x": "*fp16", "n": "i32"}.
        constants: the constexpr arguments.
        arch: one of `CUDA` or `HIP`.
        unaligned: pointers and sizes that are not multiples of 16, as Triton specialises them; all others are.
    """
    names = list(signature)
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    order = kernel.arg_names
    attrs = {
        (order.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name not in unaligned and signature[name].startswith(("*", "i"))
    }
    source = ASTSource(kernel, {name: types[name] for name in order}, dict(constants), attrs)
    cuda = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if cuda else GPUTarget("hip", arch, 64)
    binary = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    shared = int(binary.metadata.shared)
    if not cuda:
        text = str(binary.asm["amdgcn"])
        count = {key: int(found) for key, found in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return Compiled(text, count["vgpr_count"], count["vgpr_spill_count"], shared)
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(str(binary.asm["ptx"]), found["REG"], found["STACK"] + found["LOCAL"], shared)
