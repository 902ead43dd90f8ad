"""propagate against a search written as loops, its plain batched form, and at the edges of its domain."""

import pytest
import torch
from slot_cases import check_budget, evaluate, noise
from torch.nn.functional import normalize

from objslot.ops import _backends, propagate
from objslot.ops.propagate import reference

CPU = [name for name in ("reference", "cpu") if name in _backends.registered()["propagate"]]


def inputs(*batch, frames=3, height=4, width=5, features=6, classes=2):
    return (
        noise(*batch, height, width, features),
        noise(*batch, frames, height, width, features, seed=1),
        noise(*batch, frames, height, width, classes, seed=2).softmax(-1),
    )


def searched(query, keys, labels, radius, topk, temperature, n_global):
    """The definition, one query and one key at a time."""
    query, keys = normalize(query, dim=-1), normalize(keys, dim=-1)
    frames, height, width, _ = keys.shape
    places = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
    result = torch.empty(height, width, labels.shape[-1], dtype=labels.dtype)
    for qy in range(height):
        for qx in range(width):
            found = [
                (float(query[qy, qx] @ keys[t, y, x]), (t, y, x))
                for t, y, x in places
                if t < n_global or (y - qy) ** 2 + (x - qx) ** 2 < radius**2
            ]
            found = sorted(found, reverse=True)[:topk]
            weights = (torch.tensor([cosine for cosine, _ in found], dtype=torch.float64) / temperature).softmax(0)
            result[qy, qx] = sum(weight * labels[place] for weight, (_, place) in zip(weights, found, strict=True))
    return result


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(("radius", "topk", "n_global"), [(2, 6, 1), (1, 4, 0), (3, 1, 2), (9, 500, 1), (2, 7, 0)])
def test_equals_search(backend, radius, topk, n_global):
    query, keys, labels = inputs(frames=2, height=5, width=6)
    found = propagate(
        query, keys, labels, radius=radius, topk=topk, temperature=0.2, n_global=n_global, backend=backend
    )
    assert torch.allclose(found, searched(query, keys, labels, radius, topk, 0.2, n_global), atol=1e-12)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(
    "sizes",
    [
        {"frames": 4, "height": 9, "width": 17, "features": 33, "classes": 5},
        {"frames": 1, "height": 1, "width": 1, "features": 1, "classes": 1},
        {"frames": 2, "height": 23, "width": 70, "features": 7, "classes": 3},
    ],
)
def test_equals_plain_batched_form(backend, sizes):
    arguments = inputs(2, **sizes)
    wanted = reference.plain(*arguments, 4, 9, 0.1, 1)
    found = propagate(*arguments, radius=4, topk=9, temperature=0.1, backend=backend)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_budget(backend, dtype):
    """All positions take part, so that rounding cannot change which ones do."""
    check_budget(
        lambda q, k, c: propagate(q, k, c, radius=20, topk=1000, temperature=0.2, backend=backend),
        lambda q, k, c: reference.plain(q, k, c, 20, 1000, 0.2, 1),
        inputs(2, height=9, width=9),
        dtype,
    )


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("magnitude", [0.0, 18.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_are_found_among_like_keys_of_any_length(backend, dtype, magnitude):
    """Positions differ little from frame to frame, so that many cosines lie close to the smallest kept one."""
    frames, height, width, features = 4, 18, 37, 100
    scene = noise(height, width, features)
    keys = (scene + 0.3 * noise(frames, height, width, features, seed=1)).to(dtype)
    query = (scene + 0.3 * noise(height, width, features, seed=2)).to(dtype)
    keys = keys * 10 ** (magnitude * (2 * torch.rand(frames, height, width, 1) - 1)).to(dtype)
    labels = noise(frames, height, width, 3, seed=3)
    settings = {"radius": 6, "topk": 9, "temperature": 0.2, "n_global": 1}
    found = propagate(query, keys, labels.to(dtype), **settings, backend=backend)
    exact = propagate(query.double(), keys.double(), labels.to(dtype).double(), **settings, backend="reference")
    # A wrong key among the nine would be off by a ninth of a label.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_bounded_memory(monkeypatch):
    arguments = inputs(2, height=6, width=7)
    wanted = evaluate(lambda *x: reference.plain(*x, 3, 8, 0.2, 1), arguments)
    monkeypatch.setattr(reference, "BOUND", 300)
    found = evaluate(lambda *x: propagate(*x, radius=3, topk=8, temperature=0.2, backend="reference"), arguments)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("backend", CPU)
def test_gradients_and_registration(backend):
    leaves = [x.requires_grad_() for x in inputs(2)]

    def op(*arguments):
        return propagate(*arguments, radius=2, topk=6, temperature=0.3, backend=backend)

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)
    torch.library.opcheck(torch.ops.objslot.propagate, (*leaves, 2, 6, 0.3, 1, backend))
    compiled = torch.compile(op, fullgraph=True)
    for mine, theirs in zip(evaluate(compiled, leaves), evaluate(op, leaves), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("backend", CPU)
def test_nan_zero_and_empty(backend):
    query, keys, labels = inputs(3, height=9, width=9)
    clean = propagate(query, keys, labels, radius=3, topk=5, temperature=0.2, backend=backend)
    broken = keys.clone()
    broken[1, 2, 4, 4, 0] = torch.nan
    found = propagate(query, broken, labels, radius=3, topk=5, temperature=0.2, backend=backend)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    y, x = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    near = (y - 4) ** 2 + (x - 4) ** 2 < 9
    assert found[1][near].isnan().all() and torch.equal(found[1][~near], clean[1][~near])
    broken = query.clone()
    broken[1, 0, 0] = torch.nan
    found = propagate(broken, keys, labels, radius=3, topk=5, temperature=0.2, backend=backend)
    assert found[1, 0, 0].isnan().all() and torch.equal(found[1, 0, 1:], clean[1, 0, 1:])
    zero = propagate(query * 0, keys * 0, labels, radius=3, topk=500, temperature=0.2, n_global=3, backend=backend)
    assert torch.allclose(zero, labels.flatten(1, 3).mean(1)[:, None, None].expand_as(zero))
    empty = [x[:0] for x in (query, keys, labels)]
    assert propagate(*empty, radius=3, topk=5, temperature=0.2, backend=backend).shape == (0, 9, 9, 2)


@pytest.mark.parametrize("backend", CPU)
def test_strides_and_label_dtypes(backend):
    query, keys, labels = (x.float() for x in inputs(2))
    wanted = propagate(query, keys, labels, radius=2, topk=6, temperature=0.3, backend=backend)
    turned = (query.mT.contiguous().mT, keys.transpose(1, 3).contiguous().transpose(1, 3), labels)
    found = propagate(*turned, radius=2, topk=6, temperature=0.3, backend=backend)
    assert torch.allclose(found, wanted, atol=1e-6)
    half = propagate(query, keys, labels.bfloat16(), radius=2, topk=6, temperature=0.3, backend=backend)
    assert half.dtype == torch.bfloat16 and (half.float() - wanted).abs().max() < 0.01


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ((0, None), {}, TypeError, "query: expected a tensor"),
        ((1, torch.zeros(3, 4, 5, 7)), {}, ValueError, "keys: expected shape"),
        ((2, torch.zeros(2, 4, 5, 2)), {}, ValueError, "labels: expected shape"),
        ((2, torch.zeros(3, 4, 5, 2, dtype=torch.uint8)), {}, TypeError, "labels: expected float16"),
        (None, {"radius": 0}, ValueError, "radius: expected at least 1"),
        (None, {"topk": 0}, ValueError, "topk: expected at least 1"),
        (None, {"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0"),
        (None, {"n_global": -1}, ValueError, "n_global: expected at least 0"),
    ],
)
def test_bad_arguments(change, options, error, message):
    arguments = [x.float() for x in inputs()]
    if change is not None:
        arguments[change[0]] = change[1]
    with pytest.raises(error, match=message):
        propagate(*arguments, **{"radius": 2, "topk": 3, "temperature": 0.2, **options})
