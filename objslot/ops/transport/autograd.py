"""Registration of objslot::sinkhorn_transport, its backward and objslot::alignment."""

import torch
from torch import Tensor

from objslot.ops import _backends, _checks, _direct, _triton
from objslot.ops._arithmetic import compute_dtype
from objslot.ops._vmap import register_vmap
from objslot.ops.sinkhorn.autograd import why_not_cpu
from objslot.ops.transport import native, reference

_library = torch.library.Library("objslot", "FRAGMENT")

_library.define(
    "sinkhorn_transport(Tensor x, Tensor y, Tensor values, Tensor? a, Tensor? b, Tensor? start, "
    "float eps, int n_iters, float? tol, str similarity, bool return_error, str? backend) -> (Tensor, Tensor)"
)
_library.define(
    "sinkhorn_transport_backward(Tensor grad, Tensor x, Tensor y, Tensor values, Tensor? a, Tensor? b, "
    "Tensor? start, float eps, int n_iters, float? tol, str similarity, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "alignment(Tensor tokens, Tensor values, Tensor? masses, float eps, int n_iters, str similarity, "
    "str? backend) -> Tensor"
)


def facts(
    x: Tensor, y: Tensor, values: Tensor, n_iters: int, tol: float | None = None, start: Tensor | None = None
) -> dict:
    """What the rows of the capability table look at."""
    return {
        "device": x.device,
        "dtype": x.dtype,
        "n": x.shape[-2],
        "m": y.shape[-2],
        "d": x.shape[-1],
        "c": values.shape[-1],
        "n_iters": n_iters,
        "tol": tol,
        "started": start is not None,
    }


def _implementation(backend: str):
    if backend == "cpu":
        return native
    if backend == "triton":
        return _triton.kernels(__package__)
    return _Reference


class _Reference:
    """The reference behind the interface that the kernels share."""

    @staticmethod
    def forward(x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error):
        return reference.transport(
            x, y, values, a, b, start, eps=eps, n_iters=n_iters, tol=tol, similarity=similarity
        )

    @staticmethod
    def backward(grad, x, y, values, a, b, start, eps, n_iters, tol, similarity):
        return differentiable_backward(grad, x, y, values, a, b, start, eps, n_iters, tol, similarity)

    @staticmethod
    def alignment(tokens, values, masses, eps, n_iters, similarity):
        return reference.alignment(tokens, values, masses, eps=eps, n_iters=n_iters, similarity=similarity)


def differentiable_backward(grad, x, y, values, a, b, start, eps, n_iters, tol, similarity):
    """Gradients of the five tensors by autograd through the reference; differentiable again in grad mode."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [x, y, values, a, b]
        if not again:
            inputs = [None if t is None else t.detach() for t in inputs]
        # A fresh view, so that only this call's graph is walked, wherever the inputs came from.
        leaves = [None if t is None else (t.view_as(t) if t.requires_grad else t.requires_grad_()) for t in inputs]
        out = reference.sinkhorn_transport(
            *leaves, start, eps=eps, n_iters=n_iters, tol=tol, similarity=similarity
        )
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
    return tuple(None if t is None else next(found) for t in leaves)


def _check_masses(**masses):
    for name, mass in masses.items():
        if mass is not None and not (mass.is_cuda and torch.cuda.is_current_stream_capturing()):
            _checks.non_negative(name, mass)


def _transport(x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error, backend):
    _check_masses(a=a, b=b)
    name = _backends.select("sinkhorn_transport", backend, **facts(x, y, values, n_iters, tol, start))
    out, error = _implementation(name).forward(
        x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error
    )
    if not return_error:
        error = x.new_empty(0, dtype=compute_dtype(x.dtype))
    return out.contiguous(), error.contiguous()


def _transport_backward(grad, x, y, values, a, b, start, eps, n_iters, tol, similarity, backend):
    name = _backends.select("sinkhorn_transport", backend, **facts(x, y, values, n_iters, tol, start))
    grads = _implementation(name).backward(grad, x, y, values, a, b, start, eps, n_iters, tol, similarity)
    return tuple(x.new_empty(0) if t is None else t.contiguous() for t in grads)


def _alignment(tokens, values, masses, eps, n_iters, similarity, backend):
    _check_masses(masses=masses)
    name = _backends.select("sinkhorn_transport", backend, **facts(tokens, tokens, values, n_iters))
    if name != "cpu":
        tokens = tokens.to(values.dtype)
    return _implementation(name).alignment(tokens, values, masses, eps, n_iters, similarity).contiguous()


def _fake_transport(x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error, backend):
    error = x.new_empty(x.shape[:-2] if return_error else 0, dtype=compute_dtype(x.dtype))
    return values.new_empty(*x.shape[:-1], values.shape[-1]), error


def _fake_backward(grad, x, y, values, a, b, start, eps, n_iters, tol, similarity, backend):
    marginals = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (a, b)]
    return (x.new_empty(x.shape), y.new_empty(y.shape), values.new_empty(values.shape), *marginals)


def _fake_alignment(tokens, values, masses, eps, n_iters, similarity, backend):
    return values.new_empty(values.shape)


def _setup_context(ctx, inputs, output):
    *tensors, eps, n_iters, tol, similarity, _, backend = inputs
    _, error = output
    ctx.mark_non_differentiable(error)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    # The choice made for the forward serves the backward too, which may run outside of `use_backend`.
    x, y, values, _, _, start = tensors
    ctx.backend = _backends.select("sinkhorn_transport", backend, **facts(x, y, values, n_iters, tol, start))
    ctx.settings = eps, n_iters, tol, similarity


def _backward(ctx, grad, _):
    tensors = ctx.saved_tensors
    nothing = (None,) * 7
    if grad is None:
        return (None,) * 12
    if torch.is_grad_enabled():
        return (*differentiable_backward(grad, *tensors, *ctx.settings), *nothing)
    return (*_dispatched_backward(grad, tensors, ctx.settings, ctx.backend), *nothing)


def _dispatched_backward(grad, tensors, settings, backend):
    grads = torch.ops.objslot.sinkhorn_transport_backward(grad, *tensors, *settings, backend)
    a, b = tensors[3:5]
    return (*grads[:3], None if a is None else grads[3], None if b is None else grads[4])


class _Direct(torch.autograd.Function):
    """The op on tensors that need no dispatcher."""

    @staticmethod
    def forward(ctx, x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error):
        tensors, settings = (x, y, values, a, b, start), (eps, n_iters, tol, similarity)
        out, error = native.forward(*tensors, *settings, return_error)
        ctx.save_for_backward(*tensors)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        if return_error:
            ctx.mark_non_differentiable(error)
        return out, error

    @staticmethod
    def backward(ctx, grad, _):
        tensors, nothing = ctx.saved_tensors, (None,) * 6
        if grad is None:
            return (None,) * 11
        if torch.is_grad_enabled():
            return (*differentiable_backward(grad, *tensors, *ctx.settings), *nothing)
        if _direct.possible(grad, *tensors):
            return (*native.backward(grad, *tensors, *ctx.settings), *nothing)
        return (*_dispatched_backward(grad, tensors, ctx.settings, "cpu"), *nothing)


def transport(x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error, backend):
    """The moved values and the error, by the shortest way; the error is empty or None unless asked for."""
    tensors, settings = (x, y, values, a, b, start), (eps, n_iters, tol, similarity, return_error)
    if backend is None and _direct.possible(*tensors):
        _check_masses(a=a, b=b)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return _Direct.apply(*tensors, *settings)
        return native.forward(*tensors, *settings)
    return torch.ops.objslot.sinkhorn_transport(*tensors, *settings, backend)


def alignment(tokens, values, masses, eps, n_iters, similarity, backend):
    """The op, which has no gradient, by the shortest way."""
    if backend is None and _direct.possible(tokens, values, masses):
        _check_masses(masses=masses)
        return native.alignment(tokens, values, masses, eps, n_iters, similarity)
    return torch.ops.objslot.alignment(tokens, values, masses, eps, n_iters, similarity, backend)


_library.impl("sinkhorn_transport", _transport, "CompositeExplicitAutograd")
_library.impl("sinkhorn_transport_backward", _transport_backward, "CompositeExplicitAutograd")
_library.impl("alignment", _alignment, "CompositeExplicitAutograd")
torch.library.register_fake("objslot::sinkhorn_transport", _fake_transport, lib=_library)
torch.library.register_fake("objslot::sinkhorn_transport_backward", _fake_backward, lib=_library)
torch.library.register_fake("objslot::alignment", _fake_alignment, lib=_library)
torch.library.register_autograd("objslot::sinkhorn_transport", _backward, setup_context=_setup_context, lib=_library)
for _op in ("sinkhorn_transport", "sinkhorn_transport_backward", "alignment"):
    register_vmap(_op, _library)

_backends.register("sinkhorn_transport", "cpu", why_not_cpu)
_backends.register("sinkhorn_transport", "triton", _triton.why_not(__package__), automatic=False)
_backends.register("sinkhorn_transport", "reference", lambda **facts: None)
