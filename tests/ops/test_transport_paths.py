"""Every way that the CPU kernels of transport take: levels of instructions, tiles and vectors, teams of threads."""

import os
import subprocess
import sys

import pytest
import torch

from objslot.ops import _native
from objslot.ops._arithmetic import compute_dtype
from objslot.ops.transport import alignment, reference, sinkhorn_transport

pytestmark = pytest.mark.skipif(_native.load() is None, reason="needs the compiled module")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Exact to multiply by, and more than products on tiles take: cosines are then made on vectors.
BEYOND_TILES = 2.0**45


def problem(dtype, n, m, d, c, batch=(1,), seed=0):
    source = torch.Generator().manual_seed(seed)
    x, y, values = (torch.randn(*batch, *shape, generator=source).to(dtype) for shape in ((n, d), (m, d), (m, c)))
    a, b = (torch.rand(*batch, size, generator=source).to(compute_dtype(dtype)) + 0.1 for size in (n, m))
    return [x, y, values, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)]


def run(function, leaves, **options):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves, **options)
    upper = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, upper)


def assert_exact(leaves, **options):
    """At most twice the error of plain PyTorch in the same dtype, or some roundings of the exponent."""
    wanted = run(reference.sinkhorn_transport, [leaf.double() for leaf in leaves], **options)
    plain = run(reference.sinkhorn_transport, leaves, **options)
    found = run(sinkhorn_transport, leaves, backend="cpu", **options)
    for place, (value, own, exact) in enumerate(zip(found, plain, wanted, strict=True)):
        assert value.isfinite().all()
        if exact.norm() < 1e-9:
            continue
        error, own = ((other.double() - exact).norm() / exact.norm() for other in (value, own))
        # In float64 the oracle itself is no better.
        rounding = torch.finfo(compute_dtype(value.dtype)).eps * max(1, 1 / options.get("eps", 0.05))
        least = (64 if value.dtype == torch.float64 else 4) * rounding + torch.finfo(value.dtype).eps
        assert error <= max(2 * own, least), (place, float(error), float(own))
    return found


SIZES = [(1, 1, 1, 1), (3, 2, 5, 1), (17, 33, 31, 3), (70, 40, 100, 20), (300, 290, 65, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("batch", [(1,), (3,)], ids=["team", "batch"])
def test_sizes_of_blocks(dtype, sizes, similarity, batch):
    assert_exact(problem(dtype, *sizes, batch), similarity=similarity, eps=0.05 if similarity == "cosine" else sizes[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(1,), (3,)], ids=["team", "batch"])
def test_tokens_too_large_for_tiles_are_multiplied_on_vectors(dtype, batch):
    leaves = problem(dtype, 50, 70, 48, 5, batch)
    large = [leaves[0] * BEYOND_TILES, *leaves[1:]]
    wanted, found = run(sinkhorn_transport, leaves, backend="cpu"), assert_exact(large)
    # Cosines do not know lengths: only the way to them differs, and without tiles not even that.
    assert torch.equal(found[0], wanted[0]) == (dtype != torch.float32 or not _native.load().multiplies_on_tiles())
    torch.testing.assert_close(found[1].float() * BEYOND_TILES, wanted[1].float(), rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_of_any_length(dtype, scale):
    leaves = problem(dtype, 40, 50, 24, 5)
    wanted = run(sinkhorn_transport, [leaf.double() for leaf in leaves], backend="cpu")
    leaves[0] = (leaves[0].double() * scale).to(dtype)
    found = run(sinkhorn_transport, leaves, backend="cpu")
    exact = run(sinkhorn_transport, [leaf.double() for leaf in leaves], backend="cpu")
    assert all(value.isfinite().all() for value in found)
    if scale > 1e-12:
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (found[0].double() - wanted[0]).norm() <= tolerance * wanted[0].norm()
        for value, best in zip(found, exact, strict=True):
            assert (value.double() - best).norm() <= tolerance * best.norm()


@pytest.mark.parametrize("size", [1e-25, 1e-14, 1e13, 1e18])
def test_dot_products_of_any_size(size):
    leaves = problem(torch.float32, 40, 50, 24, 5)
    leaves[0] = leaves[0] * size
    assert_exact(leaves, similarity="dot", eps=5 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_with_a_common_part(dtype):
    """Gradients are then small differences of large sums."""
    leaves = problem(dtype, 90, 80, 64, 8)
    common = 4 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    leaves[:2] = [(leaf.float() + common).to(dtype) for leaf in leaves[:2]]
    assert_exact(leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upper_gradients_of_any_size(dtype):
    leaves = [leaf.requires_grad_() for leaf in problem(dtype, 40, 50, 24, 5)]
    upper = torch.randn(1, 40, 5, generator=torch.Generator().manual_seed(7)).to(dtype)
    factor = 2.0**-6 if dtype == torch.float16 else 2.0**-80
    out = sinkhorn_transport(*leaves, backend="cpu")
    one, other = (torch.autograd.grad(out, leaves, scale * upper, retain_graph=True) for scale in (1.0, factor))
    for whole, small in zip(one, other, strict=True):
        torch.testing.assert_close(small.double() / factor, whole.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(1,), (3,)], ids=["team", "batch"])
def test_repeats_to_the_bit_with_any_number_of_threads(dtype, batch):
    leaves = problem(dtype, 150, 140, 96, 17, batch)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run(sinkhorn_transport, leaves, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("frames", [2, 3, 4, 5, 6])
def test_alignment_of_frames_on_tiles_and_on_vectors(clips, frames):
    """One frame is too large for tiles: pairs with it are made on vectors, between others that are not."""
    source = torch.Generator().manual_seed(0)
    tokens, values = (torch.randn(clips, frames, 40, width, generator=source) for width in (48, 6))
    tokens[:, frames // 2] *= BEYOND_TILES
    exact = reference.alignment(tokens.double(), values.double())
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(alignment(tokens, values, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert (results[0].double() - exact).norm() <= 1e-5 * exact.norm()
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kind", ["even", "long", "one large number", "nearly one-hot", "with an empty token"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("eps", [0.3, 0.05, 2e-3])
def test_alignment_of_tokens_of_every_shape(kind, similarity, eps):
    """Products in fixed point serve only where they are as exact as those in floating point."""
    source = torch.Generator().manual_seed(0)
    tokens, values = torch.randn(2, 3, 50, 200, generator=source), torch.rand(2, 3, 50, 6, generator=source)
    if kind == "long":
        tokens = torch.cat([tokens] * 3, dim=-1)
    elif kind == "one large number":
        tokens[..., 17] *= 40
    elif kind == "nearly one-hot":
        # Other places in every frame: all cosines are small, and float32 holds them in full.
        tokens *= 1e-4
        for frame in range(3):
            tokens[:, frame, torch.arange(50), torch.arange(50) % 16 + 20 * frame] += 1
    elif kind == "with an empty token":
        tokens[1, 2, 3] = 0
    if similarity == "dot":
        tokens = tokens / tokens.norm(dim=-1).mean()
    options = dict(eps=eps, similarity=similarity)
    exact = reference.alignment(tokens.double(), values.double(), **options)
    plain = reference.alignment(tokens, values, **options)
    found = alignment(tokens, values, backend="cpu", **options)
    error, own = ((x.double() - exact).norm() / exact.norm() for x in (found, plain))
    assert error <= 1.5 * own + torch.finfo(torch.float32).eps


SCRIPT = """
import torch
from objslot.ops import _native
from objslot.ops.transport import alignment, reference, sinkhorn_transport
assert _native.load().isa() == {level!r}
torch.manual_seed(0)

def results(arguments, move, align, **options):
    leaves = [x.clone().requires_grad_() for x in arguments]
    out = move(*leaves, **options)
    upper = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    with torch.no_grad():
        clip = align(*(x.unsqueeze(0) for x in arguments[1:]), **options)
    return [out, *torch.autograd.grad(out, leaves, upper), clip]

for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    # The last ones have more terms than a block of a product on vectors, and no whole blocks of rows and columns.
    sizes = (1, 70, 90, 33, 5), (3, 33, 18, 64, 16), (2, 3, 7, 2, 1), (1, 99, 50, 769, 33), (1, 775, 37, 49, 3)
    for batch, n, m, d, c in (*sizes, (1, 37, 775, 129, 49), (2, 193, 385, 386, 50)):
        arguments = [torch.randn(batch, *shape).to(dtype) for shape in ((n, d), (m, d), (m, c))]
        for options in (dict(eps=0.1, similarity="cosine"), dict(eps=0.3 * d, similarity="dot")):
            both = reference.sinkhorn_transport, reference.alignment
            exact = results([x.double() for x in arguments], *both, **options)
            plain = results(arguments, *both, **options)
            found = results(arguments, sinkhorn_transport, alignment, **options, backend="cpu")
            for place, (mine, own, best) in enumerate(zip(found, plain, exact)):
                error, own = ((x.double() - best).norm() / best.norm().clamp_min(1e-30) for x in (mine, own))
                rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
                least = 16 * rounding / 0.1 + torch.finfo(dtype).eps
                assert error <= max(2 * own, least), (dtype, batch, n, options, place, float(error), float(own))
print("equal")
"""


@pytest.mark.parametrize("level", ["base", "avx2", "avx512"])
def test_every_level_of_instructions(level):
    levels = ["base", "avx2", "avx512"]
    if levels.index(level) > levels.index(_native.load().best_isa()):
        pytest.skip(f"this processor has no {level}")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{level!r}", repr(level))],
        env={**os.environ, "OBJSLOT_ISA": level},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "equal", done.stderr
