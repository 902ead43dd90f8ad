import torch

from objslot.inference.regions import RegionStatistics
from objslot.inference.selection import salience, select


def statistics(mass, feature, border=None):
    mass = torch.tensor(mass)
    border = torch.zeros(len(mass)) if border is None else torch.tensor(border)
    return RegionStatistics(mass, torch.tensor(feature), border)


def test_the_odd_region_out_is_foreground():
    found = select(
        statistics([0.5, 0.35, 0.15], [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 1, 2])
    )
    assert len(found.foreground) == 1
    assert found.track[2] == found.foreground[0] == 1
    assert found.scores[1] == 1.0


def test_the_border_decides_between_equally_distinct_regions():
    features = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    salient = salience(statistics([0.6, 0.2, 0.2], features, border=[0.3, 0.6, 0.1]))
    assert salient[2] == 1.0
    assert salient[1] < 0.5


def test_many_small_background_regions_do_not_move_the_typical_position():
    few = salience(statistics([0.9, 0.1], [[1.0, 0.0], [0.0, 1.0]]))
    many = salience(statistics([0.09] * 10 + [0.1], [[1.0, 0.0]] * 10 + [[0.0, 1.0]]))
    torch.testing.assert_close(few, many[[0, -1]])


def test_merging_makes_one_object_of_the_foreground():
    description = statistics([0.8, 0.1, 0.1], [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    apart = select(description, torch.tensor([0, 1, 1]))
    together = select(description, torch.tensor([0, 1, 1]), merge_foreground=True)
    assert len(apart.foreground) == 2
    assert len(together.foreground) == 1
    assert together.track[1] == together.track[2]


def test_background_instances_of_one_semantics_share_a_track():
    found = select(
        statistics([0.4, 0.4, 0.2], [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    )
    assert found.track[0] == found.track[1] != found.track[2]


def test_at_most_twenty_tracks_and_the_foreground_stays():
    feature = [[1.0, 0.0]] * 30 + [[0.0, 1.0]]
    found = select(statistics([0.97 / 30] * 30 + [0.03], feature), torch.arange(31))
    assert found.track.max() == 20
    assert int((found.track == 0).sum()) == 11
    assert found.track[30] == 1


def test_a_region_nobody_sees_is_no_foreground():
    found = select(statistics([1.0, 1e-9], [[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    assert found.foreground == ()
