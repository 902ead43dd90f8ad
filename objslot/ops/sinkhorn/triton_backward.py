"""The Triton kernels of Sinkhorn's gradient, exact for the iterations that were made."""

import triton
import triton.language as tl

from objslot.ops.sinkhorn.triton_tiles import _masses, _tile


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
