"""Slot attention on GPUs by Triton: forward and backward, deterministic, float32 arithmetic.

A slot (g, p) is row g * SLOTS + p of every tile, both counts padded to powers of two. On NVIDIA half-precision
inputs are multiplied in TF32, which holds them exactly, and float32 inputs in three TF32 products.
"""

import torch
import triton
import triton.language as tl

TILES = 8
MOST_ROWS = 128


@triton.jit
def _scores(
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
def _softmax(logits, p, SLOTS_USED: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr):
    """(GROUPS * SLOTS, N): softmax over the slots of a group; 0 in the padding of a group."""
    grouped = tl.reshape(tl.where((p < SLOTS_USED)[:, None], logits, float("-inf")), (GROUPS, SLOTS, N))
    power = tl.exp(grouped - tl.max(grouped, axis=1)[:, None, :])
    return tl.reshape(power / tl.sum(power, axis=1)[:, None, :], (GROUPS * SLOTS, N))


@triton.jit
def _by_slot(grouped, GROUPS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr):
    """(GROUPS, N) repeated for every slot of a group: (GROUPS * SLOTS, N)."""
    return tl.reshape(tl.broadcast_to(grouped[:, None, :], (GROUPS, SLOTS, N)), (GROUPS * SLOTS, N))


@triton.jit
def _load_mask(mask, batch, stride, j, j_ok, n, groups, GROUPS: tl.constexpr):
    g = tl.arange(0, GROUPS)
    at = mask + batch * stride + g[:, None].to(tl.int64) * n + j[None, :]
    return tl.load(at, mask=(g < groups)[:, None] & j_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def _forward(
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
            weight_of = _load_mask(mask, batch, mask_stride, j, j_ok, n, GROUPS_USED, GROUPS)
            live = j_ok & (tl.max((weight_of != 0).to(tl.int32), axis=0) > 0)
        score = scale * _scores(
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
        weight = _softmax(score, p, SLOTS_USED, GROUPS, SLOTS, N) + eps
        weight = tl.where(row_ok[:, None] & j_ok[None, :], weight, 0.0)
        if HAS_MASK:
            factor = _by_slot(weight_of, GROUPS, SLOTS, N)
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
def _spread(
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
def _backward(
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
        weight_of = _load_mask(mask, batch, mask_stride, j, j_ok, n, GROUPS_USED, GROUPS)
        live = j_ok & (tl.max((weight_of != 0).to(tl.int32), axis=0) > 0)
        factor = _by_slot(weight_of, GROUPS, SLOTS, N)
    used_at = batch * USED + slot
    score = _scores(
        q + batch * USED * WIDTH, slot * WIDTH, row_ok, k + batch * k_stride, j * k_row, live,
        WIDTH, ROWS, N, FEATURES, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        shift = tl.load(bias + batch * bias_stride + slot, mask=row_ok, other=0.0).to(tl.float32)
        score = tl.where(live[None, :], score + shift[:, None], 0.0)
    probability = _softmax(score, p, SLOTS_USED, GROUPS, SLOTS, N)
    inside = row_ok[:, None] & j_ok[None, :]
    weight = tl.where(inside, probability + eps, 0.0)
    slope = _scores(
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
    slope = product - probability * _by_slot(inner, GROUPS, SLOTS, N)
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
            _spread(
                slope, q + batch * USED * WIDTH, slot * WIDTH, row_ok, grad_k, out_at * WIDTH, j_ok,
                weight, dz + batch * USED * VALUES, start, WIDTH, FEATURES, SHARED, PRECISION,
            )  # fmt: skip
    if NEEDS_V:
        for start in range(0, VALUES, FEATURES):
            _spread(
                weight, dz + batch * USED * VALUES, slot * VALUES, row_ok, grad_v, out_at * VALUES, j_ok,
                weight, dz, start, VALUES, FEATURES, False, PRECISION,
            )  # fmt: skip


def why_not(*, dtype, groups, slots, width, value_width, **facts) -> str | None:
    """Why these kernels cannot serve a call on a CUDA tensor, or None."""
    if dtype == torch.float64:
        return "computes in float32, got float64"
    rows = _rows(groups, slots)[2]
    return None if rows <= MOST_ROWS else f"holds at most {MOST_ROWS} padded slots, got {rows}"


def _rows(groups: int, slots: int) -> tuple[int, int, int]:
    """Groups and slots of a group padded to powers of two, and rows: at least 16, for the matrix units."""
    padded_slots = triton.next_power_of_2(slots)
    padded_groups = max(triton.next_power_of_2(groups), 16 // padded_slots)
    return padded_groups, padded_slots, padded_groups * padded_slots


def precision(dtype: torch.dtype) -> str:
    """How the matrix units multiply float32 numbers that came as `dtype`."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def shape_of_program(rows: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Positions, features and values that a program holds at a time, and its warps: what fits the registers.

    Several products for one of float32 numbers take more of them.
    """
    single = dtype != torch.float32 and torch.version.hip is None
    if rows <= 32:
        return (32, 64, 128, 4) if single else (32, 32, 64, 4)
    if rows <= 64:
        return (32, 32, 64, 8) if single else (32, 32, 32, 8)
    return (32, 32, 64, 8) if single else (16, 16, 32, 8)


def _at_most(block: int, size: int) -> int:
    """`block`, or less where `size` needs less; no less than the matrix units take."""
    return min(block, max(16, triton.next_power_of_2(size)))


def _flat(x, trailing):
    return x.reshape(x.shape[: x.dim() - trailing].numel(), *x.shape[x.dim() - trailing :])


def _problem(q, k, v, mask, bias):
    """Everything with one batch dimension, rows contiguous, and what the kernels take as constants."""
    q, k = _flat(q, 3).contiguous(), _flat(k, 2)
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = k if v is None else _flat(v, 2)
    v = v if v.stride(-1) == 1 else v.contiguous()
    mask = None if mask is None else _flat(mask, 2).contiguous()
    bias = None if bias is None else _flat(bias, 2).contiguous()
    groups, slots, width = q.shape[1:]
    padded_groups, padded_slots, rows = _rows(groups, slots)
    block, features, _, _ = shape_of_program(rows, q.dtype)
    constants = {
        "GROUPS_USED": groups, "SLOTS_USED": slots, "WIDTH": width, "VALUES": v.shape[-1],
        "GROUPS": padded_groups, "SLOTS": padded_slots, "N": block,
        "FEATURES": _at_most(features, max(width, v.shape[-1])),
        "HAS_MASK": mask is not None, "HAS_BIAS": bias is not None,
        "PRECISION": precision(q.dtype),
    }  # fmt: skip
    strides = [k.stride(0), k.stride(1), v.stride(0), v.stride(1)]
    strides += [0 if x is None else x.stride(0) for x in (mask, bias)]
    return q, k, v, mask, bias, strides, constants


def forward(q, k, v, mask, bias, scale, eps, return_logits):
    """Updates, logits (empty unless asked for) and mass, as in `autograd`."""
    shape, positions = q.shape[:-1], k.shape[-2]
    dtype = q.dtype
    q, k, v, mask, bias, strides, constants = _problem(q, k, v, mask, bias)
    batch, slots = q.shape[0], q.shape[1] * q.shape[2]
    logits = q.new_empty((*shape, positions)) if return_logits else q.new_empty(0)
    block, _, columns, warps = shape_of_program(constants["GROUPS"] * constants["SLOTS"], dtype)
    shares = max(1, triton.cdiv(positions, block * TILES))
    out = _at_most(columns, v.shape[-1])
    sums = q.new_empty((batch, shares, slots, v.shape[-1]), dtype=torch.float32)
    mass = q.new_empty((batch, shares, slots), dtype=torch.float32)
    if batch:
        with torch.cuda.device_of(q):
            _forward[batch, shares, triton.cdiv(v.shape[-1], out)](
                q, k, v, mask, bias, sums, mass, logits,
                positions, shares, q.stride(0), *strides, scale, eps,
                OUT=out, TILE_COUNT=TILES, HAS_LOGITS=return_logits, num_warps=warps, **constants,
            )  # fmt: skip
    mass = mass.sum(1)
    inverse = torch.where(mass == 0, 0, 1 / torch.where(mass == 0, 1, mass))
    updates = sums.sum(1) * inverse.unsqueeze(-1)
    return updates.reshape(*shape, v.shape[-1]).to(dtype), logits, mass.reshape(shape)


def backward(grad_updates, grad_logits, q, k, v, mask, bias, updates, mass, scale, eps, needs):
    """Gradients of q, k, v, mask and bias; empty where they are not needed."""
    grads = [
        like.new_empty(like.shape) if wanted else q.new_empty(0)
        for like, wanted in zip((q, k, v, mask, bias), needs, strict=True)
    ]
    shared, positions, value_width = v is None, k.shape[-2], updates.shape[-1]
    flat_q, k, v, mask, bias, strides, constants = _problem(q, k, v, mask, bias)
    batch, slots = flat_q.shape[0], flat_q.shape[1] * flat_q.shape[2]
    rows = flat_q.float().reshape(batch, slots, q.shape[-1]) * scale
    inverse = torch.where(mass == 0, 0, 1 / torch.where(mass == 0, 1, mass)).reshape(batch, slots, 1)
    if grad_updates is None:
        dz = rows.new_zeros(batch, slots, value_width)
        centre = rows.new_zeros(batch, slots)
    else:
        dz = grad_updates.float().reshape(batch, slots, value_width) * inverse
        centre = (dz * updates.float().reshape(batch, slots, value_width)).sum(-1)
    slopes = rows.new_empty(batch, slots, positions)
    block, _, _, warps = shape_of_program(constants["GROUPS"] * constants["SLOTS"], q.dtype)
    if batch and positions:
        with torch.cuda.device_of(q):
            _backward[batch, triton.cdiv(positions, block)](
                rows.contiguous(), dz.contiguous(), centre, k, v, mask, bias,
                None if grad_logits is None else grad_logits.contiguous(), slopes, *grads[1:4],
                positions, *strides, eps,
                HAS_LOGITS=grad_logits is not None, SHARED=shared, NEEDS_K=needs[1], NEEDS_V=needs[2],
                NEEDS_MASK=needs[3], num_warps=warps, **constants,
            )  # fmt: skip
    if needs[0]:
        # A position that is not read may hold anything, NaN included.
        read = k if mask is None else k.masked_fill((mask == 0).all(1).unsqueeze(-1), 0)
        grads[0].copy_((torch.bmm(slopes, read.float()) * scale).reshape(q.shape))
    if needs[4]:
        grads[4].copy_(slopes.sum(-1).reshape(grads[4].shape))
    return tuple(grads)
