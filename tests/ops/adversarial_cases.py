"""One call of every op on every backend, and how two results of it are compared."""

import pytest
import torch
from op_cases import OPS, make

from objslot.ops import _backends

ROWS = {"sinkhorn_potentials": "sinkhorn"}
BACKENDS = [
    (op, backend)
    for op in OPS
    for backend in ("reference", "cpu")
    if backend in _backends.registered()[ROWS.get(op, op)]
]
EVERY = pytest.mark.parametrize(("op", "backend"), BACKENDS)
OPTIONS = {"propagate": {"radius": 3, "topk": 5, "temperature": 0.2}}


def case(op, dtype=torch.float32, batch=(3,), sizes=(17, 33, 7, 5, 2), seed=3, layout="contiguous", **options):
    return make(
        op, batch, sizes, "normal", ("normal", "normal"), [layout] * 5, dtype, seed, **OPTIONS.get(op, {}), **options
    )


def clones(inputs):
    return [None if x is None else x.clone() for x in inputs]


def assert_same(found, wanted):
    for place, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=f"result {place}")


def assert_alike(op, backend, found, wanted):
    """To the bit, but for what PyTorch's own products have a part in: they depend on layout and threads."""
    if backend == "cpu" and op != "propagate":
        return assert_same(found, wanted)
    for place, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        half = mine.dtype in (torch.float16, torch.bfloat16)
        # Of the largest entry: a gradient of small entries is the difference of large ones.
        size = theirs[theirs.isfinite()].abs().max().item() if theirs.numel() else 0.0
        close = {"rtol": 0, "atol": (1e-2 if half else 1e-5) * size + 1e-7}
        torch.testing.assert_close(
            mine, theirs, equal_nan=True, msg=lambda m, place=place: f"result {place}: {m}", **close
        )
