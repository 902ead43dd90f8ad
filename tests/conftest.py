"""Settings for every test: the installed package is tested, nothing is downloaded, random numbers repeat."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# `python -m pytest` puts the checkout first on the path, where objslot has no compiled module: drop it, here
# and in every Python that a test starts, so that the installed package is the one under test.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "default", max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=1000, derandomize=False)
settings.load_profile("default")


if find_spec("objslot") is None:
    pytest.exit("objslot is not installed here: pip install '.[test]'", returncode=2)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--nightly", action="store_true", help="run every test, and each property on thousands of cases")


def pytest_configure(config):
    if config.getoption("--nightly"):
        settings.load_profile("nightly")


def pytest_ignore_collect(collection_path, config):
    # Triton reads TRITON_INTERPRET once, at import: interpreted kernels are tested in a process of their own.
    if collection_path == ROOT / "tests" / "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        return True
    # Compiling kernels for GPUs takes minutes: only where it is asked for by the name of its folder.
    if collection_path == ROOT / "tests" / "offline":
        return not any(collection_path in (path := Path(arg.split("::")[0]).resolve(), *path.parents)
                       for arg in config.args)
    return None


def pytest_collection_modifyitems(config, items):
    skips = {
        "slow": None if config.getoption("--slow") or config.getoption("--nightly") else "slow: run with --slow",
        "nightly": None if config.getoption("--nightly") else "nightly: run with --nightly",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
    }
    for item in items:
        for marker, reason in skips.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
