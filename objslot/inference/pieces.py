"""Connected pieces of the index map of a frame, over corners too."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

_EVERY_SIDE = np.ones((3, 3), int)


class Component(NamedTuple):
    """A connected piece of one kind."""

    at: np.ndarray
    """bool (h, w)."""
    kind: int
    size: int
    """Positions."""


def connected_pieces(kinds: np.ndarray) -> list[Component]:
    """Connected pieces of one kind, over corners too."""
    found = []
    for kind in np.unique(kinds[kinds > 0]):
        numbered, count = ndimage.label(kinds == kind, _EVERY_SIDE)
        for c in range(1, count + 1):
            at = numbered == c
            found.append(Component(at, int(kind), int(at.sum())))
    return found


def touching(pieces: list[Component], shape: tuple[int, ...]) -> set[tuple[int, int]]:
    """Pairs of components, both ways round, that are next to each other, over corners too."""
    numbered = np.full((shape[0] + 1, shape[1] + 2), -1)
    for c, component in enumerate(pieces):
        numbered[:-1, 1:-1][component.at] = c
    here = numbered[:-1, 1:-1]
    found: set[tuple[int, int]] = set()
    for there in (numbered[:-1, 2:], numbered[1:, :-2], numbered[1:, 1:-1], numbered[1:, 2:]):
        both = (here >= 0) & (there >= 0) & (here != there)
        found.update(zip(here[both].tolist(), there[both].tolist(), strict=True))
    return found | {(d, c) for c, d in found}


def large_pieces(at: np.ndarray) -> list[np.ndarray]:
    """The connected pieces of a mask that are no crumbs, the largest first."""
    numbered, count = ndimage.label(at, _EVERY_SIDE)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    least = max(4, 0.2 * at.sum())
    return [numbered == c + 1 for c in np.argsort(-sizes, kind="stable") if sizes[c] >= least]
