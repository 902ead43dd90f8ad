"""The head that corrects the rule of figure and ground: what it fits, how far that carries, that it is kept."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from objslot.errors import UserError
from objslot.models import SMTC
from objslot.models.figure import FigureHead


def around(centre, count, seed):
    noise = torch.randn(count, len(centre), generator=torch.Generator().manual_seed(seed))
    return F.normalize(centre + 0.02 * noise, dim=-1)


def test_it_learns_what_holds_for_an_appearance_and_nothing_of_others():
    first, second, strange = torch.eye(24)[:3]
    keys = torch.cat([around(first, 400, 0), around(second, 400, 1)])
    correction = torch.cat([torch.full((400,), 0.4), torch.full((400,), -0.3)])
    correction += 0.5 * torch.randn(800, generator=torch.Generator().manual_seed(2))
    head = FigureHead.fit(keys, correction, centres=100)
    assert head.centres.shape == (100, 24) and not list(head.parameters())
    assert abs(head(around(first, 50, 3)).mean() - 0.4) < 0.1
    assert abs(head(around(second, 50, 4)).mean() + 0.3) < 0.1
    assert head(around(strange, 50, 5)).abs().max() < 0.03
    again = FigureHead.fit(keys, correction, centres=100)
    assert torch.equal(again.weights, head.weights)
    assert not torch.equal(FigureHead.fit(keys, correction, centres=100, seed=1).centres, head.centres)


def test_there_are_no_more_centres_than_keys():
    head = FigureHead.fit(torch.eye(5), torch.ones(5), centres=100)
    assert len(head.centres) == 5
    torch.testing.assert_close(head(torch.eye(5)), torch.ones(5), rtol=1e-3, atol=0)
    assert head(torch.eye(5).view(1, 5, 5).half().double()).dtype == torch.float64


def test_it_is_saved_and_loaded_with_the_model(build, tmp_path):
    model = build()
    keys = F.normalize(torch.randn(30, model.encoder.width), dim=-1)
    model.figure = FigureHead.fit(keys, torch.randn(30), centres=20)
    model.save(tmp_path)
    loaded = SMTC.load(tmp_path)
    assert torch.equal(loaded.figure(keys), model.figure(keys))

    state = load_file(tmp_path / "model.safetensors")
    for damaged in (torch.zeros(20), torch.zeros(20, 0), torch.zeros(20, model.encoder.width + 1)):
        save_file(state | {"figure.centres": damaged}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="figure"):
            SMTC.load(tmp_path)


def test_a_model_that_has_learned_none_has_none(build, tmp_path):
    build().save(tmp_path)
    assert SMTC.load(tmp_path).figure is None
