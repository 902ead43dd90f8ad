"""What a procedural video shows: objects with outlines, paths and textures, painted from back to front."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from objslot.data.textures import BACKGROUND, PATTERNS, Texture, draw_palette, draw_texture

__all__ = ["Scene"]

# Mean radii of the objects as shares of the frame's shorter side.
_SMALLEST, _LARGEST = 0.13, 0.19


@dataclass(frozen=True)
class _Object:
    """One moving object. Lengths are shares of the frame's shorter side, angles radians, times frames."""

    radius: float
    harmonics: tuple[
        tuple[int, float, float], ...
    ]  # (order, relative amplitude, phase) of the outline r(angle)
    centres: np.ndarray  # (n_frames, 2), y and x
    angles: np.ndarray  # (n_frames,)
    texture: Texture


class Scene:
    """A background that drifts and objects that move over it, drawn at random.

    Args:
        rng: source of everything random.
        n_frames: length in frames.
        size: (height, width) in pixels.
        n_objects: number of objects; the last is nearest to the camera.

    Attributes:
        patterns: the texture of every object, in order.
    """

    def __init__(self, rng: np.random.Generator, n_frames: int, size: tuple[int, int], n_objects: int):
        self._size = size
        palette = draw_palette(rng)
        self.patterns = tuple(PATTERNS[i] for i in rng.permutation(len(PATTERNS))[:n_objects])
        radii = rng.uniform(_SMALLEST, _LARGEST, n_objects)
        centres = _draw_paths(rng, radii, n_frames, np.array(size) / min(size))
        self._objects = [
            _draw_object(rng, *drawn, n_frames, palette)
            for drawn in zip(radii, centres, self.patterns, strict=True)
        ]
        self._background = draw_texture(rng, BACKGROUND, palette)
        heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.004, 0.010)
        self._pan = np.array([np.sin(heading), np.cos(heading)]) * speed

    def render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame `index`, uint8 (H, W, 3), and its mask, uint8 (H, W)."""
        height, width = self._size
        unit = min(height, width)
        y, x = np.meshgrid(
            (np.arange(height, dtype=np.float32) + 0.5) / unit,
            (np.arange(width, dtype=np.float32) + 0.5) / unit,
            indexing="ij",
        )
        shift = (self._pan * index).astype(np.float32)
        image = self._background(y + shift[0], x + shift[1], time=index)
        mask = np.zeros((height, width), np.uint8)
        for identity, thing in enumerate(self._objects, start=1):
            centre, angle = thing.centres[index].astype(np.float32), thing.angles[index]
            shadow = _depth_inside(thing, y - centre[0] - 0.018, x - centre[1] - 0.012, angle)[0]
            image *= 1 - 0.45 * np.clip(0.5 + shadow / 0.04, 0, 1)[..., None]
            depth, nearness, v, u = _depth_inside(thing, y - centre[0], x - centre[1], angle)
            cover = np.clip(0.5 + depth * unit, 0, 1)
            inside = cover > 0
            colour = thing.texture(v[inside], u[inside], time=index)
            colour *= (1 - 0.4 * np.clip(nearness[inside], 0, 1) ** 6)[:, None]
            share = cover[inside][:, None]
            image[inside] = image[inside] * (1 - share) + colour * share
            mask[cover > 0.5] = identity
        return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), mask


def _draw_object(
    rng: np.random.Generator,
    radius: float,
    centres: np.ndarray,
    pattern: str,
    n_frames: int,
    palette: np.ndarray,
) -> _Object:
    turn = rng.uniform(0.015, 0.05) * rng.choice([-1, 1])
    return _Object(
        radius=radius,
        harmonics=_draw_outline(rng),
        centres=centres,
        angles=rng.uniform(0, 2 * np.pi) + turn * np.arange(n_frames),
        texture=draw_texture(rng, pattern, palette),
    )


def _draw_outline(rng: np.random.Generator) -> tuple[tuple[int, float, float], ...]:
    """Harmonics of an outline r(angle): an ellipse, a rounded polygon, a flower or a blob."""
    kind = rng.integers(4)
    phase = rng.uniform(0, 2 * np.pi)
    if kind == 0:
        return ((2, rng.uniform(0.12, 0.25), phase),)
    if kind == 1:
        sides = int(rng.integers(3, 6))
        return ((sides, {3: 0.16, 4: 0.11, 5: 0.08}[sides], phase),)
    if kind == 2:
        return ((int(rng.integers(5, 8)), rng.uniform(0.08, 0.13), phase),)
    return tuple((order, rng.uniform(0.04, 0.14), rng.uniform(0, 2 * np.pi)) for order in (2, 3, 4))


def _draw_paths(rng: np.random.Generator, radii: np.ndarray, n_frames: int, extent: np.ndarray) -> np.ndarray:
    """Centres (n_objects, n_frames, 2) of smooth paths, drawn again until one object passes behind another.

    A pass: two outlines overlap well at one time and are clear of one another at another time, and no object
    stays hidden for most of the video.
    """
    count = len(radii)
    margin = radii.max() + 0.01
    time = np.linspace(0, 1, n_frames)
    reach = radii[:, None] + radii[None, :]
    pairs = np.triu_indices(count, 1)
    best, best_score = None, -np.inf
    for _ in range(400):
        start = rng.uniform(margin, extent - margin, (count, 2))
        end = rng.uniform(margin, extent - margin, (count, 2))
        bend = rng.uniform(-0.22, 0.22, (count, 2))
        paths = (
            start[:, None]
            + (end - start)[:, None] * time[:, None]
            + bend[:, None] * np.sin(np.pi * time)[:, None]
        )
        paths = np.clip(paths, 0.6 * margin, extent - 0.6 * margin)
        travel = np.linalg.norm(np.diff(paths, axis=1), axis=-1).sum(1) if n_frames > 1 else np.ones(count)
        if count == 1:
            score = min(travel.min() - 0.35, 0)
        else:
            gap = np.linalg.norm(paths[:, None] - paths[None], axis=-1) / reach[..., None]
            gap = gap[pairs]
            touching = (gap < 0.95).mean(1)
            score = (
                min(travel.min() - 0.35, 0)
                - max(gap.min() - 0.60, 0)
                - 2 * max(0.30 - gap.min(), 0)
                - max(touching.sum() - 0.6, 0)
                - max((gap < 0.6).mean(1).max() - 0.2, 0)
            )
        if score > best_score:
            best, best_score = paths, score
        if score >= 0:
            break
    return best


def _depth_inside(thing: _Object, y: np.ndarray, x: np.ndarray, angle: float) -> tuple[np.ndarray, ...]:
    """How deep inside the outline points are, for offsets (y, x) from the centre.

    Returns depth (positive inside, same unit as y), distance from the centre over the outline's radius there,
    and the two coordinates of the object's own frame, in which its texture is fixed.
    """
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    v, u = cosine * y - sine * x, sine * y + cosine * x
    distance = np.sqrt(u * u + v * v)
    bearing = np.arctan2(v, u)
    radius = np.ones_like(bearing)
    for order, amplitude, phase in thing.harmonics:
        radius += np.float32(amplitude) * np.cos(order * bearing + np.float32(phase))
    radius *= np.float32(thing.radius)
    return radius - distance, distance / radius, v, u
