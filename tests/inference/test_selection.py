import torch

from objslot.inference.regions import RegionStatistics, VideoRegions
from objslot.inference.selection import figure_evidence, salience, salient_regions, select, select_figure


def statistics(mass, feature, border=None, contrast=None):
    mass = torch.tensor(mass)
    border = torch.zeros(len(mass)) if border is None else torch.tensor(border)
    contrast = torch.zeros(len(mass)) if contrast is None else torch.tensor(contrast)
    return RegionStatistics(mass, torch.tensor(feature), border, contrast)


def test_the_odd_region_out_is_foreground():
    salient, foreground = salient_regions(statistics([0.5, 0.35, 0.15], [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]))
    assert foreground.tolist() == [False, False, True]
    assert salient[2] == 1.0


def test_the_border_decides_between_equally_distinct_regions():
    features = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    salient = salience(statistics([0.6, 0.2, 0.2], features, border=[0.3, 0.6, 0.1]))
    assert salient[2] == 1.0
    assert salient[1] < 0.5


def test_many_small_background_regions_do_not_move_the_typical_position():
    few = salience(statistics([0.9, 0.1], [[1.0, 0.0], [0.0, 1.0]]))
    many = salience(statistics([0.09] * 10 + [0.1], [[1.0, 0.0]] * 10 + [[0.0, 1.0]]))
    torch.testing.assert_close(few, many[[0, -1]])


def test_objects_come_first_and_foreground_regions_belong_to_them():
    description = statistics([0.5, 0.3, 0.1, 0.1], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = select(description, torch.tensor([0, 1, 1, 2]), {1: 0.9, 2: 0.8})
    assert found.foreground == (1, 2)
    # Semantics 1 is partly foreground, semantics 2 wholly: it has no background track.
    assert found.track.tolist() == [3, 4, 0, 0]
    assert found.scores == {1: 0.9, 2: 0.8, 3: 0.0, 4: 0.0}


def test_the_figure_is_one_track_and_what_remains_is_one_for_each_semantics():
    description = statistics([0.6, 0.3, 0.1], [[1.0, 0.0]] * 3, contrast=[0.0, 0.25, 1.0])
    found = select_figure(description, torch.tensor([0, 1, 1]))
    assert found.foreground == (1,)
    # Three regions inside the figure, then two semantics outside it, the larger first.
    assert found.track.tolist() == [1, 1, 1, 2, 3]
    assert found.scores[2] == 0.0 and found.scores[1] > found.scores[3] > 0


def test_at_most_twenty_tracks_beside_many_semantics():
    found = select_figure(statistics([1 / 30] * 30, [[1.0, 0.0]] * 30), torch.arange(30))
    assert found.track.max() == 20 and int((found.track == 0).sum()) == 11


def test_a_position_and_its_regions_decide_together():
    masks = torch.tensor([[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]])
    description = statistics([0.5, 0.5], [[1.0, 0.0], [0.0, 1.0]], contrast=[0.1, 0.8])
    contrast = torch.tensor([[[0.5, 1.5, 0.9, 0.5]]])
    regions = VideoRegions(masks[None], description, torch.arange(2), contrast[None], (0.5, 1.5))
    # Contrasts between typical and most salient: 0, 1, 0.4, 0; of the regions 0.1, 0.1, 0.8, 0.8.
    torch.testing.assert_close(figure_evidence(regions, 0, masks), torch.tensor([[-0.45, 0.05, 0.1, -0.1]]))


def test_background_instances_of_one_semantics_share_a_track():
    description = statistics([0.4, 0.4, 0.2], [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    found = select(description, torch.tensor([0, 0, 1]), {1: 1.0})
    assert found.track.tolist() == [2, 2, 0]


def test_at_most_twenty_tracks_and_the_objects_stay():
    feature = [[1.0, 0.0]] * 30 + [[0.0, 1.0]]
    found = select(statistics([0.97 / 30] * 30 + [0.03], feature), torch.arange(31), {1: 1.0, 2: 0.5})
    assert found.track.max() == 20 and found.foreground == (1, 2)
    assert int((found.track == 0).sum()) == 13


def test_a_region_nobody_sees_is_no_foreground():
    _, foreground = salient_regions(statistics([1.0, 1e-9], [[1.0, 0.0], [0.0, 1.0]]))
    assert not foreground.any()
