"""Lists the libraries of a wheel's compiled modules and refuses what a wheel must not carry or need.

Usage: wheel_libraries.py WHEEL. Needs readelf.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What every Linux has, and the OpenMP runtime, under the name that torch's own copy has.
ALLOWED = re.compile(r"lib(c|m|pthread|dl|rt|stdc\+\+|gcc_s|gomp)\.so\.\d+|ld-linux[-\w]*\.so\.\d+")


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [name for name in names if re.search(r"\.so(\.|$)", name)]
        assert any("_native" in name for name in libraries), "the wheel holds no compiled module"
        # A private copy of a runtime would lie beside the modules or in a folder of libraries.
        strangers = [name for name in libraries if not re.fullmatch(r"objslot/_(native|cuda)\.[\w.-]+\.so", name)]
        assert not strangers, f"the wheel brings libraries of its own: {strangers}"
        for name in libraries:
            archive.extract(name, folder)
            dynamic = subprocess.run(
                ["readelf", "-d", Path(folder) / name], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
            ).stdout
            needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
            print(f"{name}: {', '.join(needed)}")
            wrong = [library for library in needed if not ALLOWED.fullmatch(library)]
            assert not wrong, f"{name} needs {wrong}"
            assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic), f"{name} has a run path"
    print(f"{Path(wheel).name}: {len(names)} files")


if __name__ == "__main__":
    main(sys.argv[1])
