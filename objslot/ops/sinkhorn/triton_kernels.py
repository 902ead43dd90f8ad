"""Sinkhorn on GPUs by Triton: potentials in base 2, exact at any eps, float32 arithmetic or float64.

One program holds whole rows of a matrix, so one pass over the matrix serves the rows and the columns: a row's
potential is set from the tile, and the columns collect their sums of the same tile, each relative to its largest
term so far. A matrix of at most RESIDENT a side stays in registers over all iterations. With a large batch one
program makes all iterations of a matrix, and reads it from the second-level cache again; otherwise `shares`
programs divide the rows, and a second kernel joins what their columns collected.

Deterministic: no atomics, and a fixed order of every sum.
"""

import math

import torch
import triton
import triton.language as tl

from objslot.ops._arithmetic import compute_dtype
from objslot.ops.sinkhorn.triton_backward import _gradient, _products, _undo
from objslot.ops.sinkhorn.triton_forward import _finish, _set_columns, _solve, _sweep

RESIDENT = 64
# A row of more spills registers.
MOST_COLUMNS, MOST_WIDE_COLUMNS = 4096, 2048
# Batches that occupy the GPU with one program for each matrix.
LARGE_BATCH = 96
# Numbers that a tile holds.
TILE = 4096
# Programs for one matrix, and the rows that one of them has at least.
MOST_SHARES = 256
# Columns that a program joins the sums of.
JOINED = 128

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


def why_not(*, m, dtype=None, started=False, **facts) -> str | None:
    """Why these kernels cannot serve a call on a CUDA tensor, or None."""
    if started:
        return "starts from potentials of zero only"
    most = MOST_WIDE_COLUMNS if dtype == torch.float64 else MOST_COLUMNS
    return None if m <= most else f"holds whole rows of at most {most} columns, got {m}"


def _element(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def shape_of_program(n: int, m: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps."""
    columns = max(16, triton.next_power_of_2(m))
    rows = max(1, TILE // columns // (2 if dtype == torch.float64 else 1))
    rows = min(rows, max(4, triton.next_power_of_2(n)))
    return rows, columns, 8 if rows * columns > TILE // 2 else 4


def shape_of_solver(n: int, m: int, dtype: torch.dtype) -> tuple[int, int, int, bool]:
    """Rows and columns of a tile and warps where one program makes all iterations, and if the tile stays there."""
    rows, columns, warps = shape_of_program(n, m, dtype)
    if n <= rows and max(n, m) <= RESIDENT:
        return rows, columns, warps, True
    # The three passes over the tiles hold addresses of their own: a full tile spills a few registers.
    rows = max(1, rows // 2)
    return rows, columns, 8 if rows * columns * compute_dtype(dtype).itemsize > 2 * TILE else 4, False


def shares_of_matrix(batch: int, n: int, rows: int) -> int:
    """Programs that divide the rows of one matrix: none where the batch occupies the GPU by itself."""
    if batch >= LARGE_BATCH:
        return 1
    return max(1, min(triton.cdiv(n, rows), MOST_SHARES // max(1, batch)))


def _flat(tensor, trailing):
    batch = math.prod(tensor.shape[: tensor.dim() - trailing])
    return tensor.reshape(batch, *tensor.shape[tensor.dim() - trailing :])


def _masses_of(mass):
    """A marginal with one batch dimension, its entries beside each other, and the stride of the batch."""
    if mass is None:
        return None, 0
    mass = _flat(mass, 1)
    mass = mass if mass.stride(-1) == 1 else mass.contiguous()
    return mass, mass.stride(0)


def forward(scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error):
    """The results of the op by name; None for what is not asked for. The history is in base 2."""
    *batch, n, m = scores.shape
    dtype = compute_dtype(scores.dtype)
    plan = scores.new_empty((*batch, n, m)) if store_plan else None
    scores = _flat(scores, 2)
    size = scores.shape[0]
    slots = n_iters if history else 2
    # The kernels of the CPU keep something else in a first slot.
    extra = int(history)
    history_f = scores.new_empty((extra + slots, size, n), dtype=dtype)
    history_g = scores.new_empty((slots, size, m), dtype=dtype)
    counts = scores.new_full((size,), n_iters, dtype=torch.int64)
    errors = scores.new_zeros((size,), dtype=dtype)
    if size:
        with torch.cuda.device_of(scores):
            errors = _solve_all(
                scores, a, b, eps, n_iters, tol, plan, history_f[extra:], history_g, counts, return_error
            )
    last = ((counts - 1) % slots).view(1, size, 1)

    def final(potentials):
        *_, size, length = potentials.shape
        return (potentials.gather(0, last.expand(1, size, length))[0] * LN_2).view(*batch, length)

    return {
        "plan": plan,
        "f": None if store_plan else final(history_f[extra:]),
        "g": None if store_plan else final(history_g),
        "error": errors.view(batch) if return_error else None,
        "history_f": history_f.view(extra + slots, *batch, n) if history else None,
        "history_g": history_g.view(slots, *batch, m) if history else None,
        "count": counts.view(batch) if history else None,
    }


def _solve_all(scores, a, b, eps, n_iters, tol, plan, history_f, history_g, counts, return_error):
    """Fill the history, the counts and the plan; the marginal errors."""
    size, n, m = scores.shape
    a, a_stride = _masses_of(a)
    b, b_stride = _masses_of(b)
    rows, columns, warps = shape_of_program(n, m, scores.dtype)
    shares = shares_of_matrix(size, n, rows)
    scale, bound = LOG2_E / eps, 0.0 if tol is None else tol
    slots = history_g.shape[0]
    resident = False
    if shares == 1:
        rows, columns, warps, resident = shape_of_solver(n, m, scores.dtype)
    constants = {
        "ROWS": rows, "COLUMNS": columns, "HAS_A": a is not None, "D": _element(scores.dtype), "num_warps": warps,
    }  # fmt: skip
    has_b, early, store_plan = b is not None, tol is not None, plan is not None
    if shares == 1:
        errors = history_g.new_empty(size)
        _solve[size,](
            scores, a, b, plan, history_f, history_g, errors, counts, size, slots, n, m, n_iters,
            *scores.stride(), a_stride, b_stride, scale, bound, HAS_B=has_b, EARLY=early, STORE_PLAN=store_plan,
            NEEDS_ERROR=return_error, RESIDENT=resident, **constants,
        )  # fmt: skip
        return errors
    blocks = triton.cdiv(n, rows * shares)
    shares = triton.cdiv(n, rows * blocks)
    tops, totals = (history_g.new_empty(size, shares, m) for _ in range(2))
    gaps = history_g.new_empty(size, shares)
    for step in range(n_iters):
        first = step == 0
        _sweep[size, shares](
            scores, a, history_f, history_g, tops, totals, gaps, counts, step, size, slots, n, m, blocks,
            *scores.stride(), a_stride, scale, FIRST=first, EARLY=early, **constants,
        )  # fmt: skip
        _set_columns[size, triton.cdiv(m, JOINED)](
            b, history_g, tops, totals, gaps, counts, step, size, slots, shares, m, b_stride, bound,
            COLUMNS=JOINED, HAS_B=has_b, FIRST=first, EARLY=early, D=constants["D"],
        )  # fmt: skip
    blocks = triton.cdiv(n, rows)
    gaps = history_g.new_empty(size, blocks)
    if store_plan or return_error:
        _finish[size, blocks](
            scores, a, plan, history_f, history_g, gaps, counts, size, slots, n, m, *scores.stride(), a_stride,
            scale, STORE_PLAN=store_plan, NEEDS_ERROR=return_error, **constants,
        )  # fmt: skip
    return gaps.sum(1)


def backward(grad_plan, grad_f, grad_g, scores, a, b, start, plan, history_f, history_g, count, eps, n_iters, tol):
    """Gradients of scores, a and b; None for a marginal that was not given."""
    shape, dtype = scores.shape, history_g.dtype
    n, m = shape[-2:]
    scores = _flat(scores, 2)
    size = scores.shape[0]
    grad_scores = scores.new_empty(shape)
    if not size:
        return grad_scores, *(None if mass is None else mass.new_empty(mass.shape) for mass in (a, b))
    history_f, history_g = history_f[1:].reshape(n_iters, size, n), history_g.reshape(n_iters, size, m)
    rows, columns, warps = shape_of_program(n, m, scores.dtype)
    shares = shares_of_matrix(size, n, rows)
    blocks = triton.cdiv(n, rows * shares)
    shares = triton.cdiv(n, rows * blocks)
    constants = {"ROWS": rows, "COLUMNS": columns, "D": _element(scores.dtype), "num_warps": warps}
    scale = LOG2_E / eps
    start_f, start_g = (
        history_g.new_zeros(size, length) if grad is None else grad.reshape(size, length)
        for grad, length in ((grad_f, n), (grad_g, m))
    )
    # What no iteration writes is zero: an element may have made fewer of them.
    row_shares, factors = (history_g.new_zeros(n_iters, size, n) for _ in range(2))
    column_shares = history_g.new_zeros(n_iters, size, m)
    flat_a, a_stride = _masses_of(a)
    flat_b, b_stride = _masses_of(b)
    sums = history_g.new_empty(size, shares, m)
    with torch.cuda.device_of(scores):
        strides = (0, 0, 0)
        if grad_plan is not None:
            grad_plan = _flat(grad_plan, 2)
            strides = grad_plan.stride()
            row_sums = history_g.new_empty(size, n)
            _products[size, shares](
                grad_plan, scores, history_f, history_g, row_sums, sums, count,
                size, n, m, blocks, *scores.stride(), *strides, scale, **constants,
            )  # fmt: skip
            start_f, start_g = start_f + row_sums, start_g + sums.sum(1)
        start_f, start_g = start_f.contiguous(), start_g.contiguous()
        collected = start_g
        for step in reversed(range(n_iters)):
            _undo[size, shares](
                scores, flat_a, flat_b, history_f, history_g, start_f, start_g, collected, sums,
                row_shares, factors, column_shares, count, step, size, n, m, blocks, *scores.stride(),
                a_stride, b_stride, scale, HAS_A=a is not None, HAS_B=b is not None, **constants,
            )  # fmt: skip
            collected = sums[:, 0] if shares == 1 else sums.sum(1)
        tile = {"ROWS": min(rows, 32), "COLUMNS": min(columns, 128)}
        _gradient[size, triton.cdiv(n, tile["ROWS"]), triton.cdiv(m, tile["COLUMNS"])](
            scores, grad_plan, grad_scores, history_f, history_g, factors, column_shares, count,
            size, n, m, *scores.stride(), *strides, scale, HAS_GRADIENT=grad_plan is not None,
            **tile, D=constants["D"], num_warps=4,
        )  # fmt: skip
    return (
        grad_scores,
        None if a is None else row_shares.sum(0).view(a.shape).to(dtype),
        None if b is None else column_shares.sum(0).view(b.shape).to(dtype),
    )
