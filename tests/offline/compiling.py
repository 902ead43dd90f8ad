"""Compiling Triton kernels for GPUs that are not there, exactly as the ops would launch them.

The host code of an op runs on meta tensors with its launches recorded; each record is then compiled for an
architecture, and the registers, spills and shared memory of the result are read from the machine code.
"""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

# Bytes of shared memory that one block may have.
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}
LAUNCH_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One kernel with the types of its arguments, its constants and its launch options."""

    kernel: JITFunction = field(compare=False)
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self):
        constants = ",".join(f"{key}={value}" for key, value in self.constants if value is not None)
        types = ",".join(sorted({kind[1:] for _, kind in self.signature if kind.startswith("*")}))
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}<{types}>({constants};{options})"


@dataclass
class Usage:
    """What one compiled kernel takes: registers of a thread, bytes of its stack and of shared memory."""

    registers: int
    stack: int
    spilled: int
    shared: int


@contextmanager
def recorded(launches: list[Launch]):
    """Collect the launches of Triton kernels in `launches` instead of making them."""

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append(_launch(kernel, args, kwargs))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = original


def _launch(kernel, args, kwargs) -> Launch:
    options = tuple((key, kwargs.pop(key)) for key in LAUNCH_OPTIONS if key in kwargs)
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants = [], []
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            constants.append((parameter.name, value))
        else:
            kind = parameter.annotation_type or mangle_type(value)
            signature.append((parameter.name, kind))
    name = ".".join((*kernel.__module__.split(".")[-2:-1], kernel.__name__))
    return Launch(kernel, name, tuple(signature), tuple(constants), options)


def compile_for(launch: Launch, architecture: str) -> Usage:
    """Compile `launch` for "sm_80", "sm_90" or "gfx942"."""
    names = launch.kernel.arg_names
    constants = dict(launch.constants)
    signature = {name: "constexpr" if name in constants else dict(launch.signature)[name] for name in names}
    # Every allocation of PyTorch starts at a multiple of 16 bytes.
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(launch.kernel, signature, constants, aligned)
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    with _as_if_on(amd):
        compiled = triton.compile(source, target=target, options=dict(launch.options))
    usage = _amd_usage(compiled.asm["amdgcn"]) if amd else _nvidia_usage(compiled.asm["cubin"])
    return Usage(*usage, compiled.metadata.shared)


@contextmanager
def _as_if_on(amd: bool):
    """Host code asks PyTorch which vendor's GPUs it was built for."""
    version = torch.version.hip
    torch.version.hip = "offline" if amd else None
    try:
        yield
    finally:
        torch.version.hip = version


def launches_of(calls, *, amd: bool) -> list[Launch]:
    """The distinct launches that `calls` make; each call is a function without arguments."""
    found: list[Launch] = []
    with _as_if_on(amd), recorded(found):
        for call in calls:
            call()
    return list(dict.fromkeys(found))


def _nvidia_usage(cubin: bytes) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr))
    # Nothing but spilled registers puts a Triton kernel's data on the stack or in local memory.
    stack = int(counts["STACK"])
    return int(counts["REG"]), stack, stack + int(counts["LOCAL"])


def _amd_usage(assembly: str) -> tuple[int, int, int]:
    def number(name):
        return max(map(int, re.findall(rf"\.{name}:\s*(\d+)", assembly)))

    # Scalar registers spill into lanes of vector registers, not into memory.
    return number("vgpr_count"), number("private_segment_fixed_size"), number("vgpr_spill_count")
