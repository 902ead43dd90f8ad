"""The CUDA kernels on the CPU under sanitizers: no race between threads, no access out of bounds; and broken ones.

To ThreadSanitizer every CUDA thread is a thread that only CUDA's barriers order, so a race is seen whatever the order.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import building

# ThreadSanitizer of older compilers cannot start where the addresses of a process are drawn from too wide a range.
FIXED_ADDRESSES = [] if shutil.which("setarch") is None else ["setarch", "-R"]
# A file, what it says, the finding where it says something else, and what that is.
BROKEN = {
    "columns summed before they are there": (
        "sinkhorn.cuh", "if (lane == 0) board.gaps[warp] = gap;\n    __syncthreads();", "race",
        "if (lane == 0) board.gaps[warp] = gap;",
    ),
    "sums overwritten before they are read": (
        "sinkhorn.cuh", "// Nobody writes the sums anew before everybody has read them.\n    sync();", "race", "",
    ),
    "blocks of a cluster do not wait": (
        "sinkhorn.cuh", "cooperative_groups::this_cluster().sync();\n      return;", "race", "",
    ),
    "exact columns joined before they are there": (
        "sinkhorn_forward.cu", "board.tops[team.warp][team.lane + lanes * k] = top[k];\n  }\n  __syncthreads();",
        "race", "board.tops[team.warp][team.lane + lanes * k] = top[k];\n  }",
    ),
    "all rows in one place": (
        "sinkhorn_backward.cu", "start_f[row] = total + start;", "race", "start_f[0] = total + start;",
    ),
    "a barrier that half of the threads miss": (
        "sinkhorn.cuh", "board.gap = sum;\n    }\n    sync();", "do not meet",
        "board.gap = sum;\n    }\n    if (threadIdx.x % 2) __syncthreads(); else sync();",
    ),
    "a row beyond the shared memory": (
        "sinkhorn.cuh", "held[row * p.m + j] =", "beyond its shared memory", "held[(row + 1) * p.m + j] =",
    ),
}  # fmt: skip

pytestmark = pytest.mark.skipif(building.COMPILER is None, reason="needs g++")


def run(program, orders):
    return subprocess.run([*FIXED_ADDRESSES, program, str(orders)], capture_output=True, text=True)


def built(folder, sanitizer, **sources):
    try:
        return building.driver(folder, sanitizer, **sources)
    except AssertionError as error:
        if "san" not in str(error) or "cannot find" not in str(error):
            raise
        pytest.skip(f"this compiler has no sanitizer: {error}")


@pytest.mark.parametrize(
    ("sanitizer", "orders"), [("thread", 1), pytest.param("address,undefined", 4, marks=pytest.mark.slow)]
)
def test_nothing_is_found(tmp_path, sanitizer, orders):
    done = run(built(tmp_path, sanitizer), orders)
    assert done.returncode == 0, done.stderr[-4000:]


# The others take ten seconds each.
USUAL = ("columns summed before they are there", "a barrier that half of the threads miss")


@pytest.mark.parametrize(
    "broken", [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in BROKEN]
)
def test_a_broken_kernel_is_found(tmp_path, broken):
    name, old, finding, new = BROKEN[broken]
    sources = tmp_path / "cuda"
    shutil.copytree(building.CUDA, sources)
    text = (sources / name).read_text()
    assert text.count(old) == 1
    (sources / name).write_text(text.replace(old, new))
    done = run(built(tmp_path, "thread" if finding == "race" else "", sources=sources), 1)
    assert done.returncode != 0 and finding in done.stderr, (done.returncode, done.stderr[-2000:])
