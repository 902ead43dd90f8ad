"""The Triton kernels of Sinkhorn that make potentials and plan: by one program for a matrix, or by several.

`_solve` makes all iterations of a matrix, resident in registers or streamed. Otherwise `_sweep` and `_set_columns`
take turns, and `_finish` makes the plan.
"""

import triton
import triton.language as tl

from objslot.ops.sinkhorn.triton_tiles import (
    _collect_columns,
    _join,
    _logarithm,
    _masses,
    _missing,
    _potential,
    _set_rows,
    _tile,
)


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
