"""Soft maps of a coarse grid brought to the size of a picture, their edges where the picture has its own.

He, Sun, Tang: Guided Image Filtering, ECCV 2010, with a colour guide (its eq. 14 to 16), and its fast form: He, Sun:
Fast Guided Filter, arXiv 1505.00996, in which what is linear between map and colours is found on a smaller picture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SHORT_SIDE = 120
"""Shorter side in pixels at which map and picture are compared: several pixels a position of the coarse grid."""
_REACH = 30
"""The shorter side over the radius of a window: windows are about two patches wide."""
_NOISE = 1e-4
"""Variance of colours in [0, 1] that counts as no edge."""


def refine(soft: Tensor, picture: Tensor) -> Tensor:
    """The map that is, window by window, the linear function of the picture's colours closest to a coarse map.

    Args:
        soft: (h, w), floating point.
        picture: (H, W, 3), uint8.

    Returns:
        (H, W), float32.
    """
    height, width = picture.shape[:2]
    scale = min(1.0, _SHORT_SIDE / min(height, width))
    size = tuple(max(1, round(side * scale)) for side in (height, width))
    radius = max(1, round(min(size) / _REACH))
    colours = picture.permute(2, 0, 1)[None].float() / 255
    guide = F.interpolate(colours, size, mode="area")
    target = F.interpolate(soft[None, None].float(), size, mode="bilinear", align_corners=False)

    first, second = torch.triu_indices(3, 3)
    products = torch.cat([guide * target, guide[:, first] * guide[:, second]], dim=1)
    means = _window_mean(torch.cat([guide, target, products], dim=1), radius)
    colour, level, joint, square = means.split([3, 1, 3, 6], dim=1)
    joint = joint - colour * level
    square = square - colour[:, first] * colour[:, second]
    slope = _solve_symmetric(square, joint)
    offset = level - (slope * colour).sum(1, keepdim=True)
    linear = _window_mean(torch.cat([slope, offset], dim=1), radius)
    linear = F.interpolate(linear, (height, width), mode="bilinear", align_corners=False)[0]
    return (linear[:3] * colours[0]).sum(0) + linear[3]


def _window_mean(maps: Tensor, radius: int) -> Tensor:
    """Mean over square windows, which the edge of the picture cuts."""
    radius = min(radius, *((side - 1) // 2 for side in maps.shape[-2:]))
    return F.avg_pool2d(maps, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)


def _solve_symmetric(upper: Tensor, right: Tensor) -> Tensor:
    """Solves (M + noise) x = right for 3 x 3 matrices M given by their upper triangles (B, 6, ...), by cofactors."""
    a, b, c, d, e, f = upper.unbind(1)
    a, d, f = a + _NOISE, d + _NOISE, f + _NOISE
    inverse = (d * f - e * e, c * e - b * f, b * e - c * d, a * f - c * c, b * c - a * e, a * d - b * b)
    determinant = a * inverse[0] + b * inverse[1] + c * inverse[2]
    rows = ((0, 1, 2), (1, 3, 4), (2, 4, 5))
    solved = [sum(inverse[k] * right[:, i] for i, k in enumerate(row)) for row in rows]
    return torch.stack(solved, dim=1) / determinant[:, None]
