"""Objects that keep their identity over a video: pieces of the foreground, followed by place and by looks.

A frame's foreground falls into components. A component goes on with the tracks that label propagation carries into it
from the frames before; several of them share it position by position, by place and by looks. Where nothing is carried
into a component, a track that sleeps wakes up if it looks like that, and otherwise a new one begins. A track that
stays in two pieces which look different becomes two. What a track looks like is a bounded sample of its features, so
the memory does not grow with the length of the video.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from objslot import propagate
from objslot.inference.pieces import Component, connected_pieces, large_pieces, touching

_CONTEXT = 5
"""Frames from which labels are carried on."""
_TOPK, _TEMPERATURE = 5, 0.07
_SAMPLE = 256
"""Features that a track keeps of itself, and the share of them that a frame may replace."""
_RENEWED = 0.05
_MOST_TRACKS = 64
"""Tracks that are known at a time, asleep or not."""
_KNOWN = 3
"""Frames after which a track is worth waking up."""
_WOKEN = 3
"""Positions by which a sleeping track must show itself inside a component that another one holds."""
_MUCH_MORE = 0.15
"""Difference of cosines by which it must look more like that than like the one that holds it."""
_PLACE_AGAINST_LOOKS = 0.15
"""Difference of cosines that weighs as much as e times the label carried to a position."""
_UNPLACED = 0.15
"""Share of a position that counts as carried to it from a track that has just woken up."""
_REMNANT = 0.25
"""Share of its usual size below which a track must look clearly like itself inside a component that others share."""
_APART = 4
"""Frames in two pieces after which a track may become two."""
_DIFFERENT = 0.5
"""Cosine of two pieces' mean features below which they are not one object."""
_ALIKE = 0.15
"""How much less alike than itself, in cosines, two tracks may be to be the same object."""
_SEEN_TOGETHER = 10
"""Frames in one component after which two tracks may be one object, if they are next to never apart."""
_NEVER_APART, _NEVER_BOTH = 0.15, 0.1
_MOVE_TOGETHER = 30
"""Frames in which tracks of two kinds touch before they may be parts of one object, if they are next to never apart."""
_PARTS_APART, _PARTS_ALIKE = 0.05, 0.5


@dataclass
class _Track:
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
        return self.likeness - 2 * self.deviation


class ObjectLinker:
    """Numbers the objects of one frame after the other, the same number for the same object.

    Over a second pass, after `restart`, it knows from the first frame on what every object looks like: objects that
    touch in the first frame and part later are told apart in both.
    """

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)
        self._tracks: dict[int, _Track] = {}
        self._next = 1
        self.restart()

    def restart(self) -> None:
        """Begin the video anew; what the tracks look like stays known."""
        self._past: list[tuple[Tensor, np.ndarray]] = []
        # Of two tracks: frames in components that are one or touch, and frames in others.
        self._pairs: dict[tuple[int, int], list[int]] = {}
        self._tracks = {k: track for k, track in self._tracks.items() if track.frames >= _KNOWN}
        for track in self._tracks.values():
            track.size = track.seen = track.in_pieces = 0

    def __call__(self, kinds: Tensor, features: Tensor) -> Tensor:
        """The number of the object at every position of a frame.

        Args:
            kinds: (h, w), whole numbers: 0 is background, and objects of different kinds are different objects.
            features: (h, w, D), of unit length.

        Returns:
            int32 (h, w), numbers of tracks from 1, 0 where there is no object.
        """
        components = connected_pieces(kinds.numpy())
        carried = self._carried(features)
        holders = [self._holders(component, carried) for component in components]
        awake = {k for held in holders for k in held}
        labels = np.zeros(kinds.shape, np.int32)
        order = sorted(range(len(components)), key=lambda c: -components[c].size)
        for c in order:
            self._share_out(components[c], holders[c], awake, carried, features, labels)
        self._absorb_remnants(components, features, labels)
        parted = self._learn(components, features, labels)
        self._count(components, labels)
        # After a parting the past still calls both by one name.
        self._past = [*([] if parted else self._past[1 - _CONTEXT :]), (features, labels)]
        return torch.from_numpy(labels)

    def join(self) -> dict[int, int]:
        """Takes tracks for one that are one object, after a pass; the number each goes by from now on."""
        name = {k: k for k in self._tracks}
        for a in sorted(self._tracks, key=lambda k: -self._tracks[k].seen):
            for b in sorted(self._tracks, key=lambda k: -self._tracks[k].seen):
                if a in self._tracks and b in self._tracks and a != b and self._same(a, b):
                    self._merge(a, b)
                    name = {k: a if known == b else known for k, known in name.items()}
        for a in self._tracks:
            for b in self._tracks:
                if name[a] < name[b] and self._move_together(a, b):
                    name = {k: name[a] if known == name[b] else known for k, known in name.items()}
        return name

    def _carried(self, features: Tensor) -> dict[int, np.ndarray]:
        """Of every track of the last frames, the share (h, w) that it has in each position of this one."""
        names = sorted({int(k) for _, labels in self._past for k in np.unique(labels) if k})
        if not names:
            return {}
        past = torch.from_numpy(np.searchsorted([0, *names], np.stack([labels for _, labels in self._past])))
        shares = propagate(
            features[None],
            torch.stack([keys for keys, _ in self._past])[None],
            F.one_hot(past, len(names) + 1).float()[None],
            radius=max(3, round(min(features.shape[:2]) / 4)),
            topk=_TOPK,
            temperature=_TEMPERATURE,
            n_global=0,
        )[0]
        return dict(zip(names, shares[..., 1:].permute(2, 0, 1).numpy(), strict=True))

    def _holders(self, component: Component, carried: dict[int, np.ndarray]) -> list[int]:
        """The tracks that go on in a component: they have a good part of it, or it has a good part of them."""
        held = []
        for k, share in carried.items():
            track = self._tracks.get(k)
            if track is not None and track.kind == component.kind:
                mass = share[component.at].sum()
                if mass >= max(0.7, min(0.2 * component.size, 0.4 * track.size)):
                    held.append(k)
        return held

    def _share_out(self, component, held, awake, carried, features, labels) -> None:
        here = features[torch.from_numpy(component.at)]
        asleep = [
            k
            for k, track in self._tracks.items()
            if track.kind == component.kind and k not in awake and track.frames >= _KNOWN
        ]
        if not held and component.size < 2:
            return
        names = [*held, *asleep]
        likeness = self._likeness(here, names)
        if held:
            woken = self._show_themselves(likeness, len(held), asleep)
        else:
            woken = self._recognised(likeness, asleep)
        awake.update(woken)
        names_here = [*held, *woken]
        if not names_here:
            begun = self._begin(here, component.kind, awake)
            if begun is None:
                return
            names_here = [begun]
            awake.add(begun)
        if len(names_here) == 1:
            labels[component.at] = names_here[0]
            return
        looks = likeness[:, [names.index(k) for k in names_here]].numpy() / _PLACE_AGAINST_LOOKS
        nowhere = np.full(component.size, _UNPLACED)
        place = np.stack([carried[k][component.at] if k in carried else nowhere for k in names_here], 1)
        labels[component.at] = np.array(names_here)[(looks + np.log(place + 0.05)).argmax(1)]

    def _likeness(self, features: Tensor, names: list[int]) -> Tensor:
        """(P, D) features -> (P, len(names)): how alike they are to what a track has shown of itself."""
        if not names:
            return features.new_zeros(len(features), 0)
        nearest = [
            (features @ self._tracks[k].sample.T).topk(min(3, len(self._tracks[k].sample)), dim=1).values.mean(1)
            for k in names
        ]
        return torch.stack(nearest, dim=1)

    def _show_themselves(self, likeness: Tensor, n_held: int, asleep: list[int]) -> list[int]:
        """The sleeping tracks that appear inside a component which others hold."""
        own = likeness[:, :n_held].amax(1)
        woken = []
        for j, k in enumerate(asleep):
            seen = likeness[:, n_held + j]
            clear = (seen > own + _MUCH_MORE) & (seen > self._tracks[k].least_likeness())
            if clear.sum() >= _WOKEN:
                woken.append(k)
        return woken

    def _recognised(self, likeness: Tensor, asleep: list[int]) -> list[int]:
        """The sleeping tracks that a component is made of which nobody holds."""
        if not asleep:
            return []
        best, woken = likeness.argmax(1), []
        for j, k in enumerate(asleep):
            mine = likeness[best == j, j]
            if len(mine) >= max(2, 0.2 * len(best)) and mine.mean() > self._tracks[k].least_likeness():
                woken.append(k)
        return woken

    def _begin(self, features: Tensor, kind: int, awake: set[int]) -> int | None:
        """A new track, for which the least known of those asleep is forgotten; None where all are awake."""
        if len(self._tracks) >= _MOST_TRACKS:
            idle = [k for k in self._tracks if k not in awake]
            if not idle:
                return None
            self._forget(min(idle, key=lambda k: self._tracks[k].frames))
        name, self._next = self._next, self._next + 1
        self._tracks[name] = _Track(kind, self._drawn(features, _SAMPLE))
        return name

    def _forget(self, name: int) -> None:
        del self._tracks[name]
        self._pairs = {pair: count for pair, count in self._pairs.items() if name not in pair}

    def _drawn(self, features: Tensor, most: int) -> Tensor:
        return features[torch.randperm(len(features), generator=self._generator)[:most]]

    def _absorb_remnants(self, components: list[Component], features: Tensor, labels: np.ndarray) -> None:
        for component in components:
            names, sizes = np.unique(labels[component.at], return_counts=True)
            largest = int(names[sizes.argmax()])
            for k, size in zip(names.tolist(), sizes, strict=True):
                if k in (0, largest) or size >= max(2, _REMNANT * self._tracks[k].usual_size):
                    continue
                at = component.at & (labels == k)
                own, others = self._likeness(features[torch.from_numpy(at)], [k, largest]).mean(0).tolist()
                if size < 2 or own < others + _MUCH_MORE:
                    labels[at] = largest

    def _learn(self, components: list[Component], features: Tensor, labels: np.ndarray) -> bool:
        """What the frame says of its tracks; whether one of them became two, which changes the labels."""
        shared = [component.at for component in components if len(np.unique(labels[component.at])) > 1]
        crowded, parted = np.any(shared, axis=0) if shared else np.zeros(labels.shape, bool), False
        for k in [int(k) for k in np.unique(labels) if k]:
            track, at = self._tracks[k], labels == k
            track.size = int(at.sum())
            track.seen += 1
            track.usual_size += (0.1 if track.usual_size else 1.0) * (track.size - track.usual_size)
            pieces = large_pieces(at)
            if len(pieces) > 1:
                track.in_pieces += 1
                if track.in_pieces >= _APART and self._part(k, pieces, features, labels):
                    parted = True
                continue
            track.in_pieces = max(0, track.in_pieces - 1)
            if not crowded[at].any():
                self._look(track, features[torch.from_numpy(at)])
        return parted

    def _look(self, track: _Track, here: Tensor) -> None:
        likeness = (here @ track.sample.T).topk(min(3, len(track.sample)), dim=1).values.mean(1)
        rate = 0.3 if track.frames <= 5 else 0.05
        track.likeness += rate * (float(likeness.mean()) - track.likeness)
        track.deviation += rate * (float(likeness.std(unbiased=False)) - track.deviation)
        track.frames += 1
        track.sample = self._drawn(torch.cat([track.sample, self._drawn(here, round(_RENEWED * _SAMPLE))]), _SAMPLE)

    def _part(self, name: int, pieces: list[np.ndarray], features: Tensor, labels: np.ndarray) -> bool:
        """Makes two tracks of one whose two largest pieces look different."""
        first, second = (features[torch.from_numpy(piece)] for piece in pieces[:2])
        middles = [F.normalize(piece.mean(0), dim=0) for piece in (first, second)]
        if float(middles[0] @ middles[1]) >= _DIFFERENT:
            return False
        track = self._tracks[name]
        other = self._begin(second, track.kind, {int(k) for k in np.unique(labels)})
        if other is None:
            return False
        goes = track.sample @ middles[1] > track.sample @ middles[0]
        new = self._tracks[other]
        new.sample = torch.cat([track.sample[goes], new.sample])[:_SAMPLE]
        track.sample = torch.cat([track.sample[~goes], first])[:_SAMPLE]
        new.frames, new.seen, new.size, track.in_pieces = _KNOWN, 1, len(second), 0
        new.usual_size, track.usual_size = float(len(second)), float(len(first))
        labels[pieces[1]] = other
        return True

    def _count(self, components: list[Component], labels: np.ndarray) -> None:
        contacts = touching(components, labels.shape)
        within: dict[int, set[int]] = {}
        for c, component in enumerate(components):
            for k in np.unique(labels[component.at]):
                within.setdefault(int(k), set()).add(c)
        names = sorted(within.keys() - {0})
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                count = self._pairs.setdefault((a, b), [0, 0])
                near = any(c == d or (c, d) in contacts for c in within[a] for d in within[b])
                count[0 if near else 1] += 1

    def _same(self, a: int, b: int) -> bool:
        first, second = self._tracks[a], self._tracks[b]
        if first.kind != second.kind:
            return False
        together, apart = self._pairs.get((min(a, b), max(a, b)), (0, 0))
        if together >= _SEEN_TOGETHER and apart < _NEVER_APART * (together + apart):
            return True
        if together + apart >= _NEVER_BOTH * min(first.seen, second.seen):
            return False
        return all(
            float(self._likeness(two.sample, [one]).mean()) > min(own.least_likeness(), own.likeness - _ALIKE)
            for one, own, two in ((a, first, second), (b, second, first))
        )

    def _move_together(self, a: int, b: int) -> bool:
        """Whether tracks of two kinds are parts of one object: somewhat alike, and touching while both are seen."""
        first, second = self._tracks[a], self._tracks[b]
        together, apart = self._pairs.get((min(a, b), max(a, b)), (0, 0))
        if first.kind == second.kind or together < _MOVE_TOGETHER or apart >= _PARTS_APART * (together + apart):
            return False
        middles = [F.normalize(track.sample.mean(0), dim=0) for track in (first, second)]
        return float(middles[0] @ middles[1]) >= _PARTS_ALIKE

    def _merge(self, a: int, b: int) -> None:
        """What is known of track b goes over to track a."""
        first, second = self._tracks[a], self._tracks[b]
        first.sample = self._drawn(torch.cat([first.sample, second.sample]), _SAMPLE)
        first.seen += second.seen
        first.frames += second.frames
        for pair in [pair for pair in self._pairs if b in pair]:
            other = pair[0] if pair[1] == b else pair[1]
            if other != a:
                count = self._pairs.setdefault((min(a, other), max(a, other)), [0, 0])
                for k in (0, 1):
                    count[k] += self._pairs[pair][k]
        self._forget(b)
