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


@triton.jit
def _masses(masses, batch, stride, index, size, HAS: tl.constexpr, D: tl.constexpr):
    """The masses at `index`; nothing beyond `size`."""
    inside = index < size
    if HAS:
        mass = tl.load(masses + batch * stride + index, mask=inside, other=0.0).to(D)
    else:
        mass = tl.where(inside, tl.full((1,), 1.0, D) / size, tl.full((1,), 0.0, D))
    return mass


@triton.jit
def _logarithm(mass):
    return tl.where(mass == 0, float("-inf"), tl.log2(tl.where(mass == 0, 1.0, mass)))


@triton.jit
def _tile(scores, i, j, n, m, row_stride, column_stride, scale):
    """scores / eps in base 2; -inf beyond the matrix."""
    at = i[:, None].to(tl.int64) * row_stride + j[None, :].to(tl.int64) * column_stride
    tile = tl.load(scores + at, mask=(i < n)[:, None] & (j < m)[None, :], other=float("-inf"))
    return tile.to(scale.dtype) * scale


@triton.jit
def _largest(logits, AXIS: tl.constexpr):
    """The maximum, and 0 where there is nothing: so that nothing minus it is nothing again."""
    top = tl.max(logits, axis=AXIS)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _potential(log_mass, top, total):
    """log_mass - log2(total * 2^top); -inf where either has no mass."""
    nothing = (log_mass == float("-inf")) | (total == 0)
    log_total = tl.log2(tl.where(total == 0, 1.0, total)) + top
    return tl.where(nothing, float("-inf"), tl.where(nothing, 0.0, log_mass) - log_total)


@triton.jit
def _join(top, total, other_top, other_total):
    """Sums relative to 2^top and 2^other_top as one: its exponent and its sum."""
    largest = tl.where(other_top > top, other_top, top)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, total * tl.exp2(top - base) + other_total * tl.exp2(other_top - base)


@triton.jit
def _set_rows(logits, g, log_a):
    """Potentials of the rows, and the logarithm of what they summed up to before."""
    shifted = logits + g[None, :]
    top = _largest(shifted, 1)
    total = tl.sum(tl.exp2(shifted - top[:, None]), axis=1)
    return _potential(log_a, top, total), top, total


@triton.jit
def _collect_columns(logits, f):
    """Largest exponent and sum of every column of a tile."""
    shifted = logits + f[:, None]
    top = tl.max(shifted, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(tl.exp2(shifted - base[None, :]), axis=0)


@triton.jit
def _missing(mass, f, top, total):
    """|row sum of the plan - a|, from the sum relative to 2^top that the other potentials leave."""
    found = tl.where(f == float("-inf"), 0.0, tl.exp2(f + top) * total)
    return tl.abs(found - mass)


@triton.jit
def _solve(
    scores, a, b, plan, history_f, history_g, errors, counts,
    batches, slots, n, m, n_iters, batch_stride, row_stride, column_stride, a_stride, b_stride,
    scale: tl.float64, tol: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, EARLY: tl.constexpr,
    STORE_PLAN: tl.constexpr, NEEDS_ERROR: tl.constexpr, RESIDENT: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    # One program for a matrix. history_f (slots, batch, n) and history_g (slots, batch, m) have a slot for every
    # iteration or take turns.
    batch = tl.program_id(0).to(tl.int64)
    scores += batch * batch_stride
    scale = tl.full((1, 1), scale, D)
    tol = tl.full((1,), tol, D)
    j = tl.arange(0, COLUMNS)
    log_b = _logarithm(_masses(b, batch, b_stride, j, m, HAS_B, D))
    g = tl.where(j < m, tl.full((COLUMNS,), 0.0, D), float("-inf"))
    rows = tl.arange(0, ROWS)
    if RESIDENT:
        logits = _tile(scores, rows, j, n, m, row_stride, column_stride, scale)
        mass = _masses(a, batch, a_stride, rows, n, HAS_A, D)
        log_a = _logarithm(mass)
    f = tl.full((ROWS,), 0.0, D)
    if RESIDENT:
        blocks = 1
    else:
        blocks = (n + ROWS - 1) // ROWS
    count = 0
    more = n_iters > 0
    while more:
        slot = batch + (count % slots) * batches.to(tl.int64)
        top, total = tl.full((COLUMNS,), float("-inf"), D), tl.full((COLUMNS,), 0.0, D)
        if RESIDENT:
            f, row_top, row_total = _set_rows(logits, g, log_a)
            top, total = _collect_columns(logits, f)
            tl.store(history_f + slot * n + rows, f, mask=rows < n)
        else:
            for block in range(blocks):
                i = block * ROWS + rows
                logits = _tile(scores, i, j, n, m, row_stride, column_stride, scale)
                mass = _masses(a, batch, a_stride, i, n, HAS_A, D)
                log_a = _logarithm(mass)
                f, row_top, row_total = _set_rows(logits, g, log_a)
                block_top, block_total = _collect_columns(logits, f)
                top, total = _join(top, total, block_top, block_total)
                tl.store(history_f + slot * n + i, f, mask=i < n)
        g = _potential(log_b, tl.where(top == float("-inf"), 0.0, top), total)
        tl.store(history_g + slot * m + j, g, mask=j < m)
        count += 1
        more = count < n_iters
        if EARLY:
            tl.debug_barrier()
            gap = tl.full((1,), 0.0, D)
            for block in range(blocks):
                i = block * ROWS + rows
                if not RESIDENT:
                    logits = _tile(scores, i, j, n, m, row_stride, column_stride, scale)
                    mass = _masses(a, batch, a_stride, i, n, HAS_A, D)
                    log_a = _logarithm(mass)
                    f = tl.load(history_f + slot * n + i, mask=i < n, other=float("-inf"))
                next_f, row_top, row_total = _set_rows(logits, g, log_a)
                gap += tl.sum(_missing(mass, f, row_top, row_total), axis=0)
            more = more & (tl.sum(tl.where(gap > tol, 1, 0), axis=0) > 0)
    tl.store(counts + batch, count)
    if STORE_PLAN or NEEDS_ERROR:
        tl.debug_barrier()
        slot = batch + ((count - 1) % slots) * batches.to(tl.int64)
        gap = tl.full((1,), 0.0, D)
        for block in range(blocks):
            i = block * ROWS + rows
            if not RESIDENT:
                logits = _tile(scores, i, j, n, m, row_stride, column_stride, scale)
                mass = _masses(a, batch, a_stride, i, n, HAS_A, D)
                log_a = _logarithm(mass)
                f = tl.load(history_f + slot * n + i, mask=i < n, other=float("-inf"))
            if STORE_PLAN:
                value = tl.exp2(logits + f[:, None] + g[None, :])
                place = plan + (batch * n + block * ROWS) * m + rows[:, None] * m + j[None, :]
                tl.store(place, value.to(plan.dtype.element_ty), mask=(i < n)[:, None] & (j < m)[None, :])
            if NEEDS_ERROR:
                next_f, row_top, row_total = _set_rows(logits, g, log_a)
                gap += tl.sum(_missing(mass, f, row_top, row_total), axis=0)
        if NEEDS_ERROR:
            tl.store(errors + batch + tl.arange(0, 1), gap)


@triton.jit
def _sweep(
    scores, a, history_f, history_g, tops, totals, gaps, counts,
    step, batches, slots, n, m, blocks, batch_stride, row_stride, column_stride, a_stride, scale: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_A: tl.constexpr, FIRST: tl.constexpr, EARLY: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    # Iteration `step` on `blocks` tiles of rows: f, what the columns collect, and with EARLY the mass that the
    # rows missed after the iteration before.
    batch, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        if tl.load(counts + batch) <= step:
            return
    scores += batch * batch_stride
    scale = tl.full((1, 1), scale, D)
    j, rows = tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    slot = batch + (step % slots) * batches.to(tl.int64)
    before = batch + ((step + slots - 1) % slots) * batches.to(tl.int64)
    if FIRST:
        g = tl.where(j < m, tl.full((COLUMNS,), 0.0, D), float("-inf"))
    else:
        g = tl.load(history_g + before * m + j, mask=j < m, other=float("-inf"))
    top, total = tl.full((COLUMNS,), float("-inf"), D), tl.full((COLUMNS,), 0.0, D)
    gap = tl.full((1,), 0.0, D)
    for block in range(blocks):
        i = (share * blocks + block) * ROWS + rows
        logits = _tile(scores, i, j, n, m, row_stride, column_stride, scale)
        mass = _masses(a, batch, a_stride, i, n, HAS_A, D)
        log_a = _logarithm(mass)
        f, row_top, row_total = _set_rows(logits, g, log_a)
        block_top, block_total = _collect_columns(logits, f)
        top, total = _join(top, total, block_top, block_total)
        tl.store(history_f + slot * n + i, f, mask=i < n)
        if EARLY and not FIRST:
            earlier = tl.load(history_f + before * n + i, mask=i < n, other=float("-inf"))
            gap += tl.sum(_missing(mass, earlier, row_top, row_total), axis=0)
    place = batch * tl.num_programs(1) + share
    tl.store(tops + place * m + j, top, mask=j < m)
    tl.store(totals + place * m + j, total, mask=j < m)
    if EARLY and not FIRST:
        tl.store(gaps + place + tl.arange(0, 1), gap)


@triton.jit
def _set_columns(
    b, history_g, tops, totals, gaps, counts, step, batches, slots, shares, m, b_stride, tol: tl.float64,
    COLUMNS: tl.constexpr, HAS_B: tl.constexpr, FIRST: tl.constexpr, EARLY: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    if EARLY:
        if tl.load(counts + batch) <= step:
            return
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    top, total = tl.full((COLUMNS,), float("-inf"), D), tl.full((COLUMNS,), 0.0, D)
    gap = tl.full((1,), 0.0, D)
    for share in range(shares):
        place = batch * shares + share
        other_top = tl.load(tops + place * m + j, mask=j < m, other=float("-inf"))
        top, total = _join(top, total, other_top, tl.load(totals + place * m + j, mask=j < m, other=0.0))
        if EARLY and not FIRST:
            gap += tl.load(gaps + place + tl.arange(0, 1))
    log_b = _logarithm(_masses(b, batch, b_stride, j, m, HAS_B, D))
    g = _potential(log_b, tl.where(top == float("-inf"), 0.0, top), total)
    slot = batch + (step % slots) * batches.to(tl.int64)
    tl.store(history_g + slot * m + j, g, mask=j < m)
    if EARLY and not FIRST:
        # The iteration before was good enough: this one does not count.
        enough = (gap > tl.full((1,), tol, D)) == 0
        if tl.program_id(1) == 0:
            tl.store(counts + batch + tl.arange(0, 1), tl.full((1,), step, tl.int64), mask=enough)


@triton.jit
def _finish(
    scores, a, plan, history_f, history_g, gaps, counts,
    batches, slots, n, m, batch_stride, row_stride, column_stride, a_stride, scale: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_A: tl.constexpr, STORE_PLAN: tl.constexpr,
    NEEDS_ERROR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    batch, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = batch + ((tl.load(counts + batch) - 1) % slots) * batches.to(tl.int64)
    i, j = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    scale = tl.full((1, 1), scale, D)
    logits = _tile(scores + batch * batch_stride, i, j, n, m, row_stride, column_stride, scale)
    f = tl.load(history_f + slot * n + i, mask=i < n, other=float("-inf"))
    g = tl.load(history_g + slot * m + j, mask=j < m, other=float("-inf"))
    if STORE_PLAN:
        value = tl.exp2(logits + f[:, None] + g[None, :])
        place = plan + batch * n * m + i[:, None].to(tl.int64) * m + j[None, :]
        tl.store(place, value.to(plan.dtype.element_ty), mask=(i < n)[:, None] & (j < m)[None, :])
    if NEEDS_ERROR:
        mass = _masses(a, batch, a_stride, i, n, HAS_A, D)
        log_a = _logarithm(mass)
        next_f, top, total = _set_rows(logits, g, log_a)
        gap = tl.full((1,), 0.0, D) + tl.sum(_missing(mass, f, top, total), axis=0)
        tl.store(gaps + batch * tl.num_programs(1) + block + tl.arange(0, 1), gap)


@triton.jit
def _products(
    grad_plan, scores, history_f, history_g, row_sums, sums, counts,
    batches, n, m, blocks, batch_stride, row_stride, column_stride, grad_batch, grad_row, grad_column,
    scale: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Row sums of plan * grad_plan, and the column sums of `blocks` tiles of rows."""
    batch, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = batch + (tl.load(counts + batch) - 1) * batches.to(tl.int64)
    scores += batch * batch_stride
    grad_plan += batch * grad_batch
    scale = tl.full((1, 1), scale, D)
    j, rows = tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    g = tl.load(history_g + slot * m + j, mask=j < m, other=float("-inf"))
    total = tl.full((COLUMNS,), 0.0, D)
    for block in range(blocks):
        i = (share * blocks + block) * ROWS + rows
        logits = _tile(scores, i, j, n, m, row_stride, column_stride, scale)
        f = tl.load(history_f + slot * n + i, mask=i < n, other=float("-inf"))
        at = i[:, None].to(tl.int64) * grad_row + j[None, :].to(tl.int64) * grad_column
        upper = tl.load(grad_plan + at, mask=(i < n)[:, None] & (j < m)[None, :], other=0.0).to(D)
        product = tl.exp2(logits + f[:, None] + g[None, :]) * upper
        tl.store(row_sums + batch * n + i, tl.sum(product, axis=1), mask=i < n)
        total += tl.sum(product, axis=0)
    tl.store(sums + (batch * tl.num_programs(1) + share) * m + j, total, mask=j < m)


@triton.jit
def _two_plans(g, before, share):
    """Of the plans with the column potentials `g` and `before` what one exponential serves both with.

    The larger potentials, and the weights of the columns in the plan with `g`, times `share`, and in the other.
    """
    larger = tl.where(before > g, before, g)
    base = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, tl.exp2(g - base) * share, tl.exp2(before - base)


@triton.jit
def _potentials_of(history_g, step, batch, batches, j, m, D: tl.constexpr):
    """Column potentials after iteration `step` and before it: 0 before the first."""
    g = tl.load(history_g + (step * batches.to(tl.int64) + batch) * m + j, mask=j < m, other=float("-inf"))
    earlier = tl.where(step > 0, step - 1, 0)
    before = tl.load(history_g + (earlier * batches.to(tl.int64) + batch) * m + j, mask=j < m, other=float("-inf"))
    return g, tl.where((step > 0) | (j >= m), before, 0.0)


@triton.jit
def _undo(
    scores, a, b, history_f, history_g, start_f, start_g, collected, sums, row_shares, factors, column_shares, counts,
    step, batches, n, m, blocks, batch_stride, row_stride, column_stride, a_stride, b_stride, scale: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The gradient through iteration `step`, on `blocks` tiles of rows.

    With `now` the plan after the iteration and `before` the one between its two halves, over columns j and rows i:

        share = grad_g / b          start = grad_f of the last iteration, else 0
        factor = (start - sum over j of now * share) / sum over j of before
        grad_g of the iteration before = -(sum over i of before * factor)
    """
    batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts + batch)
    if step >= count:
        return
    scores += batch * batch_stride
    scale = tl.full((1, 1), scale, D)
    j, rows = tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    g, earlier = _potentials_of(history_g, step, batch, batches, j, m, D)
    last = step == count - 1
    grad_g = tl.load(start_g + batch * m + j, mask=(j < m) & last, other=0.0)
    grad_g -= tl.load(collected + batch * m + j, mask=(j < m) & (last == 0), other=0.0)
    mass_b = _masses(b, batch, b_stride, j, m, HAS_B, D)
    masked = (g == float("-inf")) | (mass_b == 0)
    share = tl.where(masked, 0.0, grad_g / tl.where(masked, 1.0, mass_b))
    at_step = step * batches.to(tl.int64) + batch
    if part == 0:
        tl.store(column_shares + at_step * m + j, share, mask=j < m)
    shift, now, before = _two_plans(g, earlier, share)
    total = tl.full((COLUMNS,), 0.0, D)
    for block in range(blocks):
        i = (part * blocks + block) * ROWS + rows
        logits = _tile(scores, i, j, n, m, row_stride, column_stride, scale)
        f = tl.load(history_f + at_step * n + i, mask=i < n, other=float("-inf"))
        power = tl.exp2(logits + f[:, None] + shift[None, :])
        gradient = tl.load(start_f + batch * n + i, mask=(i < n) & last, other=0.0)
        gradient -= tl.sum(power * now[None, :], axis=1)
        mass_a = _masses(a, batch, a_stride, i, n, HAS_A, D)
        # Not by a: weights that sum to one exactly keep rounding from growing with the iterations.
        found = tl.sum(power * before[None, :], axis=1)
        nothing = (f == float("-inf")) | (mass_a == 0)
        factor = tl.where(nothing, 0.0, gradient / tl.where(nothing, 1.0, found))
        tl.store(factors + at_step * n + i, factor, mask=i < n)
        row_share = tl.where(nothing, 0.0, gradient / tl.where(nothing, 1.0, mass_a))
        tl.store(row_shares + at_step * n + i, row_share, mask=i < n)
        total += tl.sum(power * before[None, :] * factor[:, None], axis=0)
    tl.store(sums + (batch * tl.num_programs(1) + part) * m + j, total, mask=j < m)


@triton.jit
def _gradient(
    scores, grad_plan, grad_scores, history_f, history_g, factors, column_shares, counts,
    batches, n, m, batch_stride, row_stride, column_stride, grad_batch, grad_row, grad_column, scale: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_GRADIENT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """(plan * grad_plan - sum over the iterations of (now * share + before * factor)) / eps of one tile."""
    batch = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.full((1, 1), scale, D)
    logits = _tile(scores + batch * batch_stride, i, j, n, m, row_stride, column_stride, scale)
    inside = (i < n)[:, None] & (j < m)[None, :]
    count = tl.load(counts + batch).to(tl.int32)
    value = tl.full((ROWS, COLUMNS), 0.0, D)
    if HAS_GRADIENT:
        slot = batch + (count - 1) * batches.to(tl.int64)
        f = tl.load(history_f + slot * n + i, mask=i < n, other=float("-inf"))
        g = tl.load(history_g + slot * m + j, mask=j < m, other=float("-inf"))
        at = batch * grad_batch + i[:, None].to(tl.int64) * grad_row + j[None, :].to(tl.int64) * grad_column
        upper = tl.load(grad_plan + at, mask=inside, other=0.0).to(D)
        value = tl.exp2(logits + f[:, None] + g[None, :]) * upper
    for step in range(count):
        at_step = step * batches.to(tl.int64) + batch
        f = tl.load(history_f + at_step * n + i, mask=i < n, other=float("-inf"))
        factor = tl.load(factors + at_step * n + i, mask=i < n, other=0.0)
        g, earlier = _potentials_of(history_g, step, batch, batches, j, m, D)
        share = tl.load(column_shares + at_step * m + j, mask=j < m, other=0.0)
        shift, now, before = _two_plans(g, earlier, share)
        power = tl.exp2(logits + f[:, None] + shift[None, :])
        value -= power * (now[None, :] + before[None, :] * factor[:, None])
    # scale is log2(e) / eps
    value *= scale / tl.full((1, 1), 1.4426950408889634, D)
    place = grad_scores + batch * n * m + i[:, None].to(tl.int64) * m + j[None, :]
    tl.store(place, value.to(grad_scores.dtype.element_ty), mask=inside)


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
