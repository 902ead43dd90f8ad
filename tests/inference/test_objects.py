import torch

from objslot.inference.objects import _Tally, draw_objects, object_kinds
from objslot.inference.segment import strongest_region


def test_objects_are_ranked_by_size_and_what_flashes_up_is_none():
    tally = _Tally()
    for t in range(20):
        labels = torch.zeros(10, 10, dtype=torch.int32)
        labels[:3, :4], labels[5:, :6] = 7, 3
        if t < 2:
            labels[4, 9] = 5
        if t > 10:
            labels[5:, :6] = 4
        tally.add(labels, torch.full((10, 10), 0.5))
    number, scores = tally.objects({3: 3, 4: 3, 5: 5, 7: 7}, most=20)
    assert number == {3: 1, 4: 1, 7: 2}
    assert scores == {1: 0.5, 2: 0.5}
    assert tally.objects({3: 3, 4: 3, 5: 5, 7: 7}, most=1)[0] == {3: 1, 4: 1}


def test_drawn_objects_go_on_to_the_edge_of_their_kind():
    kinds = torch.tensor([[1, 1, 1, 1, 0, 2]]).repeat(4, 1)
    found = torch.tensor([[1, 1, 2, 2, 0, 3]], dtype=torch.uint8).repeat(4, 1)
    drawn_kinds = torch.zeros(40, 60, dtype=torch.long)
    # The kinds drawn reach a little further than their positions.
    drawn_kinds[:, :43], drawn_kinds[:, 47:] = 1, 2
    drawn = draw_objects(found, kinds, drawn_kinds, lambda shares: strongest_region(shares, (40, 60)))
    assert drawn[:, :19].eq(1).all() and drawn[:, 21:43].eq(2).all()
    assert drawn[:, 43:47].eq(0).all() and drawn[:, 47:].eq(3).all()


def test_what_is_no_object_is_drawn_as_none():
    kinds = torch.tensor([[1, 1, 0, 1]])
    found = torch.tensor([[4, 4, 0, 0]], dtype=torch.uint8)
    drawn = draw_objects(found, kinds, kinds, lambda shares: strongest_region(shares, (1, 4)))
    assert drawn.tolist() == [[4, 4, 0, 0]]


def test_kinds_are_of_regions_that_point_the_same_way():
    features = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.9, 0.2], [0.0, 1.0], [0.1, 2.0], [-1.0, 0.0]])
    kinds = object_kinds(features, torch.ones(6), [1, 2, 3, 4, 5])
    assert kinds[0] == 0
    assert kinds[1] == kinds[2] != kinds[3] == kinds[4]
    assert len(kinds.unique()) == 4
    assert not object_kinds(features, torch.ones(6), []).any()
