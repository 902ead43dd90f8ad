"""The losses against their definitions, written out with loops in float64."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from objslot import objectives
from objslot.errors import UserError

B, T, N, P, HW, D = 2, 3, 4, 3, 10, 6


def plan_by_hand(scores, a, b, eps, iterations):
    """Sinkhorn's scaling iterations as published, rows first."""
    kernel = (scores / eps).exp()
    y = torch.ones_like(b)
    for _ in range(iterations):
        x = a / (kernel @ y)
        y = b / (kernel.T @ x)
    return x[:, None] * kernel * y[None, :]


def semantic_by_hand(logits, masks, keys, mass, eps, iterations):
    log_masks, keys = logits.log_softmax(2), F.normalize(keys, dim=-1)
    terms = []
    for clip in range(logits.shape[0]):
        for i in range(logits.shape[1]):
            for j in range(logits.shape[1]):
                if i != j:
                    plan = plan_by_hand(
                        keys[clip, i] @ keys[clip, j].T, mass[clip, i], mass[clip, j], eps, iterations
                    )
                    cross_entropy = -(log_masks[clip, i].T @ masks[clip, j])
                    terms.append((plan * cross_entropy).sum())
    return torch.stack(terms).mean()


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class TestSemanticAlignment:
    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("iterations", [1, 3])
    def test_value_and_gradient(self, uniform, iterations):
        logits, keys = double(B, T, N, HW).requires_grad_(), double(B, T, HW, D)
        masks = double(B, T, N, HW).softmax(2)
        mass = None if uniform else torch.rand(B, T, HW, dtype=torch.float64).softmax(-1)
        explicit = torch.full((B, T, HW), 1 / HW, dtype=torch.float64) if uniform else mass
        found = objectives.semantic_alignment_loss(logits, masks, keys, mass, eps=0.1, n_iters=iterations)
        (gradient,) = torch.autograd.grad(found, logits)
        expected = semantic_by_hand(logits, masks, keys, explicit, 0.1, iterations)
        (expected_gradient,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-9)

    def test_plan_of_many_iterations_has_the_marginals(self):
        keys = double(1, 2, HW, D)
        mass = torch.rand(1, 2, HW, dtype=torch.float64).softmax(-1)
        uniform_teacher = torch.full((1, 2, N, HW), 1 / N, dtype=torch.float64)
        logits = double(1, 2, N, HW)
        found = objectives.semantic_alignment_loss(logits, uniform_teacher, keys, mass, eps=0.1, n_iters=500)
        # With the same mask at every position of j only the row sums of the plan remain.
        expected = -(logits.log_softmax(2).mean(2) * mass).sum(-1).mean()
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)

    def test_permuted_identity_features_give_the_permutation(self):
        order = torch.randperm(HW)
        keys = torch.eye(HW, dtype=torch.float64)
        keys = torch.stack([keys, keys[order]]).unsqueeze(0)
        masks = double(1, 2, N, HW).softmax(2)
        logits = double(1, 2, N, HW)
        found = objectives.semantic_alignment_loss(logits, masks, keys, eps=0.01)
        log_masks = logits.log_softmax(2)
        first = -(log_masks[0, 0][:, order] * masks[0, 1]).sum(0).mean()
        second = -(log_masks[0, 1] * masks[0, 0][:, order]).sum(0).mean()
        torch.testing.assert_close(found, (first + second) / 2, rtol=1e-6, atol=1e-9)

    def test_the_teacher_gets_no_gradient(self):
        logits, masks, keys = (
            double(1, 2, N, HW).requires_grad_(),
            double(1, 2, N, HW).softmax(2).requires_grad_(),
            double(1, 2, HW, D).requires_grad_(),
        )
        objectives.semantic_alignment_loss(logits, masks, keys).backward()
        assert logits.grad.abs().sum() > 0
        assert masks.grad is None
        assert keys.grad is None

    def test_half_precision_inputs_and_hard_masks(self):
        logits = (50 * torch.randn(B, T, N, HW)).bfloat16().requires_grad_()
        masks = F.one_hot(torch.randint(N, (B, T, HW)), N).transpose(-1, -2).bfloat16()
        loss = objectives.semantic_alignment_loss(logits, masks, torch.randn(B, T, HW, D).bfloat16())
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert logits.grad.isfinite().all()

    def test_one_frame(self):
        with pytest.raises(UserError, match="clips of 1 frame"):
            objectives.semantic_alignment_loss(double(1, 1, N, HW), double(1, 1, N, HW), double(1, 1, HW, D))


class TestMarginals:
    def test_uniform_is_none(self):
        assert objectives.marginals("uniform", torch.randn(B, T, HW, D)) is None

    def test_activation_map(self):
        keys = torch.randn(B, T, HW, D)
        found = objectives.marginals("caam", keys)
        activation = keys.clamp_min(0).mean(-1)
        low, high = activation.amin(-1, keepdim=True), activation.amax(-1, keepdim=True)
        expected = ((activation - low) / (high - low)).clamp_min(1e-4)
        torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))
        assert found.min() > 0

    def test_attention(self):
        attention = torch.rand(B, T, HW)
        found = objectives.marginals("attention", torch.randn(B, T, HW, D), attention)
        torch.testing.assert_close(found, attention / attention.sum(-1, keepdim=True), rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("kind", ["caam", "attention"])
    def test_flat_frames_are_uniform(self, kind):
        found = objectives.marginals(kind, torch.zeros(1, 1, HW, D), torch.zeros(1, 1, HW))
        torch.testing.assert_close(found, torch.full((1, 1, HW), 1 / HW))

    def test_errors(self):
        with pytest.raises(UserError, match="no class-token attention"):
            objectives.marginals("attention", torch.zeros(1, 1, HW, D))
        with pytest.raises(UserError, match="got 'cam'"):
            objectives.marginals("cam", torch.zeros(1, 1, HW, D))


def instance_by_hand(student, teacher, student_valid, teacher_valid):
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    total, count, instances = 0.0, 0, student.shape[-2]
    for clip in range(student.shape[0]):
        for i in range(student.shape[1]):
            for j in range(student.shape[1]):
                for n in range(student.shape[2]):
                    similarity = student[clip, i, n] @ teacher[clip, j, n].T
                    _, match = linear_sum_assignment((1 - similarity).detach().numpy())
                    for p in range(instances):
                        if not student_valid[clip, i, n, p]:
                            continue
                        others = [q for q in range(instances) if q != match[p]]
                        term = -float(teacher_valid[clip, j, n, match[p]]) * similarity[p, match[p]]
                        if others:
                            term = (
                                term + torch.stack([(similarity[p, q] - 0.5).relu() for q in others]).mean()
                            )
                        total, count = total + term, count + 1
    return total / count


class TestInstanceAlignment:
    @pytest.mark.parametrize("instances", [1, 2, 3, 5, 6])
    def test_value_and_gradient(self, instances):
        student = double(B, T, N, instances, D).requires_grad_()
        teacher = double(B, T, N, instances, D)
        valid = torch.rand(2, B, T, N, instances) > 0.4
        found = objectives.instance_alignment_loss(student, teacher, *valid)
        (gradient,) = torch.autograd.grad(found, student)
        expected = instance_by_hand(student, teacher, *valid)
        (expected_gradient,) = torch.autograd.grad(expected, student)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, expected_gradient)

    def test_same_instances_in_another_order_are_matched(self):
        student = F.normalize(double(1, 2, N, P, 8), dim=-1)
        student = torch.linalg.qr(student.transpose(-1, -2)).Q.transpose(-1, -2)[:, :1].expand(1, 2, N, P, 8)
        teacher = student[..., torch.tensor([2, 0, 1]), :]
        valid = torch.ones(1, 2, N, P, dtype=torch.bool)
        found = objectives.instance_alignment_loss(student, teacher, valid, valid)
        torch.testing.assert_close(found, torch.tensor(-1.0, dtype=torch.float64))

    def test_nothing_valid_gives_zero_and_a_finite_gradient(self):
        student = double(B, T, N, P, D)
        student[0] = 0
        student.requires_grad_()
        never = torch.zeros(B, T, N, P, dtype=torch.bool)
        loss = objectives.instance_alignment_loss(student, double(B, T, N, P, D), never, never)
        loss.backward()
        assert loss == 0
        assert torch.equal(student.grad, torch.zeros_like(student))

    def test_the_teacher_gets_no_gradient(self):
        student, teacher = double(1, 2, N, P, D).requires_grad_(), double(1, 2, N, P, D).requires_grad_()
        always = torch.ones(1, 2, N, P, dtype=torch.bool)
        objectives.instance_alignment_loss(student, teacher, always, always).backward()
        assert student.grad.abs().sum() > 0
        assert teacher.grad is None


class TestValidInstances:
    def test_each_threshold(self):
        semantic = torch.zeros(1, 1, 2, 10)
        semantic[0, 0, 0, :3] = 0.6
        slots = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
        instances = torch.tensor([[1.0, 1.0], [1.0, 2.0]]).expand(1, 1, 2, 2, 2)

        def valid(**changes):
            settings = {"similarity": 0.5, "threshold": 0.5, "area": 0.2}
            return objectives.valid_instances(semantic, slots, instances, **(settings | changes))[
                0, 0
            ].tolist()

        assert valid() == [[True, False], [False, False]]
        assert valid(similarity=0.4) == [[True, True], [False, False]]
        assert valid(similarity=0.8) == [[False, False], [False, False]]
        assert valid(threshold=0.65) == [[False, False], [False, False]]
        assert valid(area=0.35) == [[False, False], [False, False]]
        assert valid(threshold=-1.0) == [[True, False], [True, False]]


class TestDiversity:
    def test_mean_cosine_of_different_masks(self):
        masks = torch.rand(B, T, N, HW, dtype=torch.float64)
        cosine = F.cosine_similarity(masks.unsqueeze(2), masks.unsqueeze(3), dim=-1)
        different = ~torch.eye(N, dtype=torch.bool)
        torch.testing.assert_close(objectives.diversity_loss(masks), cosine[..., different].mean())

    def test_extremes(self):
        same = torch.ones(1, 1, N, HW)
        apart = F.one_hot(torch.arange(HW) % N, N).T.float().view(1, 1, N, HW)
        torch.testing.assert_close(objectives.diversity_loss(same), torch.tensor(1.0))
        torch.testing.assert_close(objectives.diversity_loss(apart), torch.tensor(0.0))
        assert objectives.diversity_loss(same[:, :, :1]) == 0
        empty = torch.zeros(1, 1, N, HW, requires_grad=True)
        objectives.diversity_loss(empty).backward()
        assert empty.grad.isfinite().all()
