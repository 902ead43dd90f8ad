"""What moves otherwise than the camera: the optical flow that is left when the camera's is taken out.

Dense Lucas-Kanade registration from coarse to fine (Bouguet, "Pyramidal Implementation of the Lucas Kanade Feature
Tracker", 2000), with one addition: on every level the dominant motion, a quadratic function of the place (that of a
plane before a moving camera), is fitted robustly to the flow so far, and the flow is drawn towards it. So a surface
without texture moves with the camera, unless the picture says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SHORT_SIDE = 120
"""Shorter side in pixels of the pictures compared."""
_LEVELS = 5
_COARSEST = 6
"""Least shorter side of the coarsest level, in pixels."""
_ITERATIONS = 3
_REACH = 2
"""Radius of the windows in pixels, smoothed twice over."""
_PULL = 1e-4
"""Squared gradient of colours in [0, 1] at which the picture and the camera count alike."""
_JITTER = 0.05
"""Displacement, in pixels, that is never a motion of its own."""


def motion(pictures: Tensor, others: Tensor, ground: Tensor) -> Tensor:
    """How much every place of a picture moves otherwise than the camera from there to another picture.

    Args:
        pictures: (B, 3, H, W), floating point colours in [0, 1].
        others: the same shape: the frames before or after.
        ground: (B, h, w), above 0: how much a place counts in finding the motion of the camera.

    Returns:
        (B, height, width) on a grid of 120 or fewer rows or columns, at least 0: logarithm of 1 plus the displacement
        that is left over, over its median in the picture.
    """
    scale = min(1.0, _SHORT_SIDE / min(pictures.shape[-2:]))
    size = tuple(max(1, round(side * scale)) for side in pictures.shape[-2:])
    pyramid = [tuple(F.interpolate(frames, size, mode="area") for frames in (pictures, others))]
    while len(pyramid) < _LEVELS and min(pyramid[-1][0].shape[-2:]) >= 2 * _COARSEST:
        pyramid.append(tuple(F.avg_pool2d(frames, 2) for frames in pyramid[-1]))

    flow = camera = pictures.new_zeros(len(pictures), 2, *pyramid[-1][0].shape[-2:])
    for picture, other in reversed(pyramid):
        rows, columns = picture.shape[-2:]
        trust = F.interpolate(ground[:, None].to(flow), (rows, columns), mode="bilinear", align_corners=False)
        grown = flow.new_tensor([columns / flow.shape[3], rows / flow.shape[2]]).view(1, 2, 1, 1)
        flow = F.interpolate(flow, (rows, columns), mode="bilinear", align_corners=False) * grown
        camera, typical = _dominant(flow, trust)
        flow = _register(picture, other, flow, camera)
    camera, typical = _dominant(flow, trust)
    return torch.log1p((flow - camera).norm(dim=1) / (typical + _JITTER)[:, None, None])


def _register(picture: Tensor, other: Tensor, flow: Tensor, camera: Tensor) -> Tensor:
    """The flow (B, 2, h, w), columns then rows, that makes `other` fit `picture` better."""
    rows, columns = picture.shape[-2:]
    along = F.pad(picture, (1, 1, 0, 0), mode="replicate")
    along = (along[..., 2:] - along[..., :-2]) / 2
    down = F.pad(picture, (0, 0, 1, 1), mode="replicate")
    down = (down[:, :, 2:] - down[:, :, :-2]) / 2
    products = torch.stack([(along * along).sum(1), (along * down).sum(1), (down * down).sum(1)], 1)
    a, b, c = _smooth(products, _REACH).unbind(1)
    a, c = a + _PULL, c + _PULL
    determinant = a * c - b * b
    row, column = torch.meshgrid(
        torch.arange(rows, device=flow.device, dtype=flow.dtype),
        torch.arange(columns, device=flow.device, dtype=flow.dtype),
        indexing="ij",
    )
    for _ in range(_ITERATIONS):
        place = [(column + flow[:, 0] + 0.5) * 2 / columns - 1, (row + flow[:, 1] + 0.5) * 2 / rows - 1]
        moved = F.grid_sample(other, torch.stack(place, -1), padding_mode="border", align_corners=False)
        error = moved - picture
        slope = _smooth(torch.stack([(along * error).sum(1), (down * error).sum(1)], 1), _REACH)
        x, y = (slope + _PULL * (flow - camera)).unbind(1)
        step = torch.stack([b * y - c * x, b * x - a * y], 1) / determinant[:, None]
        flow = _smooth(flow + step.clamp(-1, 1), 1)
    return flow


def _dominant(flow: Tensor, trust: Tensor) -> tuple[Tensor, Tensor]:
    """The quadratic motion (B, 2, h, w) that most of a flow follows, and the median distance (B,) from it."""
    rows, columns = flow.shape[-2:]
    y, x = torch.meshgrid(
        torch.linspace(-rows / columns, rows / columns, rows, device=flow.device, dtype=flow.dtype),
        torch.linspace(-1, 1, columns, device=flow.device, dtype=flow.dtype),
        indexing="ij",
    )
    basis = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1).flatten(0, 1)
    vectors, trust = flow.flatten(2).transpose(1, 2), trust.flatten(1)
    least = 1e-4 * torch.eye(basis.shape[1], device=flow.device, dtype=flow.dtype)
    weight = trust
    for _ in range(6):
        weighted = (basis * weight[..., None]).transpose(1, 2)
        normal = weighted @ basis + least * weight.sum(1)[:, None, None]
        fitted = basis @ torch.linalg.solve(normal, weighted @ vectors)
        distance = (vectors - fitted).norm(dim=-1)
        typical = distance.median(dim=1).values
        # Geman and McClure's weights: what moves otherwise has no say.
        weight = trust / (1 + (distance / (2 * typical + _JITTER / 2)[:, None]).square()).square()
    return fitted.transpose(1, 2).unflatten(2, (rows, columns)), typical


def _smooth(maps: Tensor, radius: int) -> Tensor:
    """Mean over square windows, twice; the edge of the picture cuts them."""
    radius = min(radius, *((side - 1) // 2 for side in maps.shape[-2:]))
    for _ in range(2):
        maps = F.avg_pool2d(maps, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
    return maps
