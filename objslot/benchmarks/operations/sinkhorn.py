"""Sinkhorn's algorithm on given scores."""

from collections.abc import Sequence

import torch

from objslot import ops
from objslot.benchmarks.peers import sinkhorn as peers
from objslot.benchmarks.problem import Operation, Problem, Work, generator, size_in_bytes, unit
from objslot.ops.sinkhorn import reference

EPS = 0.05
WIDTH = 64


def _scores(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Cosines of random tokens."""
    batch, rows, columns, _ = sizes
    source = generator(sizes)
    x, y = (unit(source, (batch, size, WIDTH), torch.device("cpu"), torch.float32) for size in (rows, columns))
    return (x @ y.mT).to(device, dtype)


def _plan(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    scores = _scores(sizes, device, dtype)
    settings = {"eps": EPS, "n_iters": sizes[3]}
    matrix = size_in_bytes(dtype, scores.shape)
    return Problem(
        tensors=(scores,),
        settings=settings,
        ours=lambda scores: ops.sinkhorn(scores, **settings),
        exact=lambda scores: reference.sinkhorn(scores, **settings)[0],
        plain=lambda scores: reference.sinkhorn(scores, **settings)[0],
        gradients=(0,),
        # Backward: the plan's gradient is read and that of the scores written; the plan itself stays.
        work=_work(2 * matrix, 5 * matrix, scores.numel(), sizes[3]),
    )


def _potentials(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    scores = _scores(sizes, device, dtype)
    settings = {"eps": EPS, "n_iters": sizes[3]}
    matrix = size_in_bytes(dtype, scores.shape)

    def definition(scores):
        found = reference.scalings(scores, None, None, **settings)
        return found.f[-1], found.g[-1]

    return Problem(
        tensors=(scores,),
        settings=settings,
        ours=lambda scores: ops.sinkhorn_potentials(scores, **settings),
        exact=definition,
        plain=definition,
        gradients=(0,),
        work=_work(matrix, 3 * matrix, scores.numel(), sizes[3]),
    )


def _work(forward: int, backward: int, entries: int, n_iters: int) -> Work:
    """Two multiply-adds for each entry and iteration, one exponential, and twice the sums backward."""
    flops = 4 * entries * n_iters
    return Work(forward, flops, entries, Work(backward, 3 * flops, entries))


AXES = ("batch", "rows", "columns", "iterations")

OPERATIONS = (
    Operation(
        name="sinkhorn",
        axes=AXES,
        build=_plan,
        peers=peers.PLANS,
        shapes=((48, 256, 256, 3), (48, 256, 256, 20), (8, 196, 196, 3), (1, 1620, 1620, 3), (1, 1620, 1620, 20)),
        quick=((8, 196, 196, 3), (48, 256, 256, 3)),
        scaling={
            "batch": tuple((batch, 256, 256, 3) for batch in (1, 4, 16, 64)),
            "rows": tuple((1, side, side, 3) for side in (64, 256, 1024, 2048, 4096)),
            "iterations": tuple((16, 256, 256, count) for count in (1, 4, 16, 64)),
        },
    ),
    Operation(
        name="sinkhorn_potentials",
        axes=AXES,
        build=_potentials,
        peers=peers.POTENTIALS,
        shapes=((48, 256, 256, 3),),
        quick=((8, 196, 196, 3),),
    ),
)
