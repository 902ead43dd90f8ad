"""The compiled module: its instruction sets, its libraries, and the symbols of its kernel files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from objslot.ops import _native

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("base", "avx2", "avx512")

native = _native.load()
pytestmark = pytest.mark.skipif(native is None, reason="the compiled module was not built")


def active_isa(wanted):
    code = "from objslot import _native; print(_native.isa())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OBJSLOT_ISA": wanted},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_can_be_forced_or_says_why_not(level):
    done = active_isa(level)
    if LEVELS.index(level) <= LEVELS.index(native.best_isa()):
        assert done.stdout.strip() == level
    else:
        assert f"ValueError: OBJSLOT_ISA: expected at most {native.best_isa()}" in done.stderr


def test_the_best_level_is_the_default_and_nonsense_is_refused():
    assert active_isa("").stdout.strip() == native.best_isa()
    assert "ValueError: OBJSLOT_ISA: expected base, avx2 or avx512, got sse9" in active_isa("sse9").stderr


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_openmp_runtime_is_shared_with_torch():
    dynamic = subprocess.run(
        ["readelf", "-d", native.__file__],
        capture_output=True,
        text=True,
        check=True,
        env={"LC_ALL": "C", **os.environ},
    ).stdout
    runtimes = re.findall(r"NEEDED.*\[(lib(?:g|i)?omp[^]]*)\]", dynamic)
    assert set(runtimes) <= {"libgomp.so.1", "libomp.so", "libomp.so.5"}
    assert not re.search(r"RPATH|RUNPATH|libtorch|libpython", dynamic)
    # In a process of its own: other packages of the tests may bring a runtime of theirs.
    code = "from objslot.ops import _native; assert _native.load(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len({line.split()[-1] for line in maps.splitlines() if "gomp" in line}) == 1


def kernel_objects(tmp_path):
    """The folder of the object files: those of the last build where they are current, else new ones."""
    newest = max(path.stat().st_mtime for path in [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")])
    for build in (ROOT / "build").glob("cmake-*"):
        objects = list(build.glob("CMakeFiles/kernels_*.dir/**/*.o"))
        if objects and min(path.stat().st_mtime for path in objects) > newest:
            return build / "CMakeFiles"
    import pybind11

    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DOBJSLOT_CUDA=OFF"]
    settings = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in ([*configure, *settings], ["cmake", "--build", tmp_path, "--target", "_native"]):
        subprocess.run(command, check=True, env={**os.environ, "PATH": tools})
    return tmp_path / "CMakeFiles"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nm") and shutil.which("c++")), reason="needs a compiler and nm")
def test_kernel_files_leave_nothing_that_another_file_could_link_against(tmp_path):
    folder = kernel_objects(tmp_path)
    sources = {path.name for path in (ROOT / "csrc" / "cpu").glob("*.kernel.cpp")}
    for level in LEVELS if native.best_isa() != "base" else LEVELS[:1]:
        objects = list((folder / f"kernels_{level}.dir").rglob("*.o"))
        assert {path.stem for path in objects} == sources
        for path in objects:
            symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
            # Upper case is global, v and w are weak; DW.ref is a pointer of the exception tables, not code.
            shared = re.findall(r"^\S+ [A-TV-Zuvw] (?!DW\.ref\.)(.*)$", symbols, flags=re.MULTILINE)
            leaked = [name for name in shared if f"::{level}::" not in name and "objslot::table<" not in name]
            assert not leaked, f"{path.name} compiled for {level} leaks {leaked}"
            assert len(shared) > len(leaked), f"{path.name} hands out no table"
