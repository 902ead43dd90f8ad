"""Procedural textures: patterns of the plane printed with two or three colours of a video's palette."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

__all__ = ["BACKGROUND", "PATTERNS", "Texture", "draw_palette", "draw_texture"]

PATTERNS = ("stripes", "checks", "dots", "grain", "weave")
BACKGROUND = "marble"

_TABLE = 64  # side of the periodic table of random values behind the noise


@dataclass(frozen=True)
class Texture:
    """A pattern with its colours; call it with coordinates.

    Attributes:
        pattern: one of PATTERNS, or BACKGROUND.
        period: length of one repeat, in units of the coordinates.
        colours: (3, 3) RGB in 0..1: dark, middle, light.
        phase: (2,) offset of the pattern.
        table: (64, 64) random values behind the noise patterns.
    """

    pattern: str
    period: float
    colours: np.ndarray
    phase: np.ndarray
    table: np.ndarray

    def __call__(self, y: np.ndarray, x: np.ndarray, time: float = 0.0) -> np.ndarray:
        """Colours (..., 3) float32 in 0..1 at coordinates y, x (...); `time` in frames moves what flows."""
        level = _FUNCTIONS[self.pattern](
            self, (y + self.phase[0]) / self.period, (x + self.phase[1]) / self.period, time
        )
        level = np.clip(level, 0, 1)[..., None] * 2
        dark, middle, light = self.colours
        return np.where(level < 1, dark + (middle - dark) * level, middle + (light - middle) * (level - 1))

    def noise(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Smooth value noise in 0..1 with one random value per unit of length."""
        row, column = np.floor(y).astype(np.int32), np.floor(x).astype(np.int32)
        fy, fx = y - row, x - column
        fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
        r0, r1, c0, c1 = row % _TABLE, (row + 1) % _TABLE, column % _TABLE, (column + 1) % _TABLE
        table = self.table
        upper = table[r0, c0] * (1 - fx) + table[r0, c1] * fx
        lower = table[r1, c0] * (1 - fx) + table[r1, c1] * fx
        return upper * (1 - fy) + lower * fy


def draw_palette(rng: np.random.Generator) -> np.ndarray:
    """Five colours (5, 3) in RGB, from dark to light, of hues that go together."""
    hue = rng.uniform()
    spread = rng.choice([0.08, 0.33, 0.42, 0.5])
    hues = hue + spread * rng.permutation([0.0, 0.0, 1.0, 1.0, 0.5]) + rng.normal(0, 0.02, 5)
    lightness = np.array([0.20, 0.36, 0.52, 0.68, 0.86]) + rng.normal(0, 0.02, 5)
    saturation = rng.uniform(0.45, 0.75, 5)
    return np.array(
        [colorsys.hls_to_rgb(h % 1, li, s) for h, li, s in zip(hues, lightness, saturation, strict=True)],
        np.float32,
    )


def draw_texture(rng: np.random.Generator, pattern: str, palette: np.ndarray) -> Texture:
    """A texture of the given pattern, with period, phase and three colours of the palette drawn at random."""
    low, high = _PERIODS[pattern]
    dark, light = rng.choice([0, 1]), rng.choice([3, 4])
    middle = rng.integers(dark + 1, light)
    return Texture(
        pattern=pattern,
        period=float(rng.uniform(low, high)),
        colours=palette[[dark, middle, light]],
        phase=rng.uniform(0, 1, 2).astype(np.float32),
        table=rng.uniform(0, 1, (_TABLE, _TABLE)).astype(np.float32),
    )


def _edge(wave: np.ndarray, sharpness: float = 2.0) -> np.ndarray:
    """A wave in -1..1 turned into bands with soft edges, in 0..1."""
    return 0.5 + 0.5 * np.clip(wave * sharpness, -1, 1)


def _stripes(texture: Texture, y, x, time):
    return _edge(np.sin(2 * np.pi * x))


def _checks(texture: Texture, y, x, time):
    return _edge(3 * np.sin(np.pi * x) * np.sin(np.pi * y))


def _dots(texture: Texture, y, x, time):
    row = np.floor(y)
    fx, fy = (x + 0.5 * (row % 2)) % 1 - 0.5, y - row - 0.5
    return np.clip((0.30 - np.sqrt(fx * fx + fy * fy)) * 8 + 0.5, 0, 1)


def _grain(texture: Texture, y, x, time):
    return _edge(2 * (texture.noise(2.5 * y, 2.5 * x) - 0.5), 1.6)


def _weave(texture: Texture, y, x, time):
    over = (np.floor(x) + np.floor(y)) % 2
    thread = np.where(over > 0, np.abs(np.sin(np.pi * x * 2)), np.abs(np.sin(np.pi * y * 2)))
    return 0.15 + 0.85 * thread * (0.6 + 0.4 * over)


def _marble(texture: Texture, y, x, time):
    drift = 0.03 * time
    warp = texture.noise(0.5 * y + drift, 0.5 * x)
    flow = texture.noise(0.5 * y + 17, 0.5 * x - drift)
    cloud = texture.noise(y + 2 * warp, x + 2 * flow)
    vein = np.sin(2 * np.pi * (0.35 * x + 0.2 * y + 2.2 * warp + 0.8 * cloud))
    return 0.5 + 0.32 * vein + 0.45 * (cloud - 0.5)


_FUNCTIONS = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "grain": _grain,
    "weave": _weave,
    "marble": _marble,
}

# Shares of the frame's shorter side.
_PERIODS = {
    "stripes": (0.045, 0.065),
    "checks": (0.035, 0.05),
    "dots": (0.05, 0.065),
    "grain": (0.045, 0.06),
    "weave": (0.06, 0.08),
    "marble": (0.10, 0.14),
}
