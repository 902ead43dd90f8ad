"""What the tracks of a video look like: for each a bounded sample of its features, so that memory does not grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CLEARLY = 0.15
"""Difference of cosines from which one thing is clearly more alike than another."""
RELATED = 0.5
"""Cosine of mean features from which two things may be one object."""
KNOWN = 3
"""Frames, or positions of one, that are enough to tell."""
_SAMPLE = 256
"""Features that a track keeps of itself, and the share of them that a frame may replace."""
_RENEWED = 0.05
MOST_TRACKS = 64
"""Tracks that are known at a time, asleep or not."""


@dataclass
class Track:
    """What is known of a track."""

    kind: int
    sample: Tensor
    likeness: float = 0.8
    """Running mean of how alike its positions are to its sample, and their deviation."""
    deviation: float = 0.1
    usual_size: float = 0.0
    size: int = 0
    """Positions in the last frame it was seen in."""
    frames: int = 0
    """Frames it was learned from, in all passes."""
    seen: int = 0
    """Frames it was seen in, in this pass."""
    in_pieces: int = 0

    def least_likeness(self) -> float:
        """What its own positions are seldom less alike to it than."""
        return self.likeness - 2 * self.deviation

    def show(self, size: int) -> None:
        """It is seen in a frame, in so many positions."""
        self.size = size
        self.seen += 1
        self.usual_size += (0.1 if self.usual_size else 1.0) * (size - self.usual_size)


class Looks(dict[int, Track]):
    """The tracks that are known, by number; numbers are given once."""

    def __init__(self):
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)
        self._next = 1

    def restart(self) -> None:
        """Forget what is hardly known, and where in the video the others were seen."""
        for name in [name for name, track in self.items() if track.frames < KNOWN]:
            del self[name]
        for track in self.values():
            track.size = track.seen = track.in_pieces = 0

    def likeness(self, features: Tensor, names: Sequence[int]) -> Tensor:
        """(P, D) features -> (P, len(names)): how alike they are to what a track has shown of itself."""
        if not names:
            return features.new_zeros(len(features), 0)
        return torch.stack([_nearest(features, self[name].sample) for name in names], dim=1)

    def begin(self, features: Tensor, kind: int, awake: set[int]) -> int | None:
        """A new track, for which the least known of those asleep is forgotten; None where all are awake."""
        if len(self) >= MOST_TRACKS:
            idle = [name for name in self if name not in awake]
            if not idle:
                return None
            del self[min(idle, key=lambda name: self[name].frames)]
        name, self._next = self._next, self._next + 1
        self[name] = Track(kind, self._drawn(features, _SAMPLE))
        return name

    def learn(self, name: int, features: Tensor) -> None:
        """The track looks like that, in one more frame."""
        track = self[name]
        likeness = _nearest(features, track.sample)
        rate = 0.3 if track.frames <= 5 else 0.05
        track.likeness += rate * (float(likeness.mean()) - track.likeness)
        track.deviation += rate * (float(likeness.std(unbiased=False)) - track.deviation)
        track.frames += 1
        new = self._drawn(features, round(_RENEWED * _SAMPLE))
        track.sample = self._drawn(torch.cat([track.sample, new]), _SAMPLE)

    def part(self, name: int, first: Tensor, second: Tensor, awake: set[int]) -> int | None:
        """The second half of a track whose halves (P, D) and (Q, D) look different, as a track; else None."""
        middles = [middle(half) for half in (first, second)]
        if float(middles[0] @ middles[1]) >= RELATED:
            return None
        track = self[name]
        other = self.begin(second, track.kind, awake)
        if other is None:
            return None
        goes = track.sample @ middles[1] > track.sample @ middles[0]
        new = self[other]
        new.sample = torch.cat([track.sample[goes], new.sample])[:_SAMPLE]
        track.sample = torch.cat([track.sample[~goes], first])[:_SAMPLE]
        new.frames, new.seen, new.size, track.in_pieces = KNOWN, 1, len(second), 0
        new.usual_size, track.usual_size = float(len(second)), float(len(first))
        return other

    def alike(self, a: int, b: int) -> bool:
        """Whether either looks to the other nearly as it looks to itself."""
        return all(
            float(self.likeness(self[two].sample, [one]).mean())
            > min(self[one].least_likeness(), self[one].likeness - CLEARLY)
            for one, two in ((a, b), (b, a))
        )

    def merge(self, a: int, b: int) -> None:
        """What is known of track b goes over to track a."""
        first, second = self[a], self.pop(b)
        first.sample = self._drawn(torch.cat([first.sample, second.sample]), _SAMPLE)
        first.seen += second.seen
        first.frames += second.frames

    def _drawn(self, features: Tensor, most: int) -> Tensor:
        return features[torch.randperm(len(features), generator=self._generator)[:most]]


def middle(features: Tensor) -> Tensor:
    """(P, D) -> (D,): their mean, of unit length."""
    return F.normalize(features.mean(0), dim=0)


def _nearest(features: Tensor, sample: Tensor) -> Tensor:
    return (features @ sample.T).topk(min(3, len(sample)), dim=1).values.mean(1)
