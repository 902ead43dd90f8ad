"""Masks at inference: shapes, determinism, independence of how a video is cut up."""

import pytest
import torch

from objslot.errors import UserError
from objslot.models import FrameFeatures


def close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 64), (8, 16)])
@pytest.mark.parametrize(("instances", "iterations"), [(None, None), (1, 1), (5, 4)])
@pytest.mark.parametrize("use_teacher", [False, True])
def test_any_size_and_count(build, height, width, instances, iterations, use_teacher):
    model = build()
    features = model.encode(torch.randn(2, 3, 3, height, width))
    maps = model.segment(
        features, instances=instances, iterations=iterations, use_teacher=use_teacher, return_iterations=True
    )
    positions, instances, iterations = height * width // 64, instances or 2, iterations or 3
    assert maps.grid == (height // 8, width // 8)
    assert maps.semantic.shape == (2, 3, 3, positions)
    assert maps.instance.shape == (2, 3, 3, instances, positions)
    assert maps.semantic_slots.shape == (2, 3, 3, 24)
    assert maps.instance_slots.shape == (2, 3, 3, instances, 24)
    assert maps.initial.shape == (3, instances, 24)
    close(maps.semantic.sum(2), torch.ones(2, 3, positions))
    close(maps.instance.sum(3), torch.ones(2, 3, 3, positions))
    assert len(maps.iterations) == iterations
    close(maps.iterations[-1].semantic, maps.semantic)
    close(maps.iterations[-1].instance, maps.instance)
    if iterations > 1:
        assert not torch.allclose(maps.iterations[0].instance, maps.instance)
    assert not any(value.requires_grad for value in maps[:5])


@pytest.mark.parametrize("train_encoder", [False, True])
def test_the_teacher_is_used_when_asked_for(build, clips, train_encoder):
    model, same = build(train_encoder=train_encoder), build(train_encoder=train_encoder)
    with torch.no_grad():
        model.teacher.slots.mu.normal_()
        if train_encoder:
            model.teacher_encoder.model.pos_embed.mul_(2)
    same.student.load_state_dict(model.teacher.state_dict())
    if train_encoder:
        same.encoder.load_state_dict(model.teacher_encoder.state_dict())
    student = model.segment(model.encode(clips))
    teacher = model.segment(model.encode(clips, use_teacher=True), use_teacher=True)
    close(teacher.instance, same.segment(same.encode(clips)).instance)
    assert not torch.allclose(student.instance, teacher.instance)


def test_iterations_are_given_only_when_asked_for(build, clips):
    model = build()
    assert model.segment(model.encode(clips)).iterations is None


def test_seed_decides_the_noise(build, clips):
    model = build()
    features = model.encode(clips)
    state = torch.get_rng_state()
    first, again, other = (model.segment(features, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.instance, again.instance)
    assert torch.equal(first.semantic, other.semantic)
    assert not torch.allclose(first.instance, other.instance)


def test_more_instances_start_where_fewer_did(build, clips):
    model = build()
    features = model.encode(clips)
    few, many = (model.segment(features, instances=count).initial for count in (3, 5))
    assert torch.equal(few, many[:, :3])


def test_batch_layout_does_not_matter(build, clips):
    model = build()
    features = model.encode(clips)
    together = model.segment(features)
    alone = model.segment(FrameFeatures(features.keys[1:], None, None, features.grid))
    close(together.instance[1:], alone.instance)
    close(together.semantic[1:], alone.semantic)


@pytest.mark.parametrize("sampling", ["other", "self"])
def test_a_video_in_chunks_gives_what_it_gives_as_a_whole(build, sampling):
    model = build(sampling=sampling)
    features = model.encode(torch.randn(1, 7, 3, 40, 32))
    whole = model.segment(features)
    previous, parts = None, []
    for start, end in ((0, 2), (2, 3), (3, 7)):
        keys = features.keys[:, start:end]
        parts.append(model.segment(FrameFeatures(keys, None, None, features.grid), previous_keys=previous))
        previous = keys[:, -1]
    close(torch.cat([part.instance for part in parts], 1), whole.instance)
    close(torch.cat([part.semantic for part in parts], 1), whole.semantic)


def test_order_of_time(build):
    """With "self" the frames are independent; otherwise a frame sees the one before it."""
    frames = torch.randn(1, 4, 3, 32, 32)
    order = torch.tensor([2, 0, 3, 1])
    for sampling, same in (("self", True), ("other", False)):
        model = build(sampling=sampling)
        straight = model.segment(model.encode(frames)).instance[:, order]
        shuffled = model.segment(model.encode(frames[:, order])).instance
        assert torch.allclose(straight, shuffled, atol=1e-5) == same


def test_one_frame_alone(build, clips):
    model = build()
    assert model.segment(model.encode(clips[:, :1])).instance.isfinite().all()


def test_one_instance_is_the_semantics(build, clips):
    model = build()
    maps = model.segment(model.encode(clips), instances=1)
    close(maps.instance, torch.ones_like(maps.instance))


def test_errors(build, clips):
    model = build()
    features = model.encode(clips)
    for name in ("instances", "iterations"):
        with pytest.raises(UserError, match=f"{name}: got 0, expected an integer of at least 1"):
            model.segment(features, **{name: 0})
    with pytest.raises(UserError, match=r"features: got keys .* on grid \(3, 4\)"):
        model.segment(features._replace(grid=(3, 4)))
    with pytest.raises(UserError, match=r"previous_keys: got \(2, 15, 24\), expected \(2, 16, 24\)"):
        model.segment(features, previous_keys=features.keys[:, 0, 1:])
