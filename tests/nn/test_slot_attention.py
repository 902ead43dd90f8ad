"""SlotAttention against slot attention written out, and its options."""

import copy

import pytest
import torch
from torch.nn.functional import normalize

from objslot.benchmarks.peers.slots import PlainSlots
from objslot.errors import BackendError
from objslot.nn import SlotAttention, convert_state_dict
from objslot.ops import use_backend


def written_out(module, x, slots, iterations, mask=None):
    """Slot attention as in its Algorithm 1, with the layers of `module`."""
    x = module.norm_inputs(x)
    keys, values = (
        layer(x).unflatten(-1, (module.heads, -1)).transpose(-2, -3) for layer in (module.key, module.value)
    )
    for _ in range(iterations):
        previous = slots
        queries = module.query(module.norm_slots(slots)).unflatten(-1, (module.heads, -1)).transpose(-2, -3)
        weights = (queries @ keys.mT * keys.shape[-1] ** -0.5).softmax(-2) + module.eps
        if mask is not None:
            weights = weights * mask[:, None, None]
        updates = (normalize(weights, p=1, dim=-1) @ values).transpose(-2, -3).flatten(-2)
        if module.combine is not None:
            updates = module.combine(updates)
        if module.gru is None:
            slots = previous + updates
        else:
            slots = module.gru(updates.flatten(0, 1), previous.flatten(0, 1)).view_as(previous)
        slots = slots + module.mlp(module.norm_mlp(slots))
    return slots


def shake(module):
    """Random values in every parameter, so that none is 0 or 1 by construction."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


@pytest.mark.parametrize("update", ["gru", "residual"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [60, 9], ids=["folded", "projected"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_algorithm(update, heads, bias, positions, masked):
    module = shake(SlotAttention(4, 12, input_width=10, heads=heads, update=update, bias=bias))
    assert (module.memory(torch.zeros(1, positions, 10).double(), 12).values is None) == (
        heads == 1 and positions == 60
    )
    x, slots = torch.randn(3, positions, 10).double(), torch.randn(3, 4, 12).double()
    mask = torch.rand(3, positions).double() * (torch.rand(3, positions) > 0.3) if masked else None
    parameters = [parameter for name, parameter in module.named_parameters() if name not in ("mu", "log_sigma")]
    leaves = [leaf.requires_grad_() for leaf in (x, slots)] + parameters
    found = module(x, mask, initial=slots).slots
    wanted = written_out(module, x, slots, 3, mask)
    assert torch.allclose(found, wanted, atol=1e-10)
    upper = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, upper), torch.autograd.grad(wanted, leaves, upper), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 4])
def test_package_weights(heads):
    package = pytest.importorskip("slot_attention")
    if heads == 1:
        theirs = package.SlotAttention(7, 32, hidden_dim=64)
        mine = SlotAttention(7, 32, bias=True, mlp_width=64)
    else:
        theirs = package.MultiHeadSlotAttention(7, 32, heads=heads, dim_head=16, hidden_dim=64)
        mine = SlotAttention(7, 32, bias=True, mlp_width=64, heads=heads, head_width=16)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mine.load_state_dict(convert_state_dict(theirs.state_dict()))
    for positions in (100, 5):
        x = torch.randn(3, positions, 32)
        torch.manual_seed(3)
        wanted = theirs(x)
        torch.manual_seed(3)
        assert (mine(x).slots - wanted).abs().max() < 1e-5


def test_original_names():
    mine = SlotAttention(5, 8)
    names = {"query": "project_q", "key": "project_k", "value": "project_v", "log_sigma": "slots_log_sigma"}
    original = {}
    for name, value in mine.state_dict().items():
        head, dot, tail = name.partition(".")
        original[{**names, "mu": "slots_mu"}.get(head, head) + dot + tail] = (
            value.view(1, 1, -1) if head in ("mu", "log_sigma") else value
        )
    other = SlotAttention(5, 8)
    other.load_state_dict(convert_state_dict(original))
    for name, value in mine.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_initial_slots():
    x = torch.randn(2, 3, 20, 8)
    random = SlotAttention(4, 8)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (random(x, generator=generator) for generator in seeds)
    assert first.slots.shape == (2, 3, 4, 8) and first.attention.shape == (2, 3, 4, 20)
    assert torch.equal(first.slots, again.slots) and not torch.equal(first.slots, other.slots)
    assert random(x, slots=9, iterations=1).slots.shape == (2, 3, 9, 8)
    assert torch.allclose(first.attention.sum(-2), torch.ones(2, 3, 20))
    learned = SlotAttention(4, 8, initial="learned")
    assert torch.equal(learned(x).initial[1, 2], learned.mu)
    with pytest.raises(ValueError, match="slots: this module learned 4"):
        learned(x, slots=5)
    with pytest.raises(ValueError, match="slots: expected None"):
        random(x, slots=4, initial=torch.randn(4, 8))


def test_iterations_and_empty_slots():
    module, x = SlotAttention(4, 8), torch.randn(2, 20, 8)
    initial = torch.randn(2, 4, 8)
    result = module(x, initial=initial, iterations=5, return_iterations=True)
    assert len(result.iterations) == 5 and torch.equal(result.iterations[-1], result.attention)
    for count in (1, 3):
        assert torch.allclose(module(x, initial=initial, iterations=count).attention, result.iterations[count - 1])
    nothing = torch.zeros(2, 20)
    nothing[1] = 1
    assert module(x, nothing, initial=initial).slots.isfinite().all()
    residual = SlotAttention(4, 8, update="residual", iterations=1)
    wanted = initial[0] + residual.mlp(residual.norm_mlp(initial[0]))
    assert torch.allclose(residual(x, nothing, initial=initial).slots[0], wanted)


def test_only_the_last_iteration():
    """Same values; gradients of one step from the slots before it, passed straight on to the initial slots."""
    full = shake(SlotAttention(4, 8))
    last = SlotAttention(4, 8, gradient="last").double()
    last.load_state_dict(full.state_dict())
    x, initial = torch.randn(2, 20, 8).double(), torch.randn(2, 4, 8).double().requires_grad_()
    found = last(x, initial=initial)
    assert torch.equal(found.slots, full(x, initial=initial).slots)
    before = full(x, initial=initial, iterations=2).slots.detach().requires_grad_()
    one = full(x, initial=before, iterations=1).slots
    upper = torch.randn_like(one)
    parameters = [name for name, _ in full.named_parameters() if name not in ("mu", "log_sigma")]
    mine = torch.autograd.grad(found.slots, [initial, *(last.get_parameter(name) for name in parameters)], upper)
    theirs = torch.autograd.grad(one, [before, *(full.get_parameter(name) for name in parameters)], upper)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_compile_and_autocast():
    module, x = SlotAttention(4, 8), torch.randn(2, 20, 8)
    initial = torch.randn(2, 4, 8)
    compiled = torch.compile(lambda x, initial: module(x, initial=initial).slots, fullgraph=True)
    assert torch.allclose(compiled(x, initial), module(x, initial=initial).slots, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x, initial=initial).slots
    low.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(("slots", "positions", "width"), [(4, 20, 8), (7, 100, 64), (16, 40, 48), (33, 150, 32)])
def test_error_under_autocast(slots, positions, width):
    """Slots and gradient of the inputs, in root mean square over seeds, at most twice as far from float64 as those of
    the published module under the same autocast."""
    errors = {name: torch.zeros(2, dtype=torch.float64) for name in ("ours", "plain")}
    for seed in range(8):
        torch.manual_seed(seed)
        ours = _SlotsAlone(slots, width, initial="learned", bias=True)
        plain = PlainSlots(slots, width)
        plain.load_state_dict(ours.state_dict())
        x, upper = torch.randn(2, positions, width), torch.randn(2, slots, width)
        exact = _slots_and_gradient(copy.deepcopy(plain).double(), x.double(), upper.double(), low=False)
        for name, module in (("ours", ours), ("plain", plain)):
            found = _slots_and_gradient(module, x, upper, low=True)
            errors[name] += torch.stack([(a - b).square().mean() for a, b in zip(found, exact, strict=True)])
    assert (errors["plain"] > 0).all()
    assert (errors["ours"].sqrt() <= 2 * errors["plain"].sqrt()).all(), errors


class _SlotsAlone(SlotAttention):
    def forward(self, x):
        return super().forward(x).slots


def _slots_and_gradient(module, x, upper, *, low):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        found = module(x)
    (grad,) = torch.autograd.grad(found.to(upper.dtype), x, upper)
    return found.detach().double(), grad.double()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots: expected at least 1"),
        ({"heads": 3}, "heads: expected a divisor"),
        ({"update": "lstm"}, "update: expected one of"),
        ({"initial": "zeros"}, "initial: expected one of"),
        ({"gradient": "none"}, "gradient: expected one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SlotAttention(**{"slots": 4, "width": 8, **options})


def test_bad_inputs():
    module = SlotAttention(4, 8)
    with pytest.raises(ValueError, match="x: expected width 8"):
        module(torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match="mask: expected shape"):
        module(torch.zeros(2, 5, 8), torch.ones(2, 6))
    with pytest.raises(ValueError, match="iterations: expected at least 1"):
        module(torch.zeros(2, 5, 8), iterations=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("update", ["gru", "residual"])
def test_half_types(dtype, update):
    """As near to float64 as the layers one after the other in that dtype, values and gradients."""
    torch.manual_seed(0)
    module = shake(SlotAttention(16, 64, update=update, bias=True)).to(dtype)
    tensors = [torch.randn(4, 96, 64).to(dtype), torch.randn(4, 16, 64).to(dtype), torch.rand(4, 96).to(dtype)]
    exact = copy.deepcopy(module).double()

    def run(function, model, inputs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        found = function(model, *leaves)
        return [found, *torch.autograd.grad(found, [*leaves, model.key.weight], torch.ones_like(found))]

    def ours(model, x, slots, mask):
        return model(x, mask, initial=slots).slots

    def plain(model, x, slots, mask):
        return written_out(model, x, slots, 3, mask)

    wanted = run(plain, exact, [tensor.double() for tensor in tensors])
    for mine, theirs, best in zip(run(ours, module, tensors), run(plain, module, tensors), wanted, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - best).norm() <= 2 * (theirs.double() - best).norm()


def test_a_backend_that_has_the_core_alone():
    module = SlotAttention(4, 16)
    with use_backend("triton"), pytest.raises(BackendError, match="needs a CUDA tensor, got one on cpu"):
        module(torch.randn(2, 40, 16))
