"""Building and installing: what is shipped, a second build, no compiler, CUDA sources that do not compile."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (
    "objslot",
    "csrc",
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
# The environment's own tools first: the build must find the cmake and the ninja installed beside the tests.
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture
def tree(tmp_path):
    """A clean copy of the sources."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, target)
    return target


def build(tree, kind, **variables):
    """Build a "wheel" or an "sdist" the way pip does; returns its path and what the build printed."""
    code = f"import setuptools.build_meta as backend; print(backend.build_{kind}('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, "PATH": TOOLS, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return tree / "dist" / done.stdout.split()[-1], done.stdout


def modules(wheel):
    """The compiled modules in the wheel, without their tags."""
    names = zipfile.ZipFile(wheel).namelist()
    return sorted(Path(name).name.split(".")[0] for name in names if name.endswith((".so", ".pyd")))


def test_the_source_distribution_has_all_that_a_build_needs(tree):
    archive, _ = build(tree, "sdist")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    for folder in ("csrc", "objslot"):
        sources = [path for path in (tree / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert {str(path.relative_to(tree)) for path in sources} <= names
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"} <= names


def test_without_a_compiler_it_installs_says_so_and_computes(tree, tmp_path):
    wheel, output = build(tree, "wheel", CC="/bin/false", CXX="/bin/false")
    assert modules(wheel) == []
    assert output.count("objslot will run on its slower reference backend") == 1
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import torch, objslot\n"
        "for _ in range(2): plan = objslot.sinkhorn(torch.zeros(2, 3))\n"
        "print(objslot.__file__, round(plan.sum().item(), 3))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "site" / "objslot" / "__init__.py"), "1.0"]
    assert done.stderr.count("RuntimeWarning: objslot runs on its slower reference backend") == 1


@pytest.fixture
def small_tree(tree):
    """`tree` without its kernels: a module that links in seconds and is not loaded."""
    for path in (tree / "csrc" / "cpu").glob("*.kernel.cpp"):
        path.unlink()
    return tree


@pytest.mark.slow
def test_a_second_build_survives_the_tools_of_the_first(small_tree, tmp_path):
    ninja = shutil.which("ninja", path=TOOLS)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ninja").symlink_to(ninja)
        wheel, _ = build(
            small_tree, "wheel", PATH=f"{tmp_path / name}{os.pathsep}{TOOLS}", CUDACXX="/bin/false"
        )
        assert modules(wheel) == ["_native"]
        shutil.rmtree(tmp_path / name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_sources_that_do_not_compile_are_left_out(small_tree):
    (small_tree / "csrc" / "cuda").mkdir(exist_ok=True)
    (small_tree / "csrc" / "cuda" / "broken.cu").write_text("this is not CUDA\n")
    wheel, output = build(small_tree, "wheel")
    assert modules(wheel) == ["_native"]
    assert "objslot._cuda does not compile and is left out" in output
