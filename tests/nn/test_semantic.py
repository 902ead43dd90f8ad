"""SemanticSlotAttention: its two stages, what its gradient reaches, and its options."""

import pytest
import torch

from objslot.nn import SemanticSlotAttention, SlotAttention

N, P, D, POSITIONS = 5, 3, 8, 40


def inputs(*batch):
    return torch.randn(*batch, POSITIONS, D, dtype=torch.float64)


def module(**options):
    return SemanticSlotAttention(N, D, instances=P, **options).double()


def test_shapes():
    x = inputs(2, 4)
    result = module()(x, return_iterations=True)
    assert result.semantic_slots.shape == (2, 4, N, D) and result.instance_slots.shape == (2, 4, N, P, D)
    assert result.semantic.shape == result.semantic_logits.shape == (2, 4, N, POSITIONS)
    assert result.instance.shape == result.instance_logits.shape == (2, 4, N, P, POSITIONS)
    assert result.initial_instances.shape == (N, P, D)
    assert torch.allclose(result.semantic.sum(-2), torch.ones(()).double())
    assert torch.allclose(result.instance.sum(-2), torch.ones(()).double())
    assert len(result.iterations.semantic) == len(result.iterations.instance) == 3
    assert torch.equal(result.iterations.semantic[-1], result.semantic)
    assert torch.equal(result.iterations.instance[-1], result.instance)
    assert not result.iterations.instance[0].requires_grad


@pytest.mark.parametrize("update", ["residual", "gru"])
def test_stages_are_plain_slot_attention(update):
    """Stage 1 is one group from mu; with aggregation "none", stage 2 is N groups that do not see one another."""
    both = module(update=update, aggregation="none")
    plain = SlotAttention(N, D, update=update).double()
    state = {name: value for name, value in both.state_dict().items() if name not in ("mu", "log_sigma")}
    plain.load_state_dict(state, strict=False)
    x, noise = inputs(2), torch.randn(N, P, D).double()
    result = both(x, noise=noise)
    first = plain(x, initial=both.mu)
    assert torch.allclose(result.semantic_slots, first.slots) and torch.allclose(result.semantic, first.attention)
    start = both.mu[:, None] + both.sigma[:, None] * noise
    assert torch.equal(result.initial_instances, start)
    for n in range(N):
        group = plain(x, initial=start[n])
        assert torch.allclose(result.instance_slots[:, n], group.slots)
        assert torch.allclose(result.instance[:, n], group.attention)


@pytest.mark.parametrize("aggregation", ["soft", "hard", "raw_logit"])
def test_instances_stay_inside_their_semantics(aggregation):
    both = module(aggregation=aggregation)
    plain = SlotAttention(N, D, update="residual").double()
    state = {name: value for name, value in both.state_dict().items() if name not in ("mu", "log_sigma")}
    plain.load_state_dict(state, strict=False)
    x, noise = inputs(2), torch.randn(N, P, D).double()
    result = both(x, noise=noise)
    inside = {
        "soft": result.semantic,
        "hard": torch.nn.functional.one_hot(result.semantic.argmax(-2), N).mT.double(),
        "raw_logit": (result.semantic_logits > 0.3).double(),
    }[aggregation]
    for n in range(N):
        group = plain(x, inside[:, n], initial=result.initial_instances[n])
        assert torch.allclose(result.instance_slots[:, n], group.slots)


def test_straight_through_gradients():
    """Values do not change, mu and sigma get a gradient, and earlier iterations give none to the layers."""
    last, full = module(), module(full_bptt=True)
    full.load_state_dict(last.state_dict())
    x, noise = inputs(2), torch.randn(N, P, D).double()
    result = last(x, noise=noise)
    for mine, theirs in zip(result[:7], full(x, noise=noise)[:7], strict=True):
        assert torch.allclose(mine, theirs)

    def gradients(net, *loss):
        net.zero_grad()
        sum(term.square().sum() for term in loss).backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    found = gradients(last, result.semantic_slots, result.instance_slots)
    assert found["mu"].abs().sum() > 0 and found["log_sigma"].abs().sum() > 0
    assert not torch.allclose(found["query.weight"], gradients(full, *full(x, noise=noise)[:2])["query.weight"])

    # Stage 1 alone: the gradient is that of one step from where the earlier steps arrived.
    found = gradients(last, last(x, noise=noise).semantic_slots)
    arrived = full(x, noise=noise, iterations=2).semantic_slots.detach().requires_grad_()
    memory = full.memory(x, 1)
    slots, _ = full.step(arrived.unsqueeze(-3), memory, None, want_logits=False)
    wanted = gradients(full, slots)
    assert "log_sigma" not in wanted
    assert torch.allclose(found["mu"], arrived.grad.sum(0))
    for name in ("query.weight", "key.weight", "value.weight", "mlp.0.weight", "norm_inputs.weight"):
        assert torch.allclose(found[name], wanted[name])


def test_memory_does_not_grow_with_iterations():
    def kept(iterations):
        sizes = []
        net = module()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            net(inputs(2), iterations=iterations)
        return sum(sizes)

    assert kept(2) == kept(7)


def test_other_numbers_at_call_and_noise():
    net, x = module(), inputs(2, 3)
    for instances in (1, 2, 7):
        result = net(x, instances=instances, iterations=4)
        assert result.instance_slots.shape == (2, 3, N, instances, D)
        assert all(value.isfinite().all() for value in result[:7])
    single = net(x, instances=1).instance
    assert torch.equal(single, torch.ones_like(single))
    a, b = (net(x, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a.instance_slots, b.instance_slots)
    noise = torch.randn(2, 1, N, P, D).double()
    result = net(x, noise=noise)
    assert result.initial_instances.shape == (2, 1, N, P, D)
    alone = net(x[1], noise=noise[1, 0])
    assert torch.allclose(result.instance_slots[1], alone.instance_slots)
    with pytest.raises(ValueError, match="noise: expected shape"):
        net(x, noise=torch.randn(N, P, D + 1).double())
    with pytest.raises(ValueError, match="instances: expected 3, as many as in noise"):
        net(x, noise=torch.randn(N, P, D).double(), instances=4)


def test_single_instance_trains():
    net = SemanticSlotAttention(N, D, instances=1).double()
    result = net(inputs(2))
    (result.instance.sum() + result.instance_slots.square().sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_masked_positions_are_not_read():
    net, x = module(), inputs(2)
    mask = torch.rand(2, POSITIONS) > 0.3
    noise = torch.randn(N, P, D).double()
    kept = net(x[:1, mask[0]], noise=noise)
    spoilt = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    result = net(spoilt, mask, noise=noise)
    assert torch.allclose(result.semantic_slots[:1], kept.semantic_slots)
    assert torch.allclose(result.instance_slots[:1], kept.instance_slots)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantics": 0}, "semantics: expected at least 1"),
        ({"instances": 0}, "instances: expected at least 1"),
        ({"aggregation": "sharp"}, "aggregation: expected one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SemanticSlotAttention(**{"semantics": 4, "width": 8, **options})
