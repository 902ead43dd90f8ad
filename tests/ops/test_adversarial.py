"""What nobody passes on purpose: values at the edge, odd memory, other contexts."""

import copy
import math
import pickle

import pytest
import torch
from adversarial_cases import EVERY, assert_alike, assert_same, case, clones
from op_cases import check_error, fill, make, mass
from torch._subclasses.fake_tensor import FakeTensorMode

from objslot import nn, ops


@EVERY
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-42, 3.4e38], ids=str)
def test_poison_stays_in_its_element(op, backend, poison):
    """Whatever one element of the batch holds, in any argument, the others are what they were, to the bit."""
    clean = case(op)
    wanted = clean.run(backend=backend)
    for place, x in enumerate(clean.inputs):
        if x is None:
            continue
        inputs = clones(clean.inputs)
        inputs[place][1].view(-1)[0] = abs(poison) if is_mass(op, place) else poison
        inputs[place][1].view(-1)[-1] = abs(poison) if is_mass(op, place) else poison
        for mine, theirs in zip(clean.run(inputs, backend=backend), wanted, strict=True):
            assert torch.equal(mine[[0, 2]], theirs[[0, 2]]), f"argument {place}"


def is_mass(op, place) -> bool:
    return place >= {"sinkhorn": 1, "sinkhorn_potentials": 1, "sinkhorn_transport": 3, "slot_softmax": 1}.get(
        op, 9
    ) or (op == "slot_attention" and place == 3)


@EVERY
def test_nan_comes_out_as_nan(op, backend):
    if op == "assign":
        pytest.skip("its results are numbers of columns")
    clean = case(op)
    inputs = clones(clean.inputs)
    inputs[0][1] = math.nan
    result = clean.run(inputs, gradient=False, backend=backend)[0]
    # A query that is nowhere near anything has the labels of nothing: see propagate.
    assert result[1].isnan().any() and not result[0].isnan().any()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_denormal_numbers_are_numbers(op, backend, dtype):
    clean = case(op, dtype)
    scale = torch.finfo(dtype).tiny / 16
    inputs = [x if x is None or is_mass(op, i) else x * scale for i, x in enumerate(clean.inputs)]
    for result in clean.run(inputs, backend=backend):
        assert result.isfinite().all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_negative_scores_at_a_small_eps(op, backend, dtype):
    """Beyond the end of such a row its kernel is infinite: nothing of it may reach the gradient."""
    if op not in ("sinkhorn", "sinkhorn_potentials"):
        pytest.skip("has no eps of scores")
    sizes, masses, layouts = (9, 5, 1, 1, 1), ("none", "normal"), ["contiguous"] * 5
    low = make(op, (3,), sizes, "normal", masses, layouts, dtype, 0, eps=1e-3, n_iters=3)
    low.inputs[0] = low.inputs[0] - 5
    check_error(low, dtype, backend)


@EVERY
@pytest.mark.parametrize("batch", [(0,), (0, 3), (3, 0)], ids=str)
def test_empty_batches(op, backend, batch):
    found, wanted = case(op, batch=batch), case(op, batch=(1,))
    for result, example in zip(found.run(backend=backend), wanted.run(), strict=True):
        assert result.shape == (*batch, *example.shape[1:]) and result.dtype == example.dtype


@EVERY
def test_zero_strides_everywhere(op, backend):
    """Every tensor one number in memory, gradients too."""
    plain = case(op)
    inputs = [None if x is None else x.flatten()[:1].abs().expand(x.shape) for x in plain.inputs]
    results = plain.run(inputs, gradient=False, backend=backend)
    upper = [torch.full((1,), 0.5, dtype=torch.float64).expand(result.shape) for result in results]
    found = plain.run(inputs, backend=backend, upper=upper)
    wanted = plain.run(clones(inputs), backend=backend, upper=clones(upper))
    assert_alike(op, backend, found, wanted)


@EVERY
def test_overlapping_memory(op, backend):
    """Rows that share their elements: each begins one element after the one before."""
    plain = case(op)
    inputs = []
    for place, x in enumerate(plain.inputs):
        if x is None:
            inputs.append(x)
            continue
        held = fill("normal", place, sum(x.shape)).to(x.dtype).abs()
        inputs.append(held.as_strided(x.shape, [1] * x.dim()))
    assert_alike(op, backend, plain.run(inputs, backend=backend), plain.run(clones(inputs), backend=backend))
    held = [fill("normal", 9, sum(r.shape) + 1) for r in plain.run(gradient=False)]
    upper = [h.as_strided(r.shape, [1] * r.dim()) for h, r in zip(held, plain.run(gradient=False), strict=True)]
    assert_alike(op, backend, plain.run(backend=backend, upper=upper), plain.run(backend=backend, upper=clones(upper)))


@EVERY
@pytest.mark.parametrize("layout", ["transposed", "stepped", "offset", "batch last"])
def test_odd_memory_gives_the_same(op, backend, layout):
    odd = case(op, layout=layout)
    assert_alike(
        op,
        backend,
        odd.run(backend=backend),
        odd.run(clones([x if x is None else x.contiguous() for x in odd.inputs]), backend=backend),
    )


@EVERY
def test_inputs_are_not_written_to(op, backend):
    plain = case(op)
    before = clones(plain.inputs)
    plain.run(backend=backend)
    assert_same([x for x in plain.inputs if x is not None], [x for x in before if x is not None])


@EVERY
def test_gradients_reach_the_base_of_a_view(op, backend):
    if op == "assign":
        pytest.skip("has no gradient")
    plain = case(op)
    bases = [None if x is None else torch.cat([x, x + 1]).requires_grad_() for x in plain.inputs]
    views = [None if base is None else base[3:] if i % 2 else base[:3] for i, base in enumerate(bases)]
    copies = [None if x is None else x.detach().clone().requires_grad_() for x in views]
    for leaves in (views, copies):
        _total(op, leaves, plain.options, backend).backward()
    for i, (base, leaf) in enumerate(zip(bases, copies, strict=True)):
        if base is not None:
            used, unused = (base.grad[3:], base.grad[:3]) if i % 2 else (base.grad[:3], base.grad[3:])
            assert torch.equal(used, leaf.grad) and not unused.any()


@EVERY
def test_an_argument_changed_before_the_backward_is_an_error(op, backend):
    if op == "assign":
        pytest.skip("has no gradient")
    plain = case(op)
    leaves = [None if x is None else x.clone().requires_grad_() for x in plain.inputs]
    held = [None if x is None else x * 1 for x in leaves]
    total = _total(op, held, plain.options, backend)
    with torch.no_grad():
        for x in held:
            if x is not None:
                x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def _total(op, inputs, options, backend):
    words = {"bias": inputs[4]} if op == "slot_attention" else {}
    results = getattr(ops, op)(*inputs[: 4 if words else None], **words, **options, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    return sum((result * (1 + torch.arange(result.shape[-1]))).sum() for result in results)


@EVERY
def test_inference_mode_and_no_grad(op, backend):
    plain = case(op)
    wanted = plain.run(gradient=False, backend=backend)
    with torch.no_grad():
        assert_same(plain.run(gradient=False, backend=backend), wanted)
    with torch.inference_mode():
        inputs = clones(plain.inputs)
        assert_same(plain.run(inputs, gradient=False, backend=backend), wanted)
    # Tensors made there cannot be saved for a backward, which PyTorch says; they can be used.
    assert_same(
        plain.run([None if x is None else x.clone() for x in inputs], backend=backend), plain.run(backend=backend)
    )


@EVERY
def test_torch_func_or_a_clear_refusal(op, backend):
    """`torch.func` gives what autograd gives, or raises an error of PyTorch's: never a wrong result."""
    plain = case(op)
    if op == "assign":
        return
    wanted = plain.run(backend=backend)
    places = [i for i, x in enumerate(plain.inputs) if x is not None]

    def total(first):
        return _weighted(op, [first, *plain.inputs[1:]], plain.options, backend)

    try:
        found = torch.func.grad(total)(plain.inputs[0])
    except (RuntimeError, NotImplementedError):
        found = None
    if found is not None:
        torch.testing.assert_close(found, wanted[-len(places)], rtol=1e-4, atol=1e-6)
    words = {"bias": plain.inputs[4]} if op == "slot_attention" else {}
    positional = plain.inputs[: 4 if words else None]

    def one(*given):
        given = list(given)
        named = {name: given.pop() for name in words}
        return getattr(ops, op)(*given, **named, **plain.options, backend=backend)

    try:
        mapped = torch.func.vmap(one, in_dims=tuple(None if x is None else 0 for x in [*positional, *words.values()]))(
            *positional, *words.values()
        )
    except (RuntimeError, NotImplementedError):
        return
    mapped = mapped if isinstance(mapped, tuple) else (mapped,)
    for mine, theirs in zip(mapped, wanted, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def _weighted(op, inputs, options, backend):
    words = {"bias": inputs[4]} if op == "slot_attention" else {}
    results = getattr(ops, op)(*inputs[: 4 if words else None], **words, **options, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    uppers = [fill("normal", 77 + place, *result.shape).to(result.dtype) for place, result in enumerate(results)]
    return sum((result * upper).sum() for result, upper in zip(results, uppers, strict=True))


def test_modules_are_copied_and_pickled():
    x = torch.randn(2, 30, 16)
    for module, call in (
        (nn.SlotAttention(5, 16), lambda m: m(x, generator=torch.Generator().manual_seed(0))),
        (nn.SemanticSlotAttention(3, 16, instances=2), lambda m: m(x, generator=torch.Generator().manual_seed(0))),
    ):
        wanted = _tensors(call(module))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_same(_tensors(call(other)), wanted)
    explanation = ops.explain(ops.sinkhorn, x)
    assert pickle.loads(pickle.dumps(explanation)) == explanation == copy.deepcopy(explanation)


def _tensors(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    return [x for part in result if part is not None for x in _tensors(part)]


@EVERY
def test_results_can_be_copied_and_pickled(op, backend):
    result = case(op).run(gradient=False, backend=backend)[0]
    assert_same([copy.deepcopy(result), pickle.loads(pickle.dumps(result))], [result, result])


@EVERY
def test_shapes_of_more_than_two_to_the_31_elements(op, backend):
    """Shapes alone, without memory: sizes and products of sizes are 64 bits wide."""
    with FakeTensorMode():
        small = case(op, batch=(1,), sizes=(4, 5, 3, 2, 1))
        large = [None if x is None else torch.empty((2**31 + 5, *x.shape[1:])) for x in small.inputs]
        results = small.run(large, gradient=False, backend=backend)
    for result in results:
        assert result.shape[0] == 2**31 + 5 and result.numel() > 2**31


@EVERY
def test_elements_more_than_two_to_the_31_apart(op, backend, tmp_path):
    """Two batch elements at the ends of a sparse file: offsets in elements do not fit 32 bits."""
    plain = case(op, torch.float16, batch=(2,))
    inputs = []
    for place, x in enumerate(plain.inputs):
        if x is None:
            inputs.append(x)
            continue
        far = 2**31 + 40
        size = far + x[0].numel()
        held = torch.from_file(str(tmp_path / f"{place}"), shared=True, size=size, dtype=x.dtype)
        apart = held.as_strided(x.shape, (far, *x[0].stride()))
        apart.copy_(x)
        inputs.append(apart)
    assert_same(plain.run(inputs, backend=backend), plain.run(backend=backend))


def test_masses_and_masks_of_other_kinds():
    """What is close to right is named, not used."""
    scores = torch.randn(2, 4, 5)
    for wrong in (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 5), [0.25] * 4, torch.ones(4, dtype=torch.bool)):
        with pytest.raises((TypeError, ValueError), match="^a:"):
            ops.sinkhorn(scores, wrong)
    for sparse in (
        scores.to_sparse(),
        torch.randn(2, 4, 5, dtype=torch.complex64),
        torch.ones(2, 4, 5, dtype=torch.int32),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            ops.sinkhorn(sparse)


def test_masses_in_the_helper_are_what_they_say():
    assert (mass("zeros", 0, 3, 50) == 0).any() and (mass("normal", 0, 3, 50) > 0).all()
