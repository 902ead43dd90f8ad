"""Every Triton kernel compiles for GPUs of both vendors, spills no register and fits their shared memory.

Needs neither a GPU nor a driver. Runs where the folder is named: pytest tests/offline [--slow].
"""

import multiprocessing
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

import calls
import compiling

# Enough for the slowest kernel beside as many compilers as there are cores.
LONGEST_COMPILE = 240


def _cases():
    for amd in (False, True):
        for op in calls.OPS:
            reduced = compiling.launches_of((call for usual, call in op() if usual), amd=amd)
            every = compiling.launches_of((call for _, call in op()), amd=amd)
            for launch in dict.fromkeys(reduced + every):
                marks = () if launch in set(reduced) else (pytest.mark.slow,)
                for architecture in ("gfx942",) if amd else ("sm_80", "sm_90"):
                    yield pytest.param(launch, architecture, marks=marks, id=f"{architecture}-{launch}")


CASES = list(_cases())


def _compile(case):
    return compiling.compile_for(*CASES[case].values)


@pytest.fixture(scope="session")
def usage(request):
    """The compiled results by launch and architecture; all that are asked for compile beside each other."""
    places = {case.values: place for place, case in enumerate(CASES)}
    asked = [item.callspec.params for item in request.session.items if "launch" in getattr(item, "fixturenames", ())]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        yield {
            (entry["launch"], entry["architecture"]): pool.apply_async(
                _compile, (places[entry["launch"], entry["architecture"]],)
            )
            for entry in asked
            if not _skipped(request.session, entry)
        }


def _skipped(session, entry):
    case = next(case for case in CASES if case.values == (entry["launch"], entry["architecture"]))
    return bool(case.marks) and not session.config.getoption("--slow")


@pytest.mark.parametrize(("launch", "architecture"), CASES)
def test_compiles_without_spills(launch, architecture, usage):
    found = usage[launch, architecture].get(timeout=LONGEST_COMPILE * len(usage))
    assert (found.spilled, found.stack) == (0, 0), found
    assert found.shared <= compiling.SHARED_MEMORY[architecture], found


def test_a_kernel_that_spills_is_seen():
    launch = compiling.launches_of([calls.too_large], amd=False)[0]
    assert compiling.compile_for(launch, "sm_80").spilled > 0
