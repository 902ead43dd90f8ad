"""Peak memory of a call, measured in another process."""

import sys

import pytest
import torch

from objslot.benchmarks import memory, registry

CPU = torch.device("cpu")
RECORD = {"dtype": "float32", "threads": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_pass_holds_its_result_and_little_else():
    operation, sizes = registry.OPERATIONS["sinkhorn"], (8, 512, 512, 3)
    matrix = 4 * 8 * 512 * 512
    with memory.Measurer(CPU) as measurer:
        ours, eager, failed = (
            measurer.peak(operation, sizes, RECORD, name, "forward")
            for name in ("objslot", "log domain, eager", "no such peer")
        )
        again = measurer.peak(operation, sizes, RECORD, "objslot", "forward")
    assert matrix <= ours <= 4 * matrix
    # The logits, a temporary and the plan at least.
    assert eager >= 2.5 * matrix and eager > ours
    assert failed is None
    assert again == pytest.approx(ours, rel=0.2)
