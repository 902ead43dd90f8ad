"""Binary masks with 64 pixels to a machine word: boundaries and disk dilation in few word operations."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

_WORD = np.dtype("<u8")
_ONE = np.uint64(1)
_TOP = np.uint64(63)
# Bits set in every 16-bit number, for numpy before 2.0, which has no bitwise_count.
_BITS = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(
    1, dtype=np.uint8
)


def pack(masks: np.ndarray) -> np.ndarray:
    """Pack bool (..., H, W) into uint64 (..., H, ceil(W / 64)): pixel x is bit x % 64 of word x // 64."""
    words = -(-masks.shape[-1] // 64)
    packed = np.zeros((*masks.shape[:-1], words * 8), np.uint8)
    bits = np.packbits(masks, axis=-1, bitorder="little")
    packed[..., : bits.shape[-1]] = bits
    return packed.view(_WORD)


def pack_labels(labels: np.ndarray, chosen: Iterable[int]) -> np.ndarray:
    """Packed masks (K, H, words) of the chosen labels of a uint8 index map (H, W)."""
    chosen = list(chosen)
    masks = np.empty((len(chosen), labels.shape[0], -(-labels.shape[1] // 64)), _WORD)
    for k, label in enumerate(chosen):
        masks[k] = pack(labels == label)
    return masks


def count(packed: np.ndarray) -> np.ndarray:
    """Number of set pixels of each mask: uint64 (..., H, words) to int64 (...)."""
    flat = np.ascontiguousarray(packed).reshape(*packed.shape[:-2], -1)
    ones = np.bitwise_count(flat) if hasattr(np, "bitwise_count") else _BITS[flat.view(np.uint16)]
    return ones.sum(axis=-1, dtype=np.int64)


def boundary(packed: np.ndarray, width: int) -> np.ndarray:
    """One-pixel boundaries: a pixel that differs from its right, lower or lower right neighbour.

    This is the boundary map of the Berkeley segmentation benchmark that the DAVIS evaluation uses; it lies
    half a pixel towards the origin. Beyond the last row and column the mask is taken to go on unchanged.

    Args:
        packed: masks from `pack`, uint64 (..., H, words).
        width: W, the width in pixels.
    """
    right = packed >> _ONE
    right[..., :-1] |= packed[..., 1:] << _TOP
    last_word, last_bit = divmod(width - 1, 64)
    right[..., last_word] |= packed[..., last_word] & (_ONE << np.uint64(last_bit))
    edge = packed ^ right
    edge[..., :-1, :] |= packed[..., :-1, :] ^ packed[..., 1:, :]
    edge[..., :-1, :] |= packed[..., :-1, :] ^ right[..., 1:, :]
    return edge


def dilate(packed: np.ndarray, radius: int) -> np.ndarray:
    """Dilation by the disk of offsets with dx^2 + dy^2 <= radius^2, exact.

    Row by row the disk is an interval: the intervals of growing half width come from one another by one-pixel
    steps and are put together at the vertical offsets where the disk is that wide. Bits beyond the width may
    be set.
    """
    height = packed.shape[-2]
    half_width = [math.isqrt(radius * radius - dy * dy) for dy in range(min(radius, height - 1) + 1)]
    spread = packed.copy()
    out = np.zeros_like(packed)
    for width in range(radius + 1):
        if width:
            step = spread << _ONE
            step |= spread >> _ONE
            step[..., 1:] |= spread[..., :-1] >> _TOP
            step[..., :-1] |= spread[..., 1:] << _TOP
            spread |= step
        for dy, half in enumerate(half_width):
            if half == width:
                out[..., dy:, :] |= spread[..., : height - dy, :]
                out[..., : height - dy, :] |= spread[..., dy:, :]
    return out
