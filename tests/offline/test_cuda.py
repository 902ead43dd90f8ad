"""Every CUDA file compiles for sm_80 and sm_90 without a warning, and its kernels spill no register."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compiled(source, architecture, target):
    command = [
        *("nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={architecture}", "-Werror", "all-warnings"),
        *("-Xptxas", "-v", "-I", ROOT / "csrc" / "include", source, "-o", target),
    ]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_warnings_and_spills(source, architecture, tmp_path):
    done = compiled(source, architecture, tmp_path / "out.cubin")
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert spilled and set(spilled) == {"0"}, done.stderr


def test_a_warning_is_an_error(tmp_path):
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void kernel(float* x) { int unused; x[0] = 1.f; }\n")
    assert compiled(source, "sm_80", tmp_path / "out.cubin").returncode != 0
