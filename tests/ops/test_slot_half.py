"""The iterations of slot attention in bfloat16, without gradient: against plain PyTorch, and by the modules."""

import pytest
import torch
from slot_cases import distance, noise
from test_slot_loop import EPS, SCALE, plain, problem
from torch.nn.functional import layer_norm

from objslot import nn, use_backend
from objslot.ops import _native
from objslot.ops.slot_loop import half

native = _native.load()
pytestmark = pytest.mark.skipif(
    native is None or not native.multiplies_on_tiles(), reason="needs tiles of bfloat16"
)

# (batch, groups, slots, positions, width, input width, hidden)
SHAPES = [
    (1, 1, 1, 1, 3, 4, 1),
    (2, 1, 16, 196, 64, 64, 128),
    (3, 2, 7, 63, 15, 33, 17),
    (2, 16, 4, 70, 40, 48, 50),
    (1, 1, 5, 1100, 8, 12, 9),
    (20, 1, 15, 9, 96, 49, 100),
]


def arguments(shape, **options):
    """Normalised inputs, mask, initial slots and layers in bfloat16."""
    x, *rest = problem(shape, **options)
    return [None if y is None else y.bfloat16() for y in (layer_norm(x, x.shape[-1:]), *rest)]


def run(x, mask, initial, *layers, iterations=3, return_iterations=False):
    assert half.serves(x, initial, mask, layers)
    return half.forward(
        x, initial, mask, layers, scale=SCALE, eps=EPS, iterations=iterations, return_iterations=return_iterations
    )


def exact(x, *rest):
    """`plain` on inputs that are normalised as they are."""
    scaled = [None if y is None else y.double() for y in (x, *rest)]
    return plain(*scaled, normalise=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["gru", "residual", "masked"])
def test_error_budget(shape, variant):
    given = arguments(shape, gru=variant != "residual", masked=variant == "masked", biased=variant != "residual")
    found, own, wanted = run(*given)[:2], plain(*given, normalise=False), exact(*given)
    for mine, theirs, right in zip(found, own, wanted, strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == right.shape
        assert distance(mine, right) <= max(2 * distance(theirs, right), 2 * torch.finfo(torch.bfloat16).eps)


def test_iterations_and_threads():
    given = arguments(SHAPES[3], masked=True)
    slots, logits, history = run(*given, return_iterations=True)
    assert history.shape == (2, *logits.shape) and run(*given)[2].numel() == 0
    for step in (1, 2):
        assert torch.equal(run(*given, iterations=step)[1], history[step - 1])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(*given)[0], slots)
    finally:
        torch.set_num_threads(before)


def test_left_out_positions_nan_and_empty():
    given = arguments(SHAPES[2], masked=True)
    unread = (given[1] == 0).all(-2).unsqueeze(-1)
    wanted = run(*given)[:2]
    spoilt = run(given[0].masked_fill(unread, torch.nan), *given[1:])[:2]
    assert all(torch.equal(a, b) for a, b in zip(wanted, spoilt, strict=True))
    given[2] = given[2].clone()
    given[2][1, 0, 3, 2] = torch.nan
    for mine, theirs in zip(run(*given)[:2], wanted, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]]) and mine[1, 0].isnan().any()
    empty = run(*[y if i > 2 or y is None else y[:0] for i, y in enumerate(given)])
    assert empty[0].shape == (0, *wanted[0].shape[1:])


def test_strides():
    x, mask, initial, *layers = arguments(SHAPES[3])
    wanted = run(x[:1].repeat(3, 1, 1), mask, initial[:1].repeat(3, 1, 1, 1), *layers)[:2]
    turned = [y if y is None or y.dim() < 2 else y.mT.contiguous().mT for y in layers]
    found = run(x[:1].expand(3, -1, -1), mask, initial[:1].expand(3, -1, -1, -1), *turned)[:2]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_whom_it_serves():
    x, mask, initial, *layers = arguments(SHAPES[1])
    assert half.serves(x, initial, mask, layers)
    assert not half.serves(x.float(), initial, mask, layers)
    assert not half.serves(x, initial, mask, [layers[0].float(), *layers[1:]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half.serves(x, initial, mask, layers)
        assert half.serves(x.float(), initial, mask, [layers[0].float(), *layers[1:]])
        assert not half.serves(x.double(), initial, mask, layers)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not half.serves(x, initial, mask, layers)
    with use_backend("reference"):
        assert not half.serves(x, initial, mask, layers)


class Counter:
    """Stands for `half.forward`: how many iterations it was asked for."""

    def __init__(self, monkeypatch):
        self.iterations, self._forward = [], half.forward
        monkeypatch.setattr(half, "forward", self)

    def __call__(self, *tensors, iterations, **settings):
        assert not torch.is_grad_enabled()
        self.iterations.append(iterations)
        return self._forward(*tensors, iterations=iterations, **settings)


def step_by_step(module, *inputs, **settings):
    """The module's results without this path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half, "serves", lambda *tensors: False)
        return module(*inputs, **settings)


@pytest.mark.parametrize("update", ["gru", "residual"])
def test_module(update, monkeypatch):
    """Wide enough for the path; all iterations where nobody asks for a gradient, otherwise none."""
    module = nn.SlotAttention(6, 192, update=update, initial="learned").bfloat16()
    x = noise(2, 70, 192).bfloat16()
    mask = noise(2, 70, seed=3) > -0.5
    counter = Counter(monkeypatch)
    with torch.no_grad():
        found = module(x, mask, return_iterations=True)
        wanted = step_by_step(module, x, mask, return_iterations=True)
    assert counter.iterations == [3] and len(found.iterations) == 3
    assert torch.equal(found.iterations[-1], found.attention)
    for mine, theirs in zip((*found[:3], *found.iterations), (*wanted[:3], *wanted.iterations), strict=True):
        assert mine.dtype == theirs.dtype and distance(mine, theirs.double()) < 4 * torch.finfo(mine.dtype).eps
    module(x, mask)
    with torch.no_grad():
        module(x[:, :10])
    assert counter.iterations == [3]


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_module_under_autocast(given, monkeypatch):
    """As near to the module in float64 as step by step, in the same dtypes."""
    module = nn.SlotAttention(6, 192, initial="learned")
    x = noise(2, 70, 192).to(given)
    counter = Counter(monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x, return_iterations=True)
        own = step_by_step(module, x, return_iterations=True)
    assert counter.iterations == [3]
    with torch.no_grad():
        wanted = module.double()(x.double(), return_iterations=True)
    for mine, theirs, right in zip(*((*one[:3], *one.iterations) for one in (found, own, wanted)), strict=True):
        assert mine.dtype == theirs.dtype
        assert distance(mine, right) <= max(2 * distance(theirs, right), 2 * torch.finfo(torch.bfloat16).eps)


def test_semantic_module(monkeypatch):
    """The iterations before the last have no gradient: they take the path in training, too."""
    module = nn.SemanticSlotAttention(4, 192, instances=2).bfloat16()
    x, drawn = noise(2, 70, 192).bfloat16(), noise(4, 2, 192, seed=1).bfloat16()
    counter, results = Counter(monkeypatch), []
    for call in (module, lambda *inputs, **settings: step_by_step(module, *inputs, **settings)):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        found = call(leaf, noise=drawn, return_iterations=True)
        (found.instance_slots.sum() + found.semantic_logits.sum()).backward()
        tensors = (found.semantic_slots, found.instance_slots, *found.iterations.instance, leaf.grad)
        results.append([y.detach().double() for y in (*tensors, module.mu.grad, module.value.weight.grad)])
    assert counter.iterations == [2, 2]
    for mine, theirs in zip(*results, strict=True):
        assert distance(mine, theirs) < 8 * torch.finfo(torch.bfloat16).eps
    with torch.no_grad():
        module(x, noise=drawn)
    module(x, noise=drawn, iterations=1)
    assert counter.iterations == [2, 2, 3, 3]
