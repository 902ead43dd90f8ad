"""Objects that keep their identity over a video: pieces of the foreground, followed by place and by looks.

A frame's foreground falls into components. A component goes on with the tracks that label propagation carries into it
from the frames before; several of them share it position by position, by place and by looks. Where nothing is carried
into a component, a track that sleeps wakes up if it looks like that, and otherwise a new one begins. A track that
stays in two pieces which look different becomes two. What a track looks like is a bounded sample of its features, so
the memory does not grow with the length of the video.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from objslot import propagate
from objslot.inference.company import Company
from objslot.inference.looks import CLEARLY, KNOWN, Looks
from objslot.inference.pieces import Component, connected_pieces, large_pieces

_CONTEXT = 5
"""Frames from which labels are carried on."""
_TOPK, _TEMPERATURE = 5, 0.07
_UNPLACED = 0.15
"""Share of a position that counts as carried to it from a track that has just woken up."""
_REMNANT = 0.25
"""Share of its usual size below which a track must look clearly like itself inside a component that others share."""
_APART = 4
"""Frames in two pieces after which a track may become two."""


class ObjectLinker:
    """Numbers the objects of one frame after the other, the same number for the same object.

    Over a second pass, after `restart`, it knows from the first frame on what every object looks like: objects that
    touch in the first frame and part later are told apart in both.
    """

    def __init__(self):
        self._looks = Looks()
        self.restart()

    def restart(self) -> None:
        """Begin the video anew; what the tracks look like stays known."""
        self._past: list[tuple[Tensor, np.ndarray]] = []
        self._company = Company()
        self._looks.restart()

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
        self._company.count(components, labels, self._looks)
        # After a parting the past still calls both by one name.
        self._past = [*([] if parted else self._past[1 - _CONTEXT :]), (features, labels)]
        return torch.from_numpy(labels)

    def join(self) -> dict[int, int]:
        """Takes tracks for one that are one object, after a pass; the number each goes by from now on."""
        return self._company.join(self._looks)

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
            track = self._looks.get(k)
            if track is not None and track.kind == component.kind:
                mass = share[component.at].sum()
                if mass >= max(0.7, min(0.2 * component.size, 0.4 * track.size)):
                    held.append(k)
        return held

    def _share_out(self, component, held, awake, carried, features, labels) -> None:
        here = features[torch.from_numpy(component.at)]
        asleep = [
            k
            for k, track in self._looks.items()
            if track.kind == component.kind and k not in awake and track.frames >= KNOWN
        ]
        if not held and component.size < 2:
            return
        names = [*held, *asleep]
        likeness = self._looks.likeness(here, names)
        if held:
            woken = self._show_themselves(likeness, len(held), asleep)
        else:
            woken = self._recognised(likeness, asleep)
        awake.update(woken)
        names_here = [*held, *woken]
        if not names_here:
            begun = self._looks.begin(here, component.kind, awake)
            if begun is None:
                return
            names_here = [begun]
            awake.add(begun)
        if len(names_here) == 1:
            labels[component.at] = names_here[0]
            return
        looks = likeness[:, [names.index(k) for k in names_here]].numpy() / CLEARLY
        nowhere = np.full(component.size, _UNPLACED)
        place = np.stack([carried[k][component.at] if k in carried else nowhere for k in names_here], 1)
        labels[component.at] = np.array(names_here)[(looks + np.log(place + 0.05)).argmax(1)]

    def _show_themselves(self, likeness: Tensor, n_held: int, asleep: list[int]) -> list[int]:
        """The sleeping tracks that appear inside a component which others hold."""
        own = likeness[:, :n_held].amax(1)
        woken = []
        for j, k in enumerate(asleep):
            seen = likeness[:, n_held + j]
            clear = (seen > own + CLEARLY) & (seen > self._looks[k].least_likeness())
            if clear.sum() >= KNOWN:
                woken.append(k)
        return woken

    def _recognised(self, likeness: Tensor, asleep: list[int]) -> list[int]:
        """The sleeping tracks that a component is made of which nobody holds."""
        if not asleep:
            return []
        best, woken = likeness.argmax(1), []
        for j, k in enumerate(asleep):
            mine = likeness[best == j, j]
            if len(mine) >= max(2, 0.2 * len(best)) and mine.mean() > self._looks[k].least_likeness():
                woken.append(k)
        return woken

    def _absorb_remnants(self, components: list[Component], features: Tensor, labels: np.ndarray) -> None:
        for component in components:
            names, sizes = np.unique(labels[component.at], return_counts=True)
            largest = int(names[sizes.argmax()])
            for k, size in zip(names.tolist(), sizes, strict=True):
                if k in (0, largest) or size >= max(2, _REMNANT * self._looks[k].usual_size):
                    continue
                at = component.at & (labels == k)
                own, others = self._looks.likeness(features[torch.from_numpy(at)], [k, largest]).mean(0).tolist()
                if size < 2 or own < others + CLEARLY:
                    labels[at] = largest

    def _learn(self, components: list[Component], features: Tensor, labels: np.ndarray) -> bool:
        """What the frame says of its tracks; whether one of them became two, which changes the labels."""
        shared = [component.at for component in components if len(np.unique(labels[component.at])) > 1]
        crowded, parted = np.any(shared, axis=0) if shared else np.zeros(labels.shape, bool), False
        for k in [int(k) for k in np.unique(labels) if k]:
            track, at = self._looks[k], labels == k
            track.show(int(at.sum()))
            pieces = large_pieces(at)
            if len(pieces) > 1:
                track.in_pieces += 1
                if track.in_pieces >= _APART:
                    parted |= self._part(k, pieces, features, labels)
                continue
            track.in_pieces = max(0, track.in_pieces - 1)
            if not crowded[at].any():
                self._looks.learn(k, features[torch.from_numpy(at)])
        return parted

    def _part(self, name: int, pieces: list[np.ndarray], features: Tensor, labels: np.ndarray) -> bool:
        """Makes two tracks of one whose two largest pieces look different."""
        halves = [features[torch.from_numpy(piece)] for piece in pieces[:2]]
        other = self._looks.part(name, *halves, {int(k) for k in np.unique(labels)})
        if other is not None:
            labels[pieces[1]] = other
        return other is not None
