"""Objects of a made-up grid, each a block of features of its own, that move, touch, hide and come back."""

import numpy as np
import torch
from torch.nn import functional as F

from objslot.inference.linking import ObjectLinker
from objslot.inference.looks import MOST_TRACKS

SIZE = (14, 30)
GROUND, CAT, MAN, BALL = range(4)


def looks(seed=0):
    """Directions that objects' features scatter around, and a generator."""
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(24, 4, generator=generator))
    return directions.T, generator


def scene(blocks, directions, generator, kinds=None):
    """Kinds and features of a frame with blocks (object, top, left, height, width), later ones in front."""
    shown = torch.zeros(SIZE, dtype=torch.long)
    for what, top, left, height, width in blocks:
        shown[max(0, top) : top + height, max(0, left) : max(0, left + width)] = what
    noise = 0.06 * torch.randn(*SIZE, 24, generator=generator)
    features = F.normalize(directions[shown] + noise, dim=-1)
    kind = torch.tensor([0, 1, 1, 1] if kinds is None else kinds)[shown]
    return shown, kind, features


def followed(frames, passes=2):
    """The numbers that the linker gives in the last of its passes over the frames (shown, kinds, features)."""
    linker = ObjectLinker()
    for _ in range(passes):
        linker.restart()
        found = [linker(kinds, features) for _, kinds, features in frames]
        names = linker.join()
    return [torch.from_numpy(np.vectorize(lambda k: names.get(int(k), 0))(labels.numpy())) for labels in found]


def numbers(frames, found, what):
    """The number that most of an object has, frame by frame, None where it is not seen."""
    seen = []
    for (shown, _, _), labels in zip(frames, found, strict=True):
        here = labels[shown == what]
        seen.append(int(here.mode().values) if len(here) else None)
        if len(here):
            assert (here == seen[-1]).float().mean() > 0.8
    return seen


def test_objects_that_touch_at_first_and_part_later_are_two_from_the_first_frame_on():
    drawn = looks()
    frames = [scene([(MAN, 2, 4, 9, 4), (CAT, 6, 8 + max(0, t - 8), 5, 6)], *drawn) for t in range(24)]
    found = followed(frames)
    man, cat = (set(numbers(frames, found, what)) for what in (MAN, CAT))
    assert len(man) == len(cat) == 1 and man != cat and 0 not in man | cat


def test_one_pass_alone_cannot_know():
    drawn = looks()
    frames = [scene([(MAN, 2, 4, 9, 4), (CAT, 6, 8 + max(0, t - 8), 5, 6)], *drawn) for t in range(24)]
    found = followed(frames, passes=1)
    assert found[0][frames[0][0] == MAN].mode().values == found[0][frames[0][0] == CAT].mode().values


def test_an_object_that_leaves_and_comes_back_has_its_number_again():
    drawn = looks()
    lefts = [20 + 2 * t if t < 8 else 60 if t < 20 else max(18, 30 - 2 * (t - 20)) for t in range(30)]
    frames = [scene([(MAN, 2, 3, 9, 4), (CAT, 6, left, 5, 6)], *drawn) for left in lefts]
    seen = numbers(frames, followed(frames), CAT)
    assert None in seen
    assert len(set(seen) - {None}) == 1


def test_an_object_that_was_hidden_shows_itself_beside_the_one_in_front():
    drawn = looks()
    frames = [scene([(BALL, 5, 2 + t, 3, 3), (MAN, 1, 11, 12, 6)], *drawn) for t in range(22)]
    found = followed(frames)
    ball, man = (set(numbers(frames, found, what)) - {None} for what in (BALL, MAN))
    assert len(ball) == len(man) == 1 and ball != man


def test_objects_that_pass_do_not_swap_numbers():
    drawn = looks()
    frames = [scene([(CAT, 6, 2 + t, 5, 5), (MAN, 3, 22 - t, 8, 4)], *drawn) for t in range(22)]
    found = followed(frames)
    cat, man = (set(numbers(frames, found, what)) - {None} for what in (CAT, MAN))
    assert len(cat) == len(man) == 1 and cat != man


def test_parts_of_two_kinds_are_one_object_where_they_always_touch():
    directions, generator = looks()
    # Trousers and shirt are somewhat alike.
    directions[BALL] = F.normalize(directions[MAN] + 0.6 * directions[BALL], dim=0)
    kinds = [0, 1, 2, 3]

    def parts(apart):
        return [
            scene(
                [(MAN, 1, 4 + t % 9, 5, 4), (BALL, 6 + 3 * apart(t), 4 + t % 9, 4, 4)], directions, generator, kinds
            )
            for t in range(40)
        ]

    for apart, together in ((lambda t: 0, True), (lambda t: t > 30, False)):
        frames = parts(apart)
        found = followed(frames)
        upper, lower = (set(numbers(frames, found, what)) for what in (MAN, BALL))
        assert (upper == lower) == together


def test_what_flickers_does_not_pile_up():
    directions, generator = looks()
    linker = ObjectLinker()
    for t in range(3 * MOST_TRACKS):
        # Never twice in one place, never twice alike.
        directions[CAT] = F.normalize(torch.randn(24, generator=generator), dim=0)
        _, kinds, features = scene([(CAT, 5 * (t % 2), (7 * t) % 26, 4, 3)], directions, generator)
        linker(kinds, features)
    assert 10 < len(linker._looks) <= MOST_TRACKS


def test_more_pieces_than_tracks_leave_the_smallest_without_a_number():
    _, generator = looks()
    linker = ObjectLinker()
    for _ in range(2):
        kinds = torch.zeros(60, 60, dtype=torch.long)
        for n in range(100):
            kinds[6 * (n // 10) : 6 * (n // 10) + 2, 6 * (n % 10) : 6 * (n % 10) + (4 if n == 99 else 2)] = 1
        features = F.normalize(torch.randn(60, 60, 24, generator=generator), dim=-1)
        labels = linker(kinds, features)
        assert len(labels.unique()) == 1 + MOST_TRACKS
        assert labels[54, 54] > 0
