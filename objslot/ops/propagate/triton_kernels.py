"""propagate on GPUs by Triton: a program finds the best keys of a block of queries and mixes their labels.

The cosines to one stretch of a row of keys at a time come from the matrix units; only those above the smallest
one kept so far are looked at again, best first. Of equal cosines the earlier place is kept. Half types are
multiplied as they come and divided by the lengths afterwards; float32 takes three TF32 products.
"""

import math

import torch
import triton
import triton.language as tl

from objslot.ops._arithmetic import SHORTEST

SIDE = 8
STRETCH = 32
BLOCK_FEATURES = 32
BLOCK_CLASSES = 32
MOST_KEPT = 64


@triton.jit
def _propagate(
    query, keys, query_scale, key_scale, labels, mixed,
    frames, height, width, radius, n_global, inverse_temperature,
    WIDTH: tl.constexpr, CLASSES: tl.constexpr, TOPK: tl.constexpr, SIDE: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, KEPT: tl.constexpr, OUT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    across = (width + SIDE - 1) // SIDE
    first_y, first_x = (tl.program_id(1) // across) * SIDE, (tl.program_id(1) % across) * SIDE
    lane = tl.arange(0, SIDE * SIDE)
    query_y, query_x = first_y + lane // SIDE, first_x + lane % SIDE
    query_ok = (query_y < height) & (query_x < width)
    query_at = (batch * height + query_y) * width + query_x
    slot = tl.arange(0, KEPT)
    # Slots beyond the topk are never the smallest.
    kept = tl.where((slot < TOPK)[None, :] & (lane >= 0)[:, None], float("-inf"), float("inf"))
    places = tl.zeros((SIDE * SIDE, KEPT), tl.int32)
    for frame in range(frames):
        everywhere = frame < n_global
        low_y = tl.where(everywhere, 0, tl.maximum(first_y - radius + 1, 0))
        high_y = tl.where(everywhere, height, tl.minimum(first_y + SIDE + radius - 1, height))
        low_x = tl.where(everywhere, 0, tl.maximum(first_x - radius + 1, 0))
        high_x = tl.where(everywhere, width, tl.minimum(first_x + SIDE + radius - 1, width))
        for y in range(low_y, high_y):
            for start in range(low_x, high_x, N):
                x = start + tl.arange(0, N)
                x_ok = x < high_x
                place = (frame * height + y) * width + x
                key_at = batch * frames * height * width + place
                cosine = tl.zeros((SIDE * SIDE, N), tl.float32)
                for feature in range(0, WIDTH, BLOCK):
                    d = feature + tl.arange(0, BLOCK)
                    left = tl.load(
                        query + query_at[:, None] * WIDTH + d[None, :],
                        mask=query_ok[:, None] & (d < WIDTH)[None, :], other=0.0,
                    )  # fmt: skip
                    right = tl.load(
                        keys + key_at[None, :] * WIDTH + d[:, None],
                        mask=x_ok[None, :] & (d < WIDTH)[:, None], other=0.0,
                    )  # fmt: skip
                    cosine += tl.dot(left, right, input_precision=PRECISION)
                if SCALED:
                    cosine *= tl.load(query_scale + query_at, mask=query_ok, other=0.0)[:, None]
                    cosine *= tl.load(key_scale + key_at, mask=x_ok, other=0.0)[None, :]
                away_y, away_x = y - query_y, x[None, :] - query_x[:, None]
                near = (away_y * away_y)[:, None] + away_x * away_x < radius * radius
                cosine = tl.where((near | everywhere) & x_ok[None, :] & query_ok[:, None], cosine, float("-inf"))
                best, least = tl.max(cosine, axis=1), tl.min(kept, axis=1)
                while tl.sum((best > least).to(tl.int32), axis=0) > 0:
                    best_at, least_at = tl.argmax(cosine, axis=1), tl.argmin(kept, axis=1)
                    chosen = (slot[None, :] == least_at[:, None]) & (best > least)[:, None]
                    kept = tl.where(chosen, best[:, None], kept)
                    places = tl.where(chosen, ((frame * height + y) * width + start + best_at)[:, None], places)
                    cosine = tl.where(tl.arange(0, N)[None, :] == best_at[:, None], float("-inf"), cosine)
                    best, least = tl.max(cosine, axis=1), tl.min(kept, axis=1)
    kept = tl.where((slot < TOPK)[None, :], kept, float("-inf"))
    top = tl.max(kept, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp((kept - top[:, None]) * inverse_temperature)
    weight /= tl.sum(weight, axis=1)[:, None]
    c = tl.program_id(2) * OUT + tl.arange(0, OUT)
    total = tl.zeros((SIDE * SIDE, OUT), tl.float32)
    for k in range(TOPK):
        here = (slot == k)[None, :]
        share = tl.sum(tl.where(here, weight, 0.0), axis=1)
        source = batch * frames * height * width + tl.sum(tl.where(here, places, 0), axis=1)
        at = labels + source[:, None] * CLASSES + c[None, :]
        usable = (query_ok & (share > 0))[:, None] & (c < CLASSES)[None, :]
        total += share[:, None] * tl.load(at, mask=usable, other=0.0).to(tl.float32)
    place = mixed + query_at[:, None] * CLASSES + c[None, :]
    tl.store(place, total.to(mixed.dtype.element_ty), mask=query_ok[:, None] & (c < CLASSES)[None, :])


def why_not(*, dtype, label_dtype, topk, **facts) -> str | None:
    """Why this kernel cannot serve a call on a CUDA tensor, or None."""
    if torch.float64 in (dtype, label_dtype):
        return "computes in float32, got float64"
    return None if topk <= MOST_KEPT else f"keeps at most {MOST_KEPT} keys of a query, got topk={topk}"


def precision(dtype: torch.dtype) -> str:
    """How the matrix units multiply float32 numbers that came as `dtype`."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _inverse_lengths(tokens):
    return 1 / torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32).clamp_min(SHORTEST)


def forward(query, keys, labels, radius, topk, temperature, n_global):
    """Labels of the query frame, as in `autograd`."""
    *batch, height, width, features = query.shape
    frames, classes = labels.shape[-4], labels.shape[-1]
    mixed = labels.new_empty((*query.shape[:-1], classes))
    if not mixed.numel():
        return mixed
    query, keys, labels = query.contiguous(), keys.contiguous(), labels.contiguous()
    # Half numbers are multiplied exactly; float32 ones may be too large to be.
    scaled = query.dtype != torch.float32
    query_scale, key_scale = _inverse_lengths(query), _inverse_lengths(keys)
    if not scaled:
        query, keys = query * query_scale.unsqueeze(-1), keys * key_scale.unsqueeze(-1)
    # Neither can reach further than everything there is.
    radius, topk = min(radius, height + width), min(topk, frames * height * width)
    out = min(BLOCK_CLASSES, triton.next_power_of_2(classes))
    blocks = triton.cdiv(height, SIDE) * triton.cdiv(width, SIDE)
    with torch.cuda.device_of(query):
        _propagate[math.prod(batch), blocks, triton.cdiv(classes, out)](
            query, keys, query_scale, key_scale, labels, mixed,
            frames, height, width, radius, min(n_global, frames), 1 / temperature,
            WIDTH=features, CLASSES=classes, TOPK=topk, SIDE=SIDE, N=STRETCH,
            BLOCK=min(BLOCK_FEATURES, max(16, triton.next_power_of_2(features))),
            KEPT=triton.next_power_of_2(topk), OUT=out, SCALED=scaled, PRECISION=precision(query.dtype),
            num_warps=4,
        )  # fmt: skip
    return mixed
