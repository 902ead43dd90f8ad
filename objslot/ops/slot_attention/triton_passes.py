"""Slot attention on GPUs by Triton: the passes over the positions, forward and backward.

A slot (g, p) is row g * SLOTS + p of every tile, both counts padded to powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def scores(
    rows, row_at, row_ok, columns, column_at, column_ok,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS): inner products of the rows with the columns, both of WIDTH features."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < WIDTH
        left = tl.load(rows + row_at[:, None] + d[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
        right = tl.load(
            columns + column_at[None, :] + d[:, None], mask=column_ok[None, :] & inside[:, None], other=0.0
        )
        total += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision=PRECISION)
    return total


@triton.jit
def softmax(logits, p, SLOTS_USED: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr):
    """(GROUPS * SLOTS, N): softmax over the slots of a group; 0 in the padding of a group."""
    grouped = tl.reshape(tl.where((p < SLOTS_USED)[:, None], logits, float("-inf")), (GROUPS, SLOTS, N))
    power = tl.exp(grouped - tl.max(grouped, axis=1)[:, None, :])
    return tl.reshape(power / tl.sum(power, axis=1)[:, None, :], (GROUPS * SLOTS, N))


@triton.jit
def by_slot(grouped, GROUPS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr):
    """(GROUPS, N) repeated for every slot of a group: (GROUPS * SLOTS, N)."""
    return tl.reshape(tl.broadcast_to(grouped[:, None, :], (GROUPS, SLOTS, N)), (GROUPS * SLOTS, N))


@triton.jit
def load_mask(mask, batch, stride, j, j_ok, n, groups, GROUPS: tl.constexpr):
    g = tl.arange(0, GROUPS)
    at = mask + batch * stride + g[:, None].to(tl.int64) * n + j[None, :]
    return tl.load(at, mask=(g < groups)[:, None] & j_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def forward(
    q, k, v, mask, bias, sums, mass, logits,
    n, shares, q_stride, k_stride, k_row, v_stride, v_row, mask_stride, bias_stride, scale, eps,
    GROUPS_USED: tl.constexpr, SLOTS_USED: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr, FEATURES: tl.constexpr, OUT: tl.constexpr,
    TILE_COUNT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    batch, share, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    ROWS: tl.constexpr = GROUPS * SLOTS
    rows = tl.arange(0, ROWS)
    g, p = rows // SLOTS, rows % SLOTS
    row_ok, slot = (g < GROUPS_USED) & (p < SLOTS_USED), g * SLOTS_USED + p
    e = column * OUT + tl.arange(0, OUT)
    total, gathered = tl.zeros((ROWS, OUT), tl.float32), tl.zeros((ROWS,), tl.float32)
    for step in range(TILE_COUNT):
        j = (share * TILE_COUNT + step).to(tl.int64) * N + tl.arange(0, N)
        j_ok = j < n
        live = j_ok
        if HAS_MASK:
            weight_of = load_mask(mask, batch, mask_stride, j, j_ok, n, GROUPS_USED, GROUPS)
            live = j_ok & (tl.max((weight_of != 0).to(tl.int32), axis=0) > 0)
        score = scale * scores(
            q + batch * q_stride, slot * WIDTH, row_ok, k + batch * k_stride, j * k_row, live,
            WIDTH, ROWS, N, FEATURES, PRECISION,
        )  # fmt: skip
        if HAS_BIAS:
            shift = tl.load(bias + batch * bias_stride + slot, mask=row_ok, other=0.0).to(tl.float32)
            score = tl.where(live[None, :], score + shift[:, None], 0.0)
        if HAS_LOGITS:
            if column == 0:
                place = logits + ((batch * (GROUPS_USED * SLOTS_USED) + slot) * n)[:, None] + j[None, :]
                tl.store(place, score.to(logits.dtype.element_ty), mask=row_ok[:, None] & j_ok[None, :])
        weight = softmax(score, p, SLOTS_USED, GROUPS, SLOTS, N) + eps
        weight = tl.where(row_ok[:, None] & j_ok[None, :], weight, 0.0)
        if HAS_MASK:
            factor = by_slot(weight_of, GROUPS, SLOTS, N)
            weight = tl.where(factor == 0, 0.0, weight * factor)
        gathered += tl.sum(weight, axis=1)
        value = tl.load(
            v + batch * v_stride + j[:, None] * v_row + e[None, :],
            mask=live[:, None] & (e < VALUES)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.dot(weight, value.to(tl.float32), input_precision=PRECISION)
    row_at = (batch * shares + share) * (GROUPS_USED * SLOTS_USED) + slot
    tl.store(sums + row_at[:, None] * VALUES + e[None, :], total, mask=row_ok[:, None] & (e < VALUES)[None, :])
    if column == 0:
        tl.store(mass + row_at, gathered, mask=row_ok)


@triton.jit
def spread(
    weight, rows, row_at, row_ok, out, out_at, j_ok, other_weight, other_rows, start,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BOTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores the columns from `start` of weight^T rows, plus those of the other pair when BOTH."""
    d = start + tl.arange(0, BLOCK)
    inside = row_ok[:, None] & (d < WIDTH)[None, :]
    left = tl.load(rows + row_at[:, None] + d[None, :], mask=inside, other=0.0)
    product = tl.dot(tl.trans(weight), left, input_precision=PRECISION)
    if BOTH:
        left = tl.load(other_rows + row_at[:, None] + d[None, :], mask=inside, other=0.0)
        product += tl.dot(tl.trans(other_weight), left, input_precision=PRECISION)
    place = out + out_at[:, None] + d[None, :]
    tl.store(place, product.to(out.dtype.element_ty), mask=j_ok[:, None] & (d < WIDTH)[None, :])


@triton.jit
def backward(
    q, dz, centre, k, v, mask, bias, grad_logits, slopes, grad_k, grad_v, grad_mask,
    n, k_stride, k_row, v_stride, v_row, mask_stride, bias_stride, eps,
    GROUPS_USED: tl.constexpr, SLOTS_USED: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr, FEATURES: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LOGITS: tl.constexpr, SHARED: tl.constexpr,
    NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr, NEEDS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # q holds scale * q, and dz the upper gradient over the mass, both float32 and contiguous.
    batch = tl.program_id(0).to(tl.int64)
    ROWS: tl.constexpr = GROUPS * SLOTS
    USED: tl.constexpr = GROUPS_USED * SLOTS_USED
    rows = tl.arange(0, ROWS)
    g, p = rows // SLOTS, rows % SLOTS
    row_ok, slot = (g < GROUPS_USED) & (p < SLOTS_USED), g * SLOTS_USED + p
    j = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    j_ok = j < n
    live = j_ok
    if HAS_MASK:
        weight_of = load_mask(mask, batch, mask_stride, j, j_ok, n, GROUPS_USED, GROUPS)
        live = j_ok & (tl.max((weight_of != 0).to(tl.int32), axis=0) > 0)
        factor = by_slot(weight_of, GROUPS, SLOTS, N)
    used_at = batch * USED + slot
    score = scores(
        q + batch * USED * WIDTH, slot * WIDTH, row_ok, k + batch * k_stride, j * k_row, live,
        WIDTH, ROWS, N, FEATURES, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        shift = tl.load(bias + batch * bias_stride + slot, mask=row_ok, other=0.0).to(tl.float32)
        score = tl.where(live[None, :], score + shift[:, None], 0.0)
    probability = softmax(score, p, SLOTS_USED, GROUPS, SLOTS, N)
    inside = row_ok[:, None] & j_ok[None, :]
    weight = tl.where(inside, probability + eps, 0.0)
    slope = scores(
        dz + batch * USED * VALUES, slot * VALUES, row_ok, v + batch * v_stride, j * v_row, live,
        VALUES, ROWS, N, FEATURES, PRECISION,
    )  # fmt: skip
    slope -= tl.load(centre + used_at, mask=row_ok, other=0.0)[:, None]
    slope = tl.where(inside, slope, 0.0)
    if NEEDS_MASK:
        part = tl.sum(tl.reshape(slope * weight, (GROUPS, SLOTS, N)), axis=1)
        group = tl.arange(0, GROUPS)
        place = grad_mask + (batch * GROUPS_USED + group)[:, None] * n + j[None, :]
        part = tl.where(weight_of == 0, 0.0, part).to(grad_mask.dtype.element_ty)
        tl.store(place, part, mask=(group < GROUPS_USED)[:, None] & j_ok[None, :])
    if HAS_MASK:
        weight = tl.where(factor == 0, 0.0, weight * factor)
        slope = tl.where(factor == 0, 0.0, slope * factor)
    product = probability * slope
    inner = tl.sum(tl.reshape(product, (GROUPS, SLOTS, N)), axis=1)
    slope = product - probability * by_slot(inner, GROUPS, SLOTS, N)
    if HAS_MASK:
        slope = tl.where(factor == 0, 0.0, slope)
    at = used_at[:, None] * n + j[None, :]
    if HAS_LOGITS:
        upper = tl.load(grad_logits + at, mask=inside, other=0.0).to(tl.float32)
        slope += tl.where(live[None, :], upper, 0.0)
    slope = tl.where(inside, slope, 0.0)
    tl.store(slopes + at, slope, mask=inside)
    out_at = (batch * n + j)
    if NEEDS_K:
        for start in range(0, WIDTH, FEATURES):
            spread(
                slope, q + batch * USED * WIDTH, slot * WIDTH, row_ok, grad_k, out_at * WIDTH, j_ok,
                weight, dz + batch * USED * VALUES, start, WIDTH, FEATURES, SHARED, PRECISION,
            )  # fmt: skip
    if NEEDS_V:
        for start in range(0, VALUES, FEATURES):
            spread(
                weight, dz + batch * USED * VALUES, slot * VALUES, row_ok, grad_v, out_at * VALUES, j_ok,
                weight, dz, start, VALUES, FEATURES, False, PRECISION,
            )  # fmt: skip
