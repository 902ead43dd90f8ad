"""Builds the compiled modules with CMake. Without a working compiler the package installs all the same."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Each extension is a CMake target of its name; one that does not build is left out with a warning."""

    def run(self):
        try:
            self._configure()
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            self.warn(f"no compiled module: {error}; objslot will run on its slower reference backend")
            return
        super().run()

    def build_extension(self, extension):
        target = extension.name.rpartition(".")[2]
        if target == "_cuda" and not self._has_target(target):
            return
        try:
            self._cmake("--build", self._folder, "--target", target)
        except subprocess.CalledProcessError as error:
            self.warn(f"{extension.name} does not compile and is left out: {error}")
            return
        path = Path(self.get_ext_fullpath(extension.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._folder / path.name, path)

    @property
    def _folder(self):
        # Fixed, so that the next build, editable ones included, compiles only what changed.
        return ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    def _configure(self):
        import pybind11

        ninja = shutil.which("ninja")
        if ninja is None:
            raise OSError("ninja was not found")
        arguments = [
            *("-S", ROOT, "-B", self._folder, "-G", "Ninja"),
            # A cache from an isolated build names the tools of an environment that is gone.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        try:
            self._cmake(*arguments, "-DOBJSLOT_CUDA=ON")
        except subprocess.CalledProcessError:
            self._cmake(*arguments, "-DOBJSLOT_CUDA=OFF")

    def _has_target(self, target):
        listed = subprocess.run(
            ["cmake", "--build", self._folder, "--target", "help"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return any(line.startswith(f"{target}:") for line in listed.stdout.splitlines())

    def _cmake(self, *arguments):
        subprocess.run(["cmake", *map(str, arguments)], check=True)


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in ("objslot._native", "objslot._cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
