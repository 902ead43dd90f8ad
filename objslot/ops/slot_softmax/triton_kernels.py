"""slot_softmax on GPUs by Triton: one program for each group, which reads its logits twice."""

import torch
import triton
import triton.language as tl

MOST_SLOTS = 256
TILE = 2048


@triton.jit
def _tile(logits, mask, item, j, i, n, eps, SLOTS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Probability and masked weight (slots, positions) of one tile, and what the positions are weighted with."""
    j_ok, i_ok = j < n, i < SLOTS
    factor = tl.where(j_ok, 1.0, 0.0)
    if HAS_MASK:
        factor = tl.load(mask + item * n + j, mask=j_ok, other=0.0).to(tl.float32)
    counts = j_ok & (factor != 0)
    at = (item * SLOTS + i)[:, None] * n + j[None, :]
    score = tl.load(logits + at, mask=i_ok[:, None] & counts[None, :], other=0.0).to(tl.float32)
    score = tl.where(i_ok[:, None], score, float("-inf"))
    power = tl.exp(score - tl.max(score, axis=0)[None, :])
    probability = power / tl.sum(power, axis=0)[None, :]
    used = i_ok[:, None] & counts[None, :]
    return probability, tl.where(used, (probability + eps) * factor[None, :], 0.0), factor, used, at


@triton.jit
def _forward(
    logits, mask, weights, mass, n, eps,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for step in range(TILES):
        j = step * N + tl.arange(0, N)
        _, weight, _, _, _ = _tile(logits, mask, item, j, i, n, eps, SLOTS, HAS_MASK)
        total += tl.sum(weight, axis=1)
    tl.store(mass + item * SLOTS + i, total, mask=i < SLOTS)
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    for step in range(TILES):
        j = step * N + tl.arange(0, N)
        _, weight, _, _, at = _tile(logits, mask, item, j, i, n, eps, SLOTS, HAS_MASK)
        result = (weight * inverse[:, None]).to(weights.dtype.element_ty)
        tl.store(weights + at, result, mask=(i < SLOTS)[:, None] & (j < n)[None, :])


@triton.jit
def _backward(
    grad, logits, mask, mass, grad_logits, grad_mask, n, eps,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, HAS_MASK: tl.constexpr,
    NEEDS_MASK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ROWS)
    total = tl.load(mass + item * SLOTS + i, mask=i < SLOTS, other=0.0)
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    centre = tl.zeros((ROWS,), tl.float32)
    for step in range(TILES):
        j = step * N + tl.arange(0, N)
        _, weight, _, used, at = _tile(logits, mask, item, j, i, n, eps, SLOTS, HAS_MASK)
        upper = tl.load(grad + at, mask=used, other=0.0).to(tl.float32)
        centre += tl.sum(upper * weight, axis=1)
    centre *= inverse
    for step in range(TILES):
        j = step * N + tl.arange(0, N)
        probability, _, factor, used, at = _tile(logits, mask, item, j, i, n, eps, SLOTS, HAS_MASK)
        upper = tl.load(grad + at, mask=used, other=0.0).to(tl.float32)
        slope = tl.where(used, (upper - centre[:, None]) * inverse[:, None], 0.0)
        if NEEDS_MASK:
            part = tl.sum(tl.where(used, slope * (probability + eps), 0.0), axis=0)
            tl.store(grad_mask + item * n + j, part.to(grad_mask.dtype.element_ty), mask=j < n)
        product = tl.where(used, slope * factor[None, :] * probability, 0.0)
        result = tl.where(used, product - probability * tl.sum(product, axis=0)[None, :], 0.0)
        tl.store(grad_logits + at, result.to(grad_logits.dtype.element_ty),
                 mask=(i < SLOTS)[:, None] & (j < n)[None, :])  # fmt: skip


def why_not(*, dtype, slots, **facts) -> str | None:
    """Why these kernels cannot serve a call on a CUDA tensor, or None."""
    if dtype == torch.float64:
        return "computes in float32, got float64"
    return None if slots <= MOST_SLOTS else f"holds at most {MOST_SLOTS} slots, got {slots}"


def _constants(logits, mask):
    slots, positions = logits.shape[-2:]
    rows = triton.next_power_of_2(slots)
    block = min(max(16, TILE // rows), max(16, triton.next_power_of_2(max(1, positions))))
    # The number of tiles is a constant: padded to a power of two, so that few kernels are compiled.
    tiles = triton.next_power_of_2(max(1, triton.cdiv(positions, block)))
    return {"SLOTS": slots, "ROWS": rows, "N": block, "TILES": tiles, "HAS_MASK": mask is not None}


def forward(logits, mask, eps):
    """Weights and mass, as in `autograd`."""
    logits, mask = logits.contiguous(), None if mask is None else mask.contiguous()
    weights = torch.empty_like(logits)
    mass = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    items = logits.shape[:-2].numel()
    if items:
        with torch.cuda.device_of(logits):
            _forward[(items,)](logits, mask, weights, mass, logits.shape[-1], eps, **_constants(logits, mask))
    return weights, mass


def backward(grad, logits, mask, mass, eps, needs_mask):
    """Gradients of the logits and of the mask; the latter empty unless needed."""
    grad, logits, mask = grad.contiguous(), logits.contiguous(), None if mask is None else mask.contiguous()
    grad_logits = torch.empty_like(logits)
    grad_mask = torch.empty_like(mask) if needs_mask else logits.new_empty(0)
    items = logits.shape[:-2].numel()
    if items:
        with torch.cuda.device_of(logits):
            _backward[(items,)](
                grad, logits, mask, mass, grad_logits, grad_mask, logits.shape[-1], eps,
                NEEDS_MASK=needs_mask, **_constants(logits, mask),
            )  # fmt: skip
    return grad_logits, grad_mask
