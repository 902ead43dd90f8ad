"""Problems for Sinkhorn, and its error against the definition in float64 beside that of plain PyTorch."""

import torch

from objslot.ops import _backends
from objslot.ops._arithmetic import compute_dtype
from objslot.ops.sinkhorn import reference, sinkhorn

BACKENDS = [name for name in ("reference", "cpu") if name in _backends.registered()["sinkhorn"]]
NAMES = ("plan", "scores", "a", "b")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def cosines(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    *batch, n, m = shape
    x, y = (torch.randn(*batch, size, 8, generator=generator, dtype=torch.float64) for size in (n, m))
    return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT


def masses(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1
    return mass / mass.sum(-1, keepdim=True)


def distance(found, wanted, terms=None):
    """Largest difference relative to the largest entry of the same batch element.

    Gradients are sums that may cancel: `terms` are the entries before the cancellation.
    """
    difference = (found.double() - wanted).abs().flatten(1).amax(1)
    size = wanted.abs().flatten(1).amax(1).clamp_min(1e-300)
    if terms is not None:
        size = torch.maximum(size, terms.flatten(1).amax(1))
    return (difference / size).max().item()


def plain(scores, a, b, eps, n_iters):
    """The log-domain loop as one would write it in PyTorch, in the dtype of the scores."""
    logits = scores / eps
    log_a, log_b = a.log(), b.log()
    g = torch.zeros_like(log_b)
    for _ in range(n_iters):
        f = log_a - torch.logsumexp(logits + g.unsqueeze(-2), -1)
        g = log_b - torch.logsumexp(logits + f.unsqueeze(-1), -2)
    return (logits + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def oracle(scores, a, b, start, gradient, eps, n_iters):
    """Plan and gradients for scores, a and b of the reference in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in (scores, a, b)]
    plan, _ = reference.sinkhorn(*leaves, start, eps=eps, n_iters=n_iters)
    return plan.detach(), *torch.autograd.grad(plan, leaves, gradient.double())


def guarded(scores, a, b, eps, n_iters):
    """The reference in the dtype of the scores, for marginals with zeros."""
    return reference.sinkhorn(scores, a, b, eps=eps, n_iters=n_iters)[0]


def errors(backend, dtype, scores, a, b, eps, n_iters, plain=plain, start=None):
    """Of plan and gradients by name: the value, its error and the error of plain PyTorch in this dtype."""
    scores = scores.to(dtype)
    a, b = a.to(compute_dtype(dtype)), b.to(compute_dtype(dtype))
    gradient = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    start = None if start is None else start.to(compute_dtype(dtype))
    wanted = oracle(scores, a, b, start, gradient, eps, n_iters)

    leaves = [tensor.clone().requires_grad_() for tensor in (scores, a, b)]
    plan = sinkhorn(*leaves, start=start, eps=eps, n_iters=n_iters, backend=backend)
    found = plan, *torch.autograd.grad(plan, leaves, gradient)
    loop = [tensor.to(compute_dtype(dtype)).requires_grad_() for tensor in (scores, a, b)]
    own = plain(*loop, eps, n_iters).to(dtype)
    own = own, *torch.autograd.grad(own, loop, gradient)
    moved = wanted[0] * gradient.double().abs()
    a, b = (mass.double().clamp_min(1e-300) for mass in (a, b))
    terms = wanted[0], moved / eps, moved.sum(-1) / a, moved.sum(-2) / b
    for name, value, plain_value, exact, size in zip(NAMES, found, own, wanted, terms, strict=True):
        yield name, value, distance(value, exact, size), distance(plain_value.to(value.dtype), exact, size)


def check(backend, dtype, scores, a, b, eps, n_iters, plain=plain, start=None):
    """Plan and gradients within twice the error that plain PyTorch makes in this dtype.

    Where that happens to be nothing: within the rounding of the result and a few roundings of the exponents.
    In float64 the oracle itself is no better than that.
    """
    exponent = scores.abs().max().item() / eps * torch.finfo(compute_dtype(dtype)).eps
    exponent *= 16 if dtype == torch.float64 else 2
    for name, value, error, plain_error in errors(backend, dtype, scores, a, b, eps, n_iters, plain, start):
        assert value.isfinite().all(), name
        allowed = max(2 * plain_error, exponent) + 8 * torch.finfo(value.dtype).eps
        assert error <= allowed, (name, error, plain_error)
