"""Registration of objslot::sinkhorn_transport, its backward and objslot::alignment, and the choice of backend."""

import torch
from torch import Tensor

from objslot.ops import _backends, _checks
from objslot.ops._dtypes import compute_dtype
from objslot.ops.transport import reference

_library = torch.library.Library("objslot", "FRAGMENT")

# f and g hold the potentials after every iteration, or nothing without history.
_library.define(
    "sinkhorn_transport(Tensor x, Tensor y, Tensor values, Tensor? a, Tensor? b, float eps, int n_iters, "
    "str similarity, bool history, str? backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "sinkhorn_transport_backward(Tensor grad, Tensor x, Tensor y, Tensor values, Tensor? a, Tensor? b, Tensor f, "
    "Tensor g, float eps, int n_iters, str similarity, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "alignment(Tensor tokens, Tensor values, Tensor? masses, float eps, int n_iters, str similarity, "
    "str? backend) -> Tensor"
)


def facts(x: Tensor, y: Tensor, values: Tensor, n_iters: int) -> dict:
    """What the rows of the capability table look at."""
    return {
        "device": x.device,
        "dtype": x.dtype,
        "n": x.shape[-2],
        "m": y.shape[-2],
        "d": x.shape[-1],
        "c": values.shape[-1],
        "n_iters": n_iters,
    }


def _implementation(backend: str):
    if backend == "cpu":
        from objslot.ops.transport import native

        return native
    return _Reference


class _Reference:
    """The reference behind the interface that the kernels share."""

    @staticmethod
    def forward(x, y, values, a, b, eps, n_iters, similarity, history):
        out = reference.sinkhorn_transport(
            x, y, values, a, b, eps=eps, n_iters=n_iters, similarity=similarity
        )
        kept = n_iters if history else 0
        dtype = compute_dtype(x.dtype)
        # The backward of the reference starts anew from x and y: the potentials stay unused.
        return (
            out,
            x.new_zeros((kept, *x.shape[:-1]), dtype=dtype),
            x.new_zeros((kept, *y.shape[:-1]), dtype=dtype),
        )

    @staticmethod
    def backward(grad, x, y, values, a, b, f, g, eps, n_iters, similarity):
        return differentiable_backward(grad, x, y, values, a, b, eps, n_iters, similarity)

    @staticmethod
    def alignment(tokens, values, masses, eps, n_iters, similarity):
        return reference.alignment(tokens, values, masses, eps=eps, n_iters=n_iters, similarity=similarity)


def differentiable_backward(grad, x, y, values, a, b, eps, n_iters, similarity):
    """Gradients of the five tensors by autograd through the reference; differentiable again in grad mode."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [x, y, values, a, b]
        if not again:
            inputs = [None if t is None else t.detach() for t in inputs]
        # A fresh view, so that only this call's graph is walked, wherever the inputs came from.
        leaves = [
            None if t is None else (t.view_as(t) if t.requires_grad else t.requires_grad_()) for t in inputs
        ]
        out = reference.sinkhorn_transport(*leaves, eps=eps, n_iters=n_iters, similarity=similarity)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
    return tuple(None if t is None else next(found) for t in leaves)


def _check_masses(**masses):
    for name, mass in masses.items():
        if mass is not None and not (mass.is_cuda and torch.cuda.is_current_stream_capturing()):
            _checks.non_negative(name, mass)


def _transport(x, y, values, a, b, eps, n_iters, similarity, history, backend):
    _check_masses(a=a, b=b)
    name = _backends.select("sinkhorn_transport", backend, **facts(x, y, values, n_iters))
    found = _implementation(name).forward(x, y, values, a, b, eps, n_iters, similarity, history)
    return tuple(t.contiguous() for t in found)


def _transport_backward(grad, x, y, values, a, b, f, g, eps, n_iters, similarity, backend):
    name = _backends.select("sinkhorn_transport", backend, **facts(x, y, values, n_iters))
    grads = _implementation(name).backward(grad, x, y, values, a, b, f, g, eps, n_iters, similarity)
    return tuple(x.new_empty(0) if t is None else t.contiguous() for t in grads)


def _alignment(tokens, values, masses, eps, n_iters, similarity, backend):
    _check_masses(masses=masses)
    name = _backends.select("sinkhorn_transport", backend, **facts(tokens, tokens, values, n_iters))
    return _implementation(name).alignment(tokens, values, masses, eps, n_iters, similarity).contiguous()


def _fake_transport(x, y, values, a, b, eps, n_iters, similarity, history, backend):
    kept = n_iters if history else 0
    dtype = compute_dtype(x.dtype)
    return (
        values.new_empty(*x.shape[:-1], values.shape[-1]),
        x.new_empty((kept, *x.shape[:-1]), dtype=dtype),
        x.new_empty((kept, *y.shape[:-1]), dtype=dtype),
    )


def _fake_backward(grad, x, y, values, a, b, f, g, eps, n_iters, similarity, backend):
    marginals = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (a, b)]
    return (x.new_empty(x.shape), y.new_empty(y.shape), values.new_empty(values.shape), *marginals)


def _fake_alignment(tokens, values, masses, eps, n_iters, similarity, backend):
    return values.new_empty(values.shape)


def _setup_context(ctx, inputs, output):
    x, y, values, a, b, eps, n_iters, similarity, history, backend = inputs
    _, f, g = output
    ctx.save_for_backward(x, y, values, a, b, f, g)
    # The choice made for the forward serves the backward too, which may run outside of `use_backend`.
    backend = _backends.select("sinkhorn_transport", backend, **facts(x, y, values, n_iters))
    ctx.settings = eps, n_iters, similarity
    ctx.history, ctx.backend = history, backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(f, g)


def _backward(ctx, grad, grad_f, grad_g):
    nothing = (None,) * 5
    if grad is None:
        return (None,) * 10
    x, y, values, a, b, f, g = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (*differentiable_backward(grad, x, y, values, a, b, *ctx.settings), *nothing)
    if not ctx.history:
        raise RuntimeError("objslot::sinkhorn_transport was called with history=False, so it has no gradient")
    grads = torch.ops.objslot.sinkhorn_transport_backward(
        grad, x, y, values, a, b, f, g, *ctx.settings, ctx.backend
    )
    return (*grads[:3], None if a is None else grads[3], None if b is None else grads[4], *nothing)


_library.impl("sinkhorn_transport", _transport, "CompositeExplicitAutograd")
_library.impl("sinkhorn_transport_backward", _transport_backward, "CompositeExplicitAutograd")
_library.impl("alignment", _alignment, "CompositeExplicitAutograd")
torch.library.register_fake("objslot::sinkhorn_transport", _fake_transport, lib=_library)
torch.library.register_fake("objslot::sinkhorn_transport_backward", _fake_backward, lib=_library)
torch.library.register_fake("objslot::alignment", _fake_alignment, lib=_library)
torch.library.register_autograd(
    "objslot::sinkhorn_transport", _backward, setup_context=_setup_context, lib=_library
)

_backends.register("sinkhorn_transport", "reference", lambda **facts: None)
