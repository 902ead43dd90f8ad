"""The model as a whole: losses and their gradients, the teacher, optimiser groups."""

import pytest
import torch

from objslot import objectives
from objslot.errors import UserError
from objslot.models import FrameFeatures
from objslot.models.correspondence import TemporalFusion

TERMS = {"loss", "semantic", "instance", "diversity", "valid_share", "fusion_ratio"}


def losses(model, clips, seed=0):
    return model(clips, clips.flip(-1) * 0.9, generator=torch.Generator().manual_seed(seed))


def gradients(model, clips):
    model.zero_grad()
    losses(model, clips)["loss"].backward()
    return {name: parameter.grad for name, parameter in model.student.named_parameters()}


OPTIONS = [
    {},
    {"key_center": "none"},
    {"key_center": "mean"},
    {"update": "gru"},
    {"aggregation": "hard"},
    {"aggregation": "raw_logit"},
    {"aggregation": "none"},
    {"correspondence": "raw", "correspondence_temperature": 1.0},
    {"sampling": "self"},
    {"n_other": 2},
    {"full_bptt": True},
    {"marginal": "caam"},
    {"marginal": "attention"},
    {"teacher_temperature": 0.1},
    {"instances": 1},
    {"instances": 6},
    {"slots": 1},
    {"iterations": 1},
    {"width": 16},
    {"train_encoder": True},
    {"eps": 0.01, "sinkhorn_iterations": 10},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items())
)
def test_every_option_trains(build, clips, options):
    model = build(**options)
    found = losses(model, clips)
    assert set(found) == TERMS
    assert all(value.shape == () and value.isfinite() for value in found.values())
    torch.testing.assert_close(found["loss"], found["semantic"] + found["instance"] + found["diversity"])
    assert not found["valid_share"].requires_grad
    assert not found["fusion_ratio"].requires_grad
    found["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_weights_of_the_terms(build, clips):
    model = build(semantic_weight=2.0, instance_weight=0.0, diversity_weight=0.5)
    found = losses(model, clips)
    torch.testing.assert_close(found["loss"], 2 * found["semantic"] + 0.5 * found["diversity"])


def test_a_colder_teacher_gives_harder_targets(build, clips):
    with torch.no_grad():
        soft, hard, frozen = (
            losses(build(teacher_temperature=temperature), clips)["semantic"]
            for temperature in (1.0, 0.5, 1e-4)
        )
    model = build()
    logits = []
    model.student.slots.register_forward_hook(
        lambda module, arguments, output: logits.append(output.semantic_logits)
    )
    model.teacher.slots.register_forward_hook(
        lambda module, arguments, output: logits.append(output.semantic_logits)
    )
    losses(model, clips)
    student, teacher = logits
    winners = torch.nn.functional.one_hot(teacher.argmax(-2), 3).transpose(-1, -2)
    keys = model.encode(clips.flip(-1) * 0.9).keys
    torch.testing.assert_close(frozen, objectives.semantic_alignment_loss(student, winners, keys).detach())
    torch.testing.assert_close(
        soft, objectives.semantic_alignment_loss(student, teacher.softmax(-2), keys).detach()
    )
    assert not torch.allclose(soft, hard)


def test_everything_that_should_learn_gets_a_gradient(build, clips):
    for name, gradient in gradients(build(), clips).items():
        assert gradient.abs().sum() > 0, name
    trained = build(train_encoder=True)
    losses(trained, clips)["loss"].backward()
    for name, parameter in trained.encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    learning = {name for name, parameter in trained.encoder.named_parameters() if parameter.requires_grad}
    assert {"model.cls_token", "model.patch_embed.proj.weight", "model.blocks.1.attn.qkv.weight"} <= learning
    assert (
        not {"model.blocks.1.attn.proj.weight", "model.norm.weight", "model.blocks.1.attn.qkv.bias"}
        & learning
    )
    assert "model.blocks.1.attn.qkv.bias" in {
        name
        for name, p in build(train_encoder=True, key_center="none").encoder.named_parameters()
        if p.requires_grad
    }


def test_straight_through_changes_gradients_and_not_values(build, clips):
    last, full = build(iterations=3), build(iterations=3, full_bptt=True)
    for name, value in losses(last, clips).items():
        torch.testing.assert_close(value, losses(full, clips)[name], msg=name)
    difference = gradients(last, clips)["slots.mu"] - gradients(full, clips)["slots.mu"]
    assert difference.abs().max() > 1e-5
    one_last, one_full = build(iterations=1), build(iterations=1, full_bptt=True)
    torch.testing.assert_close(gradients(one_last, clips)["slots.mu"], gradients(one_full, clips)["slots.mu"])


def test_deviations_learn_only_through_the_instances(build, clips):
    assert gradients(build(), clips)["slots.log_sigma"].abs().sum() > 0
    assert gradients(build(instance_weight=0.0), clips)["slots.log_sigma"].abs().sum() == 0


def test_a_valid_filter_that_nothing_passes(build, clips):
    model = build(valid_area=1.0)
    found = losses(model, clips)
    assert found["valid_share"] == 0
    assert found["instance"] == 0
    assert build(valid_area=0.0)(clips, clips)["valid_share"] == 1
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.student.parameters())


def test_generator_decides_everything_random(build, clips):
    model = build()
    first, again, other = (losses(model, clips, seed)["loss"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_other_frames_matter_and_self_does_not_use_them(build, clips):
    changed = clips.clone()
    changed[:, 1:] += torch.randn_like(changed[:, 1:])
    for sampling, same in (("self", True), ("other", False)):
        model = build(sampling=sampling)
        first, second = (model.segment(model.encode(video)).semantic[:, 0] for video in (clips, changed))
        assert torch.allclose(first, second, atol=1e-6) == same


def test_features_stand_in_for_frames(build, clips):
    model = build()
    teacher = clips.flip(-1) * 0.9
    expected = losses(model, clips)["loss"]
    features = (model.encode(clips), model.encode(teacher, use_teacher=True))
    found = model(*features, generator=torch.Generator().manual_seed(0))["loss"]
    assert torch.equal(found, expected)
    half = [each._replace(keys=each.keys.half()) for each in features]
    found = model(*half, generator=torch.Generator().manual_seed(0))["loss"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_features_that_both_see_correspond_once(build, clips, monkeypatch):
    model = build(n_other=2)
    features, calls = model.encode(clips), []
    correspond = TemporalFusion.correspond
    monkeypatch.setattr(TemporalFusion, "correspond", lambda *a: calls.append(1) or correspond(*a))
    losses = []
    for teacher in (features, features._replace()):
        losses.append(model(features, teacher, generator=torch.Generator().manual_seed(0))["loss"])
        losses[-1].backward()
    assert len(calls) == 1 + 2
    assert torch.equal(*losses)


def test_activation_map_is_that_of_the_keys_with_their_bias(build, clips):
    model = build(marginal="caam")
    torch.nn.init.normal_(model.encoder.model.blocks[-1].attn.qkv.bias)
    whole = build(marginal="caam", key_center="none")
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(model._mass(model.encode(clips)), whole._mass(whole.encode(clips)))


def test_resolution_and_grid_of_another_shape_trains(build):
    frames = torch.randn(1, 2, 3, 48, 24)
    assert build()(frames, frames)["loss"].isfinite()
    wide = build(image_size=(16, 41))
    assert (wide.grid, wide.frame_size) == ((2, 5), (16, 40))


def test_autocast_keeps_the_losses_in_full_precision(build, clips):
    model = build()
    expected = losses(model, clips)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(model, clips)
    found["loss"].backward()
    for name in ("loss", "semantic", "instance", "diversity"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.student.parameters())


def test_a_resnet_trains():
    from objslot.models import SMTC, SMTCConfig

    model = SMTC(
        SMTCConfig(
            encoder="resnet18",
            pretrained=False,
            image_size=32,
            slots=2,
            instances=2,
            width=32,
            train_encoder=True,
        )
    )
    model(*torch.randn(2, 1, 2, 3, 32, 32).unbind())["loss"].backward()
    assert model.student.project.weight.shape == (32, 256)
    assert model.encoder.model.conv1.weight.grad.abs().sum() > 0
    before = model.teacher_encoder.model.bn1.running_mean.clone()
    model.update_teacher()
    assert torch.equal(model.teacher_encoder.model.bn1.running_mean, model.encoder.model.bn1.running_mean)
    assert not torch.equal(model.teacher_encoder.model.bn1.running_mean, before)


class TestTeacher:
    @pytest.mark.parametrize("train_encoder", [False, True])
    def test_starts_as_a_copy_and_follows_only_by_moving_average(self, build, clips, train_encoder):
        model = build(train_encoder=train_encoder, teacher_momentum=0.9)
        pairs = [(model.student, model.teacher)]
        if train_encoder:
            pairs.append((model.encoder, model.teacher_encoder))
        for student, teacher in pairs:
            assert all(map(torch.equal, student.parameters(), teacher.parameters()))
            assert not any(parameter.requires_grad for parameter in teacher.parameters())
        before = [[p.clone() for p in teacher.parameters()] for _, teacher in pairs]
        optimiser = torch.optim.AdamW(model.parameter_groups(0.1, 0.1, 1.0))
        losses(model, clips)["loss"].backward()
        optimiser.step()
        for (student, teacher), old in zip(pairs, before, strict=True):
            assert all(map(torch.equal, teacher.parameters(), old))
            for new, target in zip(teacher.parameters(), student.parameters(), strict=True):
                assert torch.equal(new, target) != target.requires_grad
        model.update_teacher()
        for (student, teacher), old in zip(pairs, before, strict=True):
            for new, previous, target in zip(teacher.parameters(), old, student.parameters(), strict=True):
                torch.testing.assert_close(new, 0.9 * previous + 0.1 * target)
        assert all(p.grad is None for _, teacher in pairs for p in teacher.parameters())

    @pytest.mark.parametrize(("updates", "momentum"), [(0, 0.99), (1791, 0.995), (10**6, 0.999)])
    def test_the_momentum_rises_to_the_configured_one(self, build, updates, momentum):
        model = build()
        model.teacher_updates.fill_(updates)
        with torch.no_grad():
            model.student.slots.mu.add_(1)
        before = model.teacher.slots.mu.clone()
        model.update_teacher()
        torch.testing.assert_close(model.teacher.slots.mu, before + 1 - momentum)
        assert model.teacher_updates == updates + 1

    def test_teacher_stays_in_eval_mode(self, build):
        model = build(train_encoder=True)
        model.train()
        assert model.student.training
        assert model.encoder.model.training
        assert not model.teacher.training
        assert not model.teacher_encoder.model.training

    def test_a_frozen_encoder_is_shared(self, build, clips):
        model = build()
        encoder_names = [name for name in model.state_dict() if "encoder" in name]
        assert len(encoder_names) == len(model.encoder.state_dict())
        assert torch.equal(model.encode(clips).keys, model.encode(clips, use_teacher=True).keys)

    def test_the_encoder_can_wait(self, build, clips):
        model = build(train_encoder=True)
        model.set_encoder_training(False)
        losses(model, clips)["loss"].backward()
        assert model.encoder.model.patch_embed.proj.weight.grad is None
        model.set_encoder_training(True)
        losses(model, clips)["loss"].backward()
        assert model.encoder.model.patch_embed.proj.weight.grad.abs().sum() > 0
        with pytest.raises(UserError, match="frozen by its configuration"):
            build().set_encoder_training(True)


class TestParameterGroups:
    def test_every_parameter_that_learns_is_in_one_group(self, build):
        for options in ({}, {"train_encoder": True, "update": "gru", "width": 16}):
            model = build(**options)
            grouped = [id(p) for group in model.parameter_groups(1.0, 0.1, 0.01) for p in group["params"]]
            assert len(grouped) == len(set(grouped))
            assert {id(p) for p in model.parameters() if p.requires_grad} <= set(grouped)
            for part in filter(None, (model.teacher, model.teacher_encoder)):
                assert not {id(p) for p in part.parameters()} & set(grouped)
        assert len(build().parameter_groups(1.0, 0.1, 0.01)) == 2

    def test_decay_and_rates(self, build):
        model = build(train_encoder=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = model.parameter_groups(1.0, 0.1, 0.01)
        decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
        rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
        assert {
            "student.slots.query.weight",
            "student.head.0.weight",
            "student.fusion.embed.weight",
        } <= decayed
        assert "encoder.model.patch_embed.proj.weight" in decayed
        for name in ("slots.mu", "slots.log_sigma", "slots.norm_slots.weight", "head.0.bias", "fusion.scale"):
            assert f"student.{name}" not in decayed
            assert rates[f"student.{name}"] == 1.0
        for name in ("pos_embed", "cls_token", "norm.weight"):
            assert f"encoder.model.{name}" not in decayed
            assert rates[f"encoder.model.{name}"] == 0.01


class TestErrors:
    def test_clips_that_do_not_fit(self, build, clips):
        model = build()
        with pytest.raises(UserError, match=r"teacher: got features \(2, 2, 16, 24\)"):
            model(clips, clips[:, :2])
        tall, wide = torch.zeros(1, 2, 3, 16, 32), torch.zeros(1, 2, 3, 32, 16)
        with pytest.raises(UserError, match=r"on grid \(4, 2\)"):
            model(tall, wide)

    def test_clips_of_one_frame(self, build, clips):
        with pytest.raises(UserError, match="at most 0 other frames"):
            build()(clips[:, :1], clips[:, :1])
        with pytest.raises(UserError, match="at least 2"):
            build(sampling="self")(clips[:, :1], clips[:, :1])

    def test_features_of_another_model(self, build):
        features = FrameFeatures(torch.randn(1, 2, 16, 32), None, None, (4, 4))
        with pytest.raises(
            UserError, match=r"student: got keys \(1, 2, 16, 32\) on grid \(4, 4\), expected .* 24"
        ):
            build()(features, features)

    def test_attention_marginal_without_class_attention(self, build, clips):
        from objslot.models import SMTC, SMTCConfig

        with pytest.raises(UserError, match="encoder resnet18 gives no class-token attention"):
            SMTC(SMTCConfig(encoder="resnet18", pretrained=False, marginal="attention"))
        model = build(marginal="attention")
        features = model.encode(clips)._replace(cls_attention=None)
        with pytest.raises(UserError, match="no class-token attention"):
            model(features, features)
