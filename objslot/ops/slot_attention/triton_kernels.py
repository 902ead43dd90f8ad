"""Slot attention on GPUs by Triton: launches, forward and backward; deterministic, float32 arithmetic.

On NVIDIA half-precision inputs are multiplied in TF32, which holds them exactly, and float32 inputs in three TF32
products.
"""

import torch
import triton

from objslot.ops.slot_attention import triton_passes as passes

TILES = 8
MOST_ROWS = 128


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
            passes.forward[batch, shares, triton.cdiv(v.shape[-1], out)](
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
            passes.backward[batch, triton.cdiv(positions, block)](
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
