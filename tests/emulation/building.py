"""Compiles csrc/cuda for the CPU, with the stand-ins of this folder in place of CUDA's language and runtime."""

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
# A product and a sum are one operation, as nvcc makes them.
FUSED = ["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
COMPILER = shutil.which("g++")


def _object(source: Path, target: Path, *flags) -> subprocess.Popen:
    # Bindings do not get faster by it, and take three times as long to compile.
    level = "-O1" if source.suffix == ".cu" else "-O0"
    command = [COMPILER, "-std=c++17", level, "-fPIC", *FUSED, *flags, "-c", "-x", "c++", source, "-o", target]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)


def _finish(processes):
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def compiled(folder: Path, architecture: int, last: Path, name: str, flags=(), link=(), sources: Path = CUDA) -> Path:
    """The kernels of `sources` for `architecture` (800, 900), the fibers and the file `last`, linked as `name`."""
    # Modules for two architectures live in one process: their types and names differ.
    kernel = [
        f"-D__CUDA_ARCH__={architecture}", f"-Dcuda=cuda_{architecture}", f"-D_cuda=_cuda_{architecture}",
        "-include", HERE / "device.cuh", "-I", HERE / "include", "-I", ROOT / "csrc" / "include", *flags,
    ]  # fmt: skip
    objects = {path.stem: folder / f"{path.stem}.o" for path in (*sorted(sources.glob("*.cu")), last)}
    running = [
        _object(path, objects[path.stem], *kernel) for path in (*sorted(sources.glob("*.cu")), last)
    ]
    objects["fibers"] = folder / "fibers.o"
    running.append(
        _object(HERE / "fibers.cpp", objects["fibers"], "-D__CUDA_ARCH__=0", "-I", HERE / "include", "-Wall", "-Wextra")
    )
    _finish(running)
    target = folder / name
    done = subprocess.run(
        list(map(str, [COMPILER, *objects.values(), *flags, *link, "-o", target])), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return target


def module(folder: Path, architecture: int) -> Path:
    """The Python module objslot._cuda on the CPU, by the name _cuda_900 for architecture 900."""
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-fvisibility=hidden", *(word for path in includes for word in ("-I", path))]
    return compiled(folder, architecture, CUDA / "module.cpp", f"_cuda_{architecture}.so", flags, ["-shared"])


def driver(folder: Path, sanitizer: str, sources: Path = CUDA) -> Path:
    """The program of driver.cpp for sm_90, under "thread", "address,undefined" or "" for none."""
    flags = ["-g1"] + ([f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else [])
    return compiled(folder, 900, HERE / "driver.cpp", "driver", flags, sources=sources)


def board_bytes() -> int:
    """Bytes of shared memory that a block takes besides rows of the matrix."""
    side, warps = 256, 16
    return 4 * (2 * warps * side + 2 * side + warps + 1 + 2 * side + side)
