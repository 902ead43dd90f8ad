"""The Triton kernels of Sinkhorn transport: passes over tiles of scores that the matrix units make, never stored.

A program owns a block of tokens of one side and comes to those of the other one after another; SWAPPED, it owns
tokens of y. Tiles lie the same way in either case, x along the rows, and are made by the same operations: scores are
then the same to the last bit in every pass, without which nearly permuting plans (a small eps) lose the gradient,
a small difference of large sums over rows and over columns. Potentials are in base 2.
"""

import triton
import triton.language as tl


@triton.jit
def _product(
    x, y, i, j, n, m,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS): inner products of the tokens i of x with the tokens j of y."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        d = start + tl.arange(0, BLOCK)
        left = tl.load(
            x + i[:, None].to(tl.int64) * WIDTH + d[None, :], mask=(i < n)[:, None] & (d < WIDTH)[None, :], other=0.0
        )
        right = tl.load(
            y + j[None, :].to(tl.int64) * WIDTH + d[:, None], mask=(j < m)[None, :] & (d < WIDTH)[:, None], other=0.0
        )
        total += tl.dot(left, right, input_precision=PRECISION)
    return total


@triton.jit
def _tile(
    x, y, x_scale, y_scale, batch, start, n, m, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Tokens i of x and j of y, and their scores / eps in base 2: -inf beyond either side."""
    if SWAPPED:
        i = start + tl.arange(0, ROWS)
        j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    else:
        i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        j = start + tl.arange(0, COLUMNS)
    total = _product(
        x + batch * n * WIDTH, y + batch * m * WIDTH, i, j, n, m, WIDTH, ROWS, COLUMNS, BLOCK, PRECISION
    )
    if SCALED:
        total *= tl.load(x_scale + batch * n + i, mask=i < n, other=0.0)[:, None]
        total *= tl.load(y_scale + batch * m + j, mask=j < m, other=0.0)[None, :]
    return i, j, tl.where((i < n)[:, None] & (j < m)[None, :], factor * total, float("-inf"))


@triton.jit
def _powers(logits, f, g, i, j, n, m):
    """2^(logits + f + g), the potentials in this order whichever side the program owns."""
    row = tl.load(f + i, mask=i < n, other=float("-inf"))
    column = tl.load(g + j, mask=j < m, other=float("-inf"))
    return tl.exp2(logits + row[:, None] + column[None, :])


@triton.jit
def _set_potential(
    x, y, x_scale, y_scale, masses, others, potentials, n, m, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, SWAPPED: tl.constexpr, HAS_MASS: tl.constexpr, HAS_OTHERS: tl.constexpr,
):  # fmt: skip
    """log2(mass) - log2(sum over the other side of 2^(logits + others)) of a block of tokens."""
    OWNED: tl.constexpr = COLUMNS if SWAPPED else ROWS
    STEP: tl.constexpr = ROWS if SWAPPED else COLUMNS
    ACROSS: tl.constexpr = 0 if SWAPPED else 1
    owned, size = (m, n) if SWAPPED else (n, m)
    batch = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * OWNED + tl.arange(0, OWNED)
    top, total = tl.full((OWNED,), float("-inf"), tl.float32), tl.zeros((OWNED,), tl.float32)
    for start in range(0, size, STEP):
        i, j, logits = _tile(
            x, y, x_scale, y_scale, batch, start, n, m, factor,
            WIDTH, ROWS, COLUMNS, BLOCK, SCALED, PRECISION, SWAPPED,
        )  # fmt: skip
        if HAS_OTHERS:
            other = i if SWAPPED else j
            potential = tl.load(others + batch * size + other, mask=other < size, other=float("-inf"))
            logits += tl.expand_dims(potential, 1 - ACROSS)
        found = tl.max(logits, axis=ACROSS)
        larger = tl.where(found > top, found, top)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - tl.expand_dims(base, ACROSS)), axis=ACROSS)
        top = larger
    if HAS_MASS:
        mass = tl.load(masses + batch * owned + own, mask=own < owned, other=0.0)
    else:
        mass = tl.full((OWNED,), 1.0, tl.float32) / owned
    nothing = (mass == 0) | (total == 0)
    found = tl.log2(tl.where(mass == 0, 1.0, mass)) - (tl.log2(tl.where(total == 0, 1.0, total)) + top)
    tl.store(potentials + batch * owned + own, tl.where(nothing, float("-inf"), found), mask=own < owned)


@triton.jit
def _apply(
    x, y, x_scale, y_scale, f, g, values, moved, n, m, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, SWAPPED: tl.constexpr, VALUES: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """plan @ values of a block of rows, or SWAPPED plan' @ values of a block of columns, float32."""
    OWNED: tl.constexpr = COLUMNS if SWAPPED else ROWS
    STEP: tl.constexpr = ROWS if SWAPPED else COLUMNS
    owned, size = (m, n) if SWAPPED else (n, m)
    batch = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * OWNED + tl.arange(0, OWNED)
    c = tl.program_id(2) * OUT + tl.arange(0, OUT)
    total = tl.zeros((OWNED, OUT), tl.float32)
    for start in range(0, size, STEP):
        i, j, logits = _tile(
            x, y, x_scale, y_scale, batch, start, n, m, factor,
            WIDTH, ROWS, COLUMNS, BLOCK, SCALED, PRECISION, SWAPPED,
        )  # fmt: skip
        plan = _powers(logits, f + batch * n, g + batch * m, i, j, n, m)
        other = i if SWAPPED else j
        at = values + (batch * size + other[:, None]) * VALUES + c[None, :]
        value = tl.load(at, mask=(other < size)[:, None] & (c < VALUES)[None, :], other=0.0).to(tl.float32)
        total += tl.dot(tl.trans(plan) if SWAPPED else plan, value, input_precision=PRECISION)
    place = moved + (batch * owned + own[:, None]) * VALUES + c[None, :]
    tl.store(place, total, mask=(own < owned)[:, None] & (c < VALUES)[None, :])


@triton.jit
def _row_sums(
    x, y, x_scale, y_scale, f, g, first, second, first_sums, second_sums, n, m, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Sums over the columns of 2^(logits + f + g) times the weights `first`, and times `second` when BOTH."""
    batch = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total, other_total = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, m, COLUMNS):
        i, j, logits = _tile(
            x, y, x_scale, y_scale, batch, start, n, m, factor,
            WIDTH, ROWS, COLUMNS, BLOCK, SCALED, PRECISION, False,
        )  # fmt: skip
        power = _powers(logits, f + batch * n, g + batch * m, i, j, n, m)
        total += tl.sum(power * tl.load(first + batch * m + j, mask=j < m, other=0.0)[None, :], axis=1)
        if BOTH:
            other_total += tl.sum(power * tl.load(second + batch * m + j, mask=j < m, other=0.0)[None, :], axis=1)
    tl.store(first_sums + batch * n + own, total, mask=own < n)
    if BOTH:
        tl.store(second_sums + batch * n + own, other_total, mask=own < n)


@triton.jit
def _column_sums(
    x, y, x_scale, y_scale, f, g, weights, earlier_f, earlier_g, sums, earlier_sums, n, m, factor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sums over the rows: of 2^(logits + f + g) times weights when WEIGHTED, and of 2^(logits + the earlier)."""
    batch = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total, earlier_total = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, n, ROWS):
        i, j, logits = _tile(
            x, y, x_scale, y_scale, batch, start, n, m, factor,
            WIDTH, ROWS, COLUMNS, BLOCK, SCALED, PRECISION, True,
        )  # fmt: skip
        earlier_total += tl.sum(_powers(logits, earlier_f + batch * n, earlier_g + batch * m, i, j, n, m), axis=0)
        if WEIGHTED:
            weight = tl.load(weights + batch * n + i, mask=i < n, other=0.0)
            power = _powers(logits, f + batch * n, g + batch * m, i, j, n, m)
            total += tl.sum(power * weight[:, None], axis=0)
    if WEIGHTED:
        tl.store(sums + batch * m + own, total, mask=own < m)
    tl.store(earlier_sums + batch * m + own, earlier_total, mask=own < m)


@triton.jit
def _token_gradient(
    x, y, x_scale, y_scale, f, g, left, right, left_values, right_values, out, batches, n, m, factor, n_iters,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, SWAPPED: tl.constexpr, VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Sum over the columns of (gradient of the scores) * y, for a block of rows and OUT features; SWAPPED: of x.

    f (n_iters + 1, batch, n) and g (n_iters + 1, batch, m) end with the potentials of the plan; the gradient is
    plan * (left_values @ right_values') - sum over t of 2^(logits + f_t + g_t) * (left_t0 right_t0' + left_t1
    right_t1'), with left (n_iters, 2, batch, n) and right (n_iters, 2, batch, m).
    """
    OWNED: tl.constexpr = COLUMNS if SWAPPED else ROWS
    STEP: tl.constexpr = ROWS if SWAPPED else COLUMNS
    owned, size = (m, n) if SWAPPED else (n, m)
    batch = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * OWNED + tl.arange(0, OWNED)
    e = tl.program_id(2) * OUT + tl.arange(0, OUT)
    step_n, step_m = batches.to(tl.int64) * n, batches.to(tl.int64) * m
    total = tl.zeros((OWNED, OUT), tl.float32)
    for start in range(0, size, STEP):
        i, j, logits = _tile(
            x, y, x_scale, y_scale, batch, start, n, m, factor,
            WIDTH, ROWS, COLUMNS, BLOCK, SCALED, PRECISION, SWAPPED,
        )  # fmt: skip
        upper = _product(
            left_values + batch * n * VALUES, right_values + batch * m * VALUES, i, j, n, m,
            VALUES, ROWS, COLUMNS, VALUE_BLOCK, PRECISION,
        )  # fmt: skip
        last_f, last_g = f + n_iters * step_n + batch * n, g + n_iters * step_m + batch * m
        slope = _powers(logits, last_f, last_g, i, j, n, m) * upper
        for step in range(n_iters):
            row_at, column_at = step * step_n + batch * n, step * step_m + batch * m
            power = _powers(logits, f + row_at, g + column_at, i, j, n, m)
            row_at, column_at = row_at + step * step_n + i, column_at + step * step_m + j
            weight = tl.load(left + row_at, mask=i < n, other=0.0)[:, None]
            weight *= tl.load(right + column_at, mask=j < m, other=0.0)[None, :]
            other = tl.load(left + step_n + row_at, mask=i < n, other=0.0)[:, None]
            weight += other * tl.load(right + step_m + column_at, mask=j < m, other=0.0)[None, :]
            slope -= power * weight
        if SWAPPED:
            slope = tl.trans(slope)
        other = i if SWAPPED else j
        tokens, scale = (x, x_scale) if SWAPPED else (y, y_scale)
        if SCALED:
            slope *= tl.load(scale + batch * size + other, mask=other < size, other=0.0)[None, :]
        at = tokens + (batch * size + other[:, None]) * WIDTH + e[None, :]
        token = tl.load(at, mask=(other < size)[:, None] & (e < WIDTH)[None, :], other=0.0).to(tl.float32)
        total += tl.dot(slope, token, input_precision=PRECISION)
    place = out + (batch * owned + own[:, None]) * WIDTH + e[None, :]
    tl.store(place, total, mask=(own < owned)[:, None] & (e < WIDTH)[None, :])
