"""The ops on interpreted Triton kernels, called as users call them, on drawn shapes, layouts, values and options."""

import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytest.importorskip("triton")

from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_cases import OPS, check_error
from test_properties import ROWS, cases, clear_choice

from objslot.ops import _backends, _triton

# Small, for the interpreter takes a third of a millisecond to start a kernel.
SIZES = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 33])
WIDTHS = st.sampled_from([1, 2, 3, 8, 16, 17])
PACKAGES = {"sinkhorn_transport": "transport"}
DRAWN = [op for op in OPS if "triton" in _backends.registered()[ROWS.get(op, op)]]


@pytest.fixture(autouse=True, scope="module")
def tensors_of_the_cpu_are_served():
    """The interpreter computes where NumPy does."""
    patch = pytest.MonkeyPatch()
    for op in {ROWS.get(op, op) for op in DRAWN}:
        kernels = _triton.kernels(f"objslot.ops.{PACKAGES.get(op, op)}")
        row = (lambda device, kernels=kernels, **facts: kernels.why_not(**facts), False)
        patch.setitem(_backends._rows[op], "triton", row)
    yield
    patch.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", DRAWN)
@settings(max_examples=max(10, settings.default.max_examples // 10), phases=[Phase.generate])
@given(data=st.data())
def test_as_near_to_float64_as_plain_pytorch(op, dtype, data):
    case = data.draw(cases(op, dtype, SIZES, WIDTHS))
    if op == "propagate":
        assume(clear_choice(case))
    # What transport loses at a smaller one is among the README's caveats, and held in test_transport.py.
    assume(op != "sinkhorn_transport" or case.options["eps"] > 1e-3)
    check_error(case, dtype, "triton")
