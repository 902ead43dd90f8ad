"""Registration of objslot::sinkhorn and of its backward with PyTorch, and the choice of the backend."""

import torch
from torch import Tensor

from objslot.ops import _backends, _checks, _native
from objslot.ops.sinkhorn import reference
from objslot.ops.sinkhorn.reference import compute_dtype

_library = torch.library.Library("objslot", "FRAGMENT")

# f and g hold the potentials after every iteration (history) or after the last one. plan, count and error are
# empty unless store_plan, tol, and return_error or tol ask for them.
_library.define(
    "sinkhorn(Tensor scores, Tensor? a, Tensor? b, float eps, int n_iters, float? tol, bool history, "
    "bool store_plan, bool return_error, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "sinkhorn_backward(Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g, Tensor scores, Tensor? a, Tensor? b, "
    "Tensor plan, Tensor f, Tensor g, Tensor count, float eps, int n_iters, float? tol, str? backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def facts(scores: Tensor, n_iters: int, tol: float | None) -> dict:
    """What the rows of the capability table look at."""
    return {
        "device": scores.device,
        "dtype": scores.dtype,
        "n": scores.shape[-2],
        "m": scores.shape[-1],
        "n_iters": n_iters,
        "tol": tol,
    }


def _implementation(backend: str):
    if backend == "cpu":
        from objslot.ops.sinkhorn import native

        return native
    if backend == "triton":
        from objslot.ops.sinkhorn import triton_kernels

        return triton_kernels
    return _Reference


class _Reference:
    """The reference behind the interface that the kernels share."""

    @staticmethod
    def forward(scores, a, b, eps, n_iters, tol, history, store_plan, return_error):
        found = reference.scalings(scores, a, b, eps=eps, n_iters=n_iters, tol=tol)
        plan = reference.plan(scores, found.f[-1], found.g[-1], eps=eps) if store_plan else None
        f, g = (found.f, found.g) if history else (found.f[-1:], found.g[-1:])
        return plan, f, g, found.count if tol is not None else None, found.error if return_error else None

    @staticmethod
    def backward(grad_plan, grad_f, grad_g, scores, a, b, plan, f, g, count, eps, n_iters, tol):
        return differentiable_backward(grad_plan, grad_f, grad_g, scores, a, b, eps, n_iters, tol)


def differentiable_backward(grad_plan, grad_f, grad_g, scores, a, b, eps, n_iters, tol):
    """Gradients of scores, a and b by autograd through the reference; differentiable again in grad mode."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [scores, a, b]
        if not again:
            inputs = [None if t is None else t.detach() for t in inputs]
        # A fresh view, so that only this call's graph is walked, wherever the inputs came from.
        leaves = [None if t is None else (t.view_as(t) if t.requires_grad else t.requires_grad_()) for t in inputs]
        found = reference.scalings(*leaves, eps=eps, n_iters=n_iters, tol=tol)
        outputs, gradients = [], []
        if grad_plan is not None:
            outputs.append(reference.plan(leaves[0], found.f[-1], found.g[-1], eps=eps))
            gradients.append(grad_plan)
        for history, gradient in ((found.f, grad_f), (found.g, grad_g)):
            if gradient is not None:
                outputs.append(history[-1])
                gradients.append(gradient)
        wanted = [t for t in leaves if t is not None]
        found_gradients = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=again))
    return tuple(None if t is None else next(found_gradients) for t in leaves)


def _sinkhorn(scores, a, b, eps, n_iters, tol, history, store_plan, return_error, backend):
    # Here and not in the public function: this reads values, which torch.compile cannot trace.
    for name, mass in (("a", a), ("b", b)):
        if mass is not None and not (mass.is_cuda and torch.cuda.is_current_stream_capturing()):
            _checks.non_negative(name, mass)
    name = _backends.select("sinkhorn", backend, **facts(scores, n_iters, tol))
    plan, f, g, count, error = _implementation(name).forward(
        scores, a, b, eps, n_iters, tol, history, store_plan, return_error
    )
    return (
        _or_empty(plan, scores),
        f.contiguous(),
        g.contiguous(),
        scores.new_empty(0, dtype=torch.int64) if count is None else count,
        f.new_empty(0) if error is None else error.contiguous(),
    )


def _or_empty(tensor, like):
    return like.new_empty(0) if tensor is None else tensor.contiguous()


def _sinkhorn_backward(
    grad_plan, grad_f, grad_g, scores, a, b, plan, f, g, count, eps, n_iters, tol, backend
):
    name = _backends.select("sinkhorn", backend, **facts(scores, n_iters, tol))
    grads = _implementation(name).backward(
        grad_plan, grad_f, grad_g, scores, a, b, plan, f, g, count, eps, n_iters, tol
    )
    return tuple(_or_empty(grad, f if index else scores) for index, grad in enumerate(grads))


def _fake_sinkhorn(scores, a, b, eps, n_iters, tol, history, store_plan, return_error, backend):
    *batch, n, m = scores.shape
    dtype = compute_dtype(scores.dtype)
    kept = n_iters if history else 1
    return (
        scores.new_empty((*batch, n, m) if store_plan else 0),
        scores.new_empty((kept, *batch, n), dtype=dtype),
        scores.new_empty((kept, *batch, m), dtype=dtype),
        scores.new_empty(batch if tol is not None else 0, dtype=torch.int64),
        scores.new_empty(batch if return_error else 0, dtype=dtype),
    )


def _fake_backward(grad_plan, grad_f, grad_g, scores, a, b, plan, f, g, count, eps, n_iters, tol, backend):
    return (
        scores.new_empty(scores.shape),
        f.new_empty(0 if a is None else f.shape[1:]),
        f.new_empty(0 if b is None else g.shape[1:]),
    )


def _setup_context(ctx, inputs, output):
    scores, a, b, eps, n_iters, tol, history, store_plan, _, backend = inputs
    plan, f, g, count, error = output
    ctx.save_for_backward(scores, a, b, plan, f, g, count)
    # The choice made for the forward serves the backward too, which may run outside of `use_backend`.
    backend = _backends.select("sinkhorn", backend, **facts(scores, n_iters, tol))
    ctx.settings = eps, n_iters, tol, backend
    ctx.history, ctx.store_plan = history, store_plan
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(count, error)


def _backward(ctx, grad_plan, grad_f, grad_g, grad_count, grad_error):
    scores, a, b, plan, f, g, count = ctx.saved_tensors
    eps, n_iters, tol, backend = ctx.settings
    nothing = (None,) * 7
    if grad_plan is None and grad_f is None and grad_g is None:
        return (None, None, None, *nothing)
    grad_plan = grad_plan if ctx.store_plan else None
    grad_f = None if grad_f is None else grad_f[-1]
    grad_g = None if grad_g is None else grad_g[-1]
    if torch.is_grad_enabled():
        grads = differentiable_backward(grad_plan, grad_f, grad_g, scores, a, b, eps, n_iters, tol)
        return (*grads, *nothing)
    if not ctx.history:
        raise RuntimeError("objslot::sinkhorn was called with history=False, so it has no gradient")
    grads = torch.ops.objslot.sinkhorn_backward(
        grad_plan, grad_f, grad_g, scores, a, b, plan, f, g, count, eps, n_iters, tol, backend
    )
    return (grads[0], None if a is None else grads[1], None if b is None else grads[2], *nothing)


def _why_not_cpu(*, device, **facts):
    if device.type != "cpu":
        return f"needs a CPU tensor, got {device.type}"
    return None if _native.load() is not None else _native.why_missing()


_library.impl("sinkhorn", _sinkhorn, "CompositeExplicitAutograd")
_library.impl("sinkhorn_backward", _sinkhorn_backward, "CompositeExplicitAutograd")
torch.library.register_fake("objslot::sinkhorn", _fake_sinkhorn, lib=_library)
torch.library.register_fake("objslot::sinkhorn_backward", _fake_backward, lib=_library)
torch.library.register_autograd("objslot::sinkhorn", _backward, setup_context=_setup_context, lib=_library)

_backends.register("sinkhorn", "reference", lambda **facts: None)
