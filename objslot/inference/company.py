"""Which tracks keep company: tracks that turn out, over a video, to be one object, or parts of one."""

from __future__ import annotations

import numpy as np

from objslot.inference.looks import RELATED, Looks, middle
from objslot.inference.pieces import Component, touching

_SEEN_TOGETHER = 10
"""Frames in one component after which two tracks may be one object, if they are next to never apart."""
_NEVER_APART, _NEVER_BOTH = 0.15, 0.1
_MOVE_TOGETHER = 30
"""Frames in which tracks of two kinds touch before they may be parts of one object, if they are next to never apart."""
_PARTS_APART = 0.05


class Company:
    """Counts, of every two tracks, the frames that show them in components that are one or touch, and in others."""

    def __init__(self):
        self._pairs: dict[tuple[int, int], list[int]] = {}

    def count(self, components: list[Component], labels: np.ndarray, looks: Looks) -> None:
        """One frame more, with the tracks (h, w) of its components."""
        contacts = touching(components, labels.shape)
        within: dict[int, set[int]] = {}
        for c, component in enumerate(components):
            for k in np.unique(labels[component.at]):
                within.setdefault(int(k), set()).add(c)
        names = sorted(within.keys() - {0})
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                near = any(c == d or (c, d) in contacts for c in within[a] for d in within[b])
                self._pairs.setdefault((a, b), [0, 0])[0 if near else 1] += 1
        self._pairs = {pair: count for pair, count in self._pairs.items() if looks.keys() >= set(pair)}

    def join(self, looks: Looks) -> dict[int, int]:
        """Takes tracks for one that are one object; the number each goes by from now on."""
        name = {k: k for k in looks}
        for a in sorted(looks, key=lambda k: -looks[k].seen):
            for b in sorted(looks, key=lambda k: -looks[k].seen):
                if a in looks and b in looks and a != b and self._same(a, b, looks):
                    looks.merge(a, b)
                    self._merge(a, b)
                    name = {k: a if known == b else known for k, known in name.items()}
        for a in looks:
            for b in looks:
                if name[a] < name[b] and self._move_together(a, b, looks):
                    name = {k: name[a] if known == name[b] else known for k, known in name.items()}
        return name

    def _of(self, a: int, b: int) -> list[int]:
        return self._pairs.get((min(a, b), max(a, b)), [0, 0])

    def _same(self, a: int, b: int, looks: Looks) -> bool:
        if looks[a].kind != looks[b].kind:
            return False
        together, apart = self._of(a, b)
        if together >= _SEEN_TOGETHER and apart < _NEVER_APART * (together + apart):
            return True
        return together + apart < _NEVER_BOTH * min(looks[a].seen, looks[b].seen) and looks.alike(a, b)

    def _move_together(self, a: int, b: int, looks: Looks) -> bool:
        """Whether tracks of two kinds are parts of one object: somewhat alike, and touching while both are seen."""
        together, apart = self._of(a, b)
        if looks[a].kind == looks[b].kind or together < _MOVE_TOGETHER or apart >= _PARTS_APART * (together + apart):
            return False
        return float(middle(looks[a].sample) @ middle(looks[b].sample)) >= RELATED

    def _merge(self, a: int, b: int) -> None:
        for pair in [pair for pair in self._pairs if b in pair]:
            count = self._pairs.pop(pair)
            other = pair[0] if pair[1] == b else pair[1]
            if other != a:
                sums = self._pairs.setdefault((min(a, other), max(a, other)), [0, 0])
                for k in (0, 1):
                    sums[k] += count[k]
