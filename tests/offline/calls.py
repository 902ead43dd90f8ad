"""Calls that make the ops launch every kind of kernel that their heuristics can choose, on meta tensors.

Each function yields (reduced, call): the calls marked `reduced` alone already reach every kernel.
"""

from itertools import product

import torch
import triton
import triton.language as tl

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def empty(*shape, dtype=SINGLE):
    return torch.empty(shape, dtype=dtype, device="meta")


def slot_attention():
    from objslot.ops.slot_attention import triton_kernels as kernels

    def call(dtype, groups, slots, width, values, masked, bias, logits, shared):
        q, k = empty(2, groups, slots, width, dtype=dtype), empty(2, 256, width, dtype=dtype)
        v = None if shared else empty(2, 256, values, dtype=dtype)
        mask = empty(2, groups, 256, dtype=dtype) if masked else None
        shift = empty(2, groups, slots, dtype=dtype) if bias else None
        updates, found, mass = kernels.forward(q, k, v, mask, shift, 0.1, 1e-8, logits)
        needs = [True, True, not shared, masked, bias]
        kernels.backward(
            updates, found if logits else None, q, k, v, mask, shift, updates, mass, 0.1, 1e-8, needs
        )

    both = ((True, False, True, False), (False, False, False, False))
    every = tuple(product((True, False), repeat=4))
    shapes = ((1, 16), (8, 4), (16, 4), (1, 128))
    for dtype, (groups, slots), (width, values) in product((SINGLE, HALF), shapes, ((384, 384), (64, 1024))):
        usual = width == 384 and (dtype, groups * slots) in ((SINGLE, 16), (SINGLE, 64), (HALF, 64), (SINGLE, 128))
        for flags in every if usual else both:
            reduced = usual and flags in both and (flags[0] or groups * slots == 64)
            yield reduced, lambda a=(dtype, groups, slots, width, values, *flags): call(*a)


def slot_softmax():
    from objslot.ops.slot_softmax import triton_kernels as kernels

    def call(dtype, slots, positions, masked):
        logits = empty(2, 4, slots, positions, dtype=dtype)
        mask = empty(2, 4, positions, dtype=dtype) if masked else None
        weights, mass = kernels.forward(logits, mask, 1e-8)
        kernels.backward(weights, logits, mask, mass, 1e-8, masked)

    for dtype, slots, positions, masked in product((SINGLE, HALF), (1, 4, 16, 64, 256), (256, 1620), (True, False)):
        yield (slots in (4, 256) and positions == 256 and masked, lambda a=(dtype, slots, positions, masked): call(*a))


def sinkhorn():
    from objslot.ops.sinkhorn import triton_kernels as kernels

    def call(dtype, batch, size, masses, tol):
        scores = empty(batch, size, size, dtype=dtype)
        mass = empty(batch, size, dtype=DOUBLE if dtype == DOUBLE else SINGLE) if masses else None
        found = kernels.forward(scores, mass, mass, None, 0.05, 3, tol, True, True, tol is not None)
        history = [found[key] for key in ("history_f", "history_g", "count")]
        kernels.backward(scores, None, None, scores, mass, mass, None, found["plan"], *history, 0.05, 3, tol)

    usual = ((SINGLE, 128, 64, True), (SINGLE, 128, 256, True), (SINGLE, 1, 1620, True), (DOUBLE, 128, 256, False))
    for dtype, batch, size in product((SINGLE, HALF, DOUBLE), (1, 128), (7, 64, 256, 1620, 4096)):
        if kernels.why_not(m=size, dtype=dtype):
            continue
        for masses in (True, False):
            reduced = (dtype, batch, size, masses) in usual
            yield reduced, lambda a=(dtype, batch, size, masses, 1e-3 if masses else None): call(*a)


def transport():
    from objslot.ops.transport import triton_kernels as kernels

    def call(dtype, size, width, values, masses, similarity):
        x, carried = empty(2, size, width, dtype=dtype), empty(2, size, values, dtype=dtype)
        mass = empty(2, size) if masses else None
        moved = kernels.forward(x, x, carried, mass, mass, None, 0.05, 3, None, similarity, False)[0]
        kernels.backward(moved, x, x, carried, mass, mass, None, 0.05, 3, None, similarity)

    usual = ((SINGLE, 256, 384, 16, True, "cosine"), (HALF, 256, 384, 16, True, "cosine"))
    sizes = ((256, 384, 16), (16384, 64, 64), (7, 8, 3), (256, 768, 256))
    for dtype, size, masses, similarity in product((SINGLE, HALF), sizes, (True, False), ("cosine", "dot")):
        case = (dtype, *size, masses, similarity)
        yield case in usual, lambda a=case: call(*a)


def propagate():
    from objslot.ops.propagate import triton_kernels as kernels

    for dtype, topk, width, classes in product((SINGLE, HALF), (7, 28, 64), (384,), (2, 40)):
        yield (
            (topk, classes) == (28, 2),
            lambda a=(dtype, topk, width, classes): kernels.forward(
                empty(60, 107, a[2], dtype=a[0]), empty(21, 60, 107, a[2], dtype=a[0]), empty(21, 60, 107, a[3]),
                35, a[1], 0.2, 1,
            ),
        )  # fmt: skip


@triton.jit
def _too_large(numbers, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(numbers + at)
    tile /= tl.sum(tile, axis=1)[:, None]
    tl.store(numbers + at, tile / tl.sum(tile, axis=0)[None, :])


def too_large():
    """A tile of four times as many numbers as there are registers."""
    _too_large[1,](empty(128, 128), SIZE=128, num_warps=1)


OPS = (slot_attention, slot_softmax, sinkhorn, transport, propagate)
