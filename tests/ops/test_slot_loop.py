"""slot_loop against its parts in plain PyTorch, and at the edges of its domain."""

import pytest
import torch
from slot_cases import check_budget, evaluate, noise, soft_mask
from torch.nn.functional import layer_norm, linear

from objslot.errors import BackendError
from objslot.ops import _backends, explain, slot_attention
from objslot.ops.slot_loop import Epsilons, Inputs, Layers, slot_loop, slot_loop_in_turn
from objslot.ops.slot_loop import autograd as registration

BACKENDS = _backends.registered()["slot_loop"]
CPU = [name for name in ("reference", "cpu") if name in BACKENDS]
EPS = Epsilons(1e-3, 1e-5, 1e-4, 1e-3)
SCALE = 0.4

# (batch, groups, slots, positions, width, input width, hidden)
SHAPES = [
    (1, 1, 1, 1, 3, 4, 1),
    (2, 1, 16, 196, 64, 64, 128),
    (3, 2, 7, 63, 15, 33, 17),
    (2, 4, 3, 70, 40, 7, 50),
    (1, 1, 5, 1100, 8, 12, 9),
    (5, 3, 2, 9, 48, 49, 47),
]


def problem(shape, *, gru=True, masked=False, biased=True, holes=True):
    """Inputs, mask, initial slots and layers, in the order of the registered op."""
    batch, groups, slots, positions, width, input_width, hidden = shape
    sizes = registration.layer_sizes(width, input_width, hidden)
    layers = [noise(*size, seed=20 + k) / size[-1] ** (0.5 * (len(size) - 1)) for k, size in enumerate(sizes)]
    if not gru:
        layers[8:12] = [None] * 4
    if not biased:
        layers[1] = layers[3] = None
    mask = soft_mask(batch, groups, positions, holes=holes) if masked else None
    return [noise(batch, positions, input_width) * 3 + 1, mask, noise(batch, groups, slots, width, seed=1), *layers]


def call(backend=None, **options):
    """A function of tensors in the order of the registered op: slots and last logits."""

    def function(x, mask, initial, *layers):
        settings = {"iterations": 3, **options}
        found = slot_loop(x, initial, mask, Layers(*layers), scale=SCALE, eps=EPS, backend=backend, **settings)
        return found[:2]

    return function


def plain(x, mask, initial, *layers, iterations=3, only_last=False, normalise=True):
    """The iterations as one would write them on top of `slot_attention`'s reference."""
    layers = Layers(*layers)
    if normalise:
        x = layer_norm(x, x.shape[-1:], eps=EPS.inputs)
    slots, width = initial, initial.shape[-1:]
    for iteration in range(iterations):
        if only_last and iteration == iterations - 1:
            slots = slots.detach() - initial.detach() + initial
        query = linear(layer_norm(slots, width, layers.norm_slots, layers.norm_slots_bias, EPS.slots), *layers[:2])
        means, logits = slot_attention(
            query[..., :-1], x, None, mask, bias=query[..., -1] * SCALE, scale=SCALE, eps=EPS.softmax,
            return_logits=True, backend="reference",
        )  # fmt: skip
        updates = linear(means, layers.value, layers.value_bias)
        if mask is not None:
            updates = updates * (mask != 0).any(-1)[..., None, None]
        if layers.input_gates is None:
            slots = slots + updates
        else:
            slots = torch.gru_cell(
                updates.reshape(-1, *width), slots.reshape(-1, *width), *layers[8:12]
            ).view_as(slots)  # fmt: skip
        normed = layer_norm(slots, width, layers.norm_mlp, layers.norm_mlp_bias, EPS.mlp)
        slots = slots + linear(linear(normed, *layers[12:14]).relu(), *layers[14:])
    return slots, logits


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["gru", "residual", "masked"])
def test_error_budget(backend, dtype, shape, variant):
    arguments = problem(shape, gru=variant != "residual", masked=variant == "masked", biased=variant != "residual")
    check_budget(call(backend), plain, arguments, dtype)


@pytest.mark.parametrize("backend", CPU)
def test_everything_of_size_one(backend):
    """A norm over one feature gives its bias, and no gradient but rounding."""
    arguments = problem((1,) * 7)
    for mine, theirs in zip(evaluate(call(backend), arguments), evaluate(plain, arguments), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("masked", [False, True])
def test_only_last(backend, masked):
    """Values as ever; the gradient is that of one step from where the earlier ones arrived."""
    arguments = problem(SHAPES[2], masked=masked)
    found = evaluate(call(backend, only_last=True), arguments)
    wanted = evaluate(lambda *tensors: plain(*tensors, only_last=True), arguments)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)

    def kept(iterations):
        sizes = []
        leaves = [x if x is None else x.clone().requires_grad_() for x in arguments]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            call(backend, only_last=True, iterations=iterations)(*leaves)
        return sum(sizes)

    assert kept(2) == kept(6)


@pytest.mark.parametrize("backend", CPU)
def test_iterations_are_those_of_shorter_calls(backend):
    x, mask, initial, *layers = problem(SHAPES[3], masked=True)
    settings = {"scale": SCALE, "eps": EPS, "backend": backend}
    _, last, history = slot_loop(
        x, initial, mask, Layers(*layers), iterations=3, return_iterations=True, **settings
    )
    assert history.shape == (2, *last.shape)
    for step in (1, 2):
        assert torch.equal(call(backend, iterations=step)(x, mask, initial, *layers)[1], history[step - 1])


@pytest.mark.parametrize("backend", CPU)
def test_left_out_positions_nan_and_empty(backend):
    arguments = problem(SHAPES[2], masked=True)
    unread = (arguments[1] == 0).all(-2).unsqueeze(-1)
    found = evaluate(call(backend), arguments)
    spoilt = evaluate(call(backend), [arguments[0].masked_fill(unread, torch.nan), *arguments[1:]])
    assert all(torch.equal(x, y) for x, y in zip(found, spoilt, strict=True))
    arguments[1] = None
    wanted = call(backend)(*arguments)
    arguments[0][1, 3, 2] = torch.nan
    for mine, theirs in zip(call(backend)(*arguments), wanted, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]]) and mine[1].isnan().all()
    empty = evaluate(call(backend), [x if i > 2 or x is None else x[:0] for i, x in enumerate(arguments)])
    assert empty[0].shape == (0, *wanted[0].shape[1:]) and all((x == 0).all() for x in empty)


@pytest.mark.parametrize("backend", CPU)
def test_strided_and_expanded(backend):
    x, mask, initial, *layers = problem(SHAPES[3], masked=True)
    x, mask, initial = x[:1].expand(4, -1, -1), mask[:1].expand(4, -1, -1), initial[:1].expand(4, -1, -1, -1)
    wanted = evaluate(call(backend), [x.contiguous(), mask.contiguous(), initial.contiguous(), *layers])
    turned = [layer if layer.dim() < 2 else layer.mT.contiguous().mT for layer in layers]
    spaced = torch.stack([x, x], 2).flatten(1, 2)[:, ::2].mT.contiguous().mT
    for arguments in ([x, mask, initial, *turned], [spaced, mask, initial, *layers]):
        function = call(backend)
        leaves = [value.detach().requires_grad_() for value in arguments]
        results = function(*leaves)
        upper = [noise(*result.shape, seed=77 + place) for place, result in enumerate(results)]
        found = [*results, *torch.autograd.grad(results, leaves, upper)]
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(found, wanted, strict=True))
    folded = call(backend)(x.unflatten(0, (2, 2)), mask.unflatten(0, (2, 2)), initial.unflatten(0, (2, 2)), *layers)
    assert all(torch.allclose(a.flatten(0, 1), b, rtol=1e-10) for a, b in zip(folded, wanted, strict=False))


@pytest.mark.parametrize("backend", CPU)
def test_second_order_and_registration(backend):
    arguments = problem((2, 2, 3, 5, 4, 3, 5), masked=True, holes=False)
    leaves = [x if x is None else x.requires_grad_() for x in arguments]
    for only_last in (False, True):
        if not only_last:
            function = call(backend, iterations=2)
            assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
        settings = (SCALE, list(EPS), 2, only_last, 1 if only_last else 2, True, backend)
        torch.library.opcheck(torch.ops.objslot.slot_loop, (*leaves, *settings))
    leaves[8 + 3 : 12 + 3] = [None] * 4
    torch.library.opcheck(torch.ops.objslot.slot_loop, (*leaves, SCALE, list(EPS), 1, False, 1, False, backend))


def test_only_the_gradients_asked_for():
    arguments = problem(SHAPES[3], masked=True)
    full = evaluate(call(), arguments)[2:]
    for place in (0, 1, 2, 3, 5, 11, 12, 17):
        leaves = [x.clone().requires_grad_(index == place) for index, x in enumerate(arguments)]
        results = call()(*leaves)
        torch.autograd.backward(results, [noise(*r.shape, seed=77 + index) for index, r in enumerate(results)])
        assert torch.equal(leaves[place].grad, full[place])
    with torch.no_grad():
        assert not call()(*leaves)[0].requires_grad


def test_threads_do_not_change_the_result():
    """However many parts of the batch they take together."""
    before = torch.get_num_threads()
    for shape in (SHAPES[4], (200, 1, 7, 30, 32, 32, 48), (45, 3, 8, 9, 17, 33, 20)):
        arguments, found = [x if x is None else x.float() for x in problem(shape, masked=True)], []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(evaluate(call("cpu"), arguments))
        finally:
            torch.set_num_threads(before)
        for others in found[1:]:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], others, strict=True))


@pytest.mark.parametrize("shape", [(200, 1, 7, 30, 32, 32, 48), (600, 1, 1, 5, 40, 24, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_budget_of_many_parts(shape, dtype):
    check_budget(call(), plain, problem(shape, masked=True), dtype)


def two_stages(inputs, mask, initial, later, *, apart=False, **options):
    """Slots and logits of two calls, the second inside the semantics of the first."""
    settings = {"scale": SCALE, "eps": EPS, "iterations": 2, **options}
    slots, logits, _, handed = slot_loop_in_turn(inputs, initial, mask, **settings)
    inside = logits.softmax(-2).squeeze(-3)
    found = slot_loop_in_turn(inputs if apart else handed, later, inside, **settings)
    return slots, logits, *found[:2]


@pytest.mark.parametrize("only_last", [False, True])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (0,), (2,), (3,)])
def test_calls_in_turn_add_up_their_gradients(only_last, chosen):
    x, _, initial, *layers = problem((40, 1, 5, 30, 12, 13, 20))
    later, mask = noise(40, 5, 2, 12, seed=5), soft_mask(40, 1, 30)
    mask[0] = 1
    results = []
    for apart in (False, True):
        leaves = [value.clone().requires_grad_() for value in (x, mask, initial, later, *layers)]
        inputs = Inputs(leaves[0], Layers(*leaves[4:]))
        found = two_stages(inputs, *leaves[1:4], apart=apart, only_last=only_last)
        total = sum((noise(*found[k].shape, seed=k) * found[k]).sum() for k in chosen)
        first = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        results.append([*found, *first, *again])
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_calls_in_turn_with_frozen_inputs_or_layers():
    x, _, initial, *layers = problem((4, 1, 5, 30, 12, 13, 20))
    later = noise(4, 5, 2, 12, seed=5)
    for learned in ((0,), (3,), (4, 6, 16)):
        results = []
        for apart in (False, True):
            values = enumerate((x, initial, later, *layers))
            leaves = [value.clone().requires_grad_(place in learned) for place, value in values]
            found = two_stages(Inputs(leaves[0], Layers(*leaves[3:])), None, *leaves[1:3], apart=apart)
            wanted = [leaves[place] for place in learned]
            results.append(torch.autograd.grad(sum(part.square().sum() for part in found), wanted))
        for mine, theirs in zip(*results, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_compile():
    arguments = [x if x is None else x.float() for x in problem(SHAPES[2], masked=True)]
    compiled = torch.compile(call(), fullgraph=True)
    for mine, theirs in zip(evaluate(compiled, arguments), evaluate(call(), arguments), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_backends_and_bad_arguments():
    x, mask, initial, *layers = problem(SHAPES[2])
    layers = Layers(*layers)
    settings = {"scale": SCALE, "eps": EPS, "iterations": 2}
    assert explain(slot_loop, x).chosen in ("cpu", "reference")
    with pytest.raises(BackendError, match="slot_loop has no triton kernels"):
        slot_loop(x, initial, mask, layers, backend="triton", **settings)
    for arguments, options, error, message in (
        ((x.half(), initial), {}, TypeError, "x: expected float32 or float64"),
        ((x, initial[:1]), {}, ValueError, "initial: expected shape"),
        ((x, initial.float()), {}, TypeError, "initial: expected float64"),
        ((x, initial), {"iterations": 0}, ValueError, "iterations: expected at least 1"),
        ((x, initial), {"scale": 0.0}, ValueError, "scale: expected"),
        ((x, initial), {"eps": EPS._replace(inputs=0.0)}, ValueError, "eps.inputs: expected"),
    ):
        with pytest.raises(error, match=message):
            slot_loop(*arguments, mask, layers, **{**settings, **options})
    with pytest.raises(ValueError, match="layers.value: expected shape"):
        slot_loop(x, initial, mask, layers._replace(value=layers.query), **settings)


@pytest.mark.parametrize("factor", [1e-31, 1e-22, 1e22, 1e31])
def test_layers_of_huge_and_tiny_weights(factor):
    """A matrix whose entries no bfloat16 tile holds, undone by the next one, and one output unlike the others."""
    x, mask, initial, *layers = problem((2, 2, 16, 40, 48, 40, 64))
    layers[12], layers[13], layers[14] = layers[12] * factor, layers[13] * factor, layers[14] / factor
    layers[2][5] *= min(factor, 1 / factor)
    check_budget(call(iterations=1), lambda *y: plain(*y, iterations=1), (x, mask, initial, *layers), torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_odd_slots_stay_in_their_element(value):
    x, mask, initial, *layers = (None if y is None else y.float() for y in problem((4, 1, 16, 40, 48, 40, 64)))
    wanted = evaluate(call(), (x, mask, initial, *layers))[:4]
    initial[1, 0, 3, 7] = value
    for mine, theirs in zip(evaluate(call(), (x, mask, initial, *layers))[:4], wanted, strict=True):
        assert torch.equal(mine[[0, 2, 3]], theirs[[0, 2, 3]])
