"""Slot attention whose forward pass keeps the softmax for the backward pass."""

import pytest
import torch
from slot_cases import DTYPES, check_budget, evaluate
from test_slot_attention import inputs, with_logits

from objslot.ops import _native, slot_attention
from objslot.ops.slot_attention import native

pytestmark = pytest.mark.skipif(_native.load() is None, reason="the compiled module was not built")

# (batch, groups, slots, positions, width, value width): lanes with and without padding, one tile and several shares.
SHAPES = [(2, 1, 16, 196, 130, 130), (3, 2, 3, 37, 80, 72), (1, 4, 5, 63, 333, 40), (1, 1, 7, 900, 97, 64)]
VARIANTS = ("plain", "masked", "holes", "shared")


def given(shape, variant, biased=True):
    return inputs(
        shape,
        masked=variant in ("masked", "holes"),
        shared=variant == "shared",
        biased=biased,
        holes=variant == "holes",
    )


def run(backend):
    return lambda q, k, v, mask, _: slot_attention(q, k, v, mask, eps=1e-3, backend=backend)


@pytest.fixture
def kept(monkeypatch):
    """What was kept by the calls of a test."""
    found, forward = [], native.forward_for_backward

    def watched(*arguments):
        result = forward(*arguments)
        found.append(result[3])
        return result

    monkeypatch.setattr(native, "forward_for_backward", watched)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_budget(dtype, shape, variant, kept):
    arguments = given(shape, variant, biased=False)
    check_budget(run(None), run("reference"), arguments, dtype)
    # Half types have half the memory to compare with, and shared keys half of it again.
    assert variant == "shared" or dtype in (torch.float16, torch.bfloat16) or kept[0] is not None


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_a_softmax_made_again(dtype, variant, kept, monkeypatch):
    for shape in SHAPES:
        arguments = [None if x is None else x.to(dtype) for x in given(shape, variant)]
        monkeypatch.setattr(native, "_KEPT", 1)
        found = evaluate(with_logits(None), arguments)
        monkeypatch.setattr(native, "_KEPT", 10**6)
        again = evaluate(with_logits(None), arguments)
        assert kept[-2] is not None and kept[-1] is None
        for one, other in zip(found, again, strict=True):
            if _native.load().multiplies_on_tiles():
                torch.testing.assert_close(one, other, rtol=1e-5, atol=4e-6 * float(other.abs().max()))
            else:
                assert torch.equal(one, other)


def test_what_is_large_is_not_kept(kept):
    for width, slots in ((64, 7), (16, 64)):
        rows = [x.float().requires_grad_() for x in inputs((2, 1, slots, 50, width, width))[:3]]
        slot_attention(*rows).sum().backward()
    assert 8 * kept[0].numel() <= 2 * 50 * (64 + 64)
    assert kept[1] is None


def test_nothing_is_kept_without_a_gradient(kept):
    rows = [x.float() for x in inputs(SHAPES[0])[:3]]
    slot_attention(*rows)
    with torch.no_grad():
        slot_attention(*(x.requires_grad_() for x in rows))
    assert not kept
