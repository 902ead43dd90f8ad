"""Registration of objslot::sinkhorn and of its backward with PyTorch, and the choice of the backend."""

import torch
from torch import Tensor

from objslot.ops import _backends, _checks, _direct, _native, _triton
from objslot.ops._arithmetic import compute_dtype
from objslot.ops._vmap import register_vmap
from objslot.ops.sinkhorn import cuda, native, reference

_library = torch.library.Library("objslot", "FRAGMENT")

# The results are plan, f, g, error, and what the backward needs of the iterations: history_f, history_g and
# count, in a form that belongs to the backend. A result that is not asked for is empty; with store_plan f and g
# are, and without it the plan.
_library.define(
    "sinkhorn(Tensor scores, Tensor? a, Tensor? b, Tensor? start, float eps, int n_iters, float? tol, "
    "bool history, bool store_plan, bool return_error, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "sinkhorn_backward(Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g, Tensor scores, Tensor? a, "
    "Tensor? b, Tensor? start, Tensor plan, Tensor history_f, Tensor history_g, Tensor count, float eps, "
    "int n_iters, float? tol, str? backend) -> (Tensor, Tensor, Tensor)"
)


def facts(scores: Tensor, n_iters: int, tol: float | None, start: Tensor | None = None) -> dict:
    """What the rows of the capability table look at."""
    return {
        "device": scores.device,
        "dtype": scores.dtype,
        "n": scores.shape[-2],
        "m": scores.shape[-1],
        "n_iters": n_iters,
        "tol": tol,
        "started": start is not None,
    }


def _implementation(backend: str):
    if backend == "cpu":
        return native
    if backend == "triton":
        return _triton.kernels(__package__)
    if backend == "cuda":
        return cuda
    return _Reference


class _Reference:
    """The reference behind the interface that the kernels share; its backward starts anew from the scores."""

    @staticmethod
    def forward(scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error):
        found = reference.scalings(scores, a, b, start, eps=eps, n_iters=n_iters, tol=tol)
        f, g = found.f[-1].clone(), found.g[-1].clone()
        return {
            "plan": reference.plan(scores, f, g, eps=eps) if store_plan else None,
            "f": None if store_plan else f,
            "g": None if store_plan else g,
            "error": found.error if return_error else None,
            "history_f": scores.new_zeros((1 + n_iters, *f.shape), dtype=f.dtype) if history else None,
            "history_g": scores.new_zeros((n_iters, *g.shape), dtype=f.dtype) if history else None,
            "count": found.count if history else None,
        }

    @staticmethod
    def backward(
        grad_plan, grad_f, grad_g, scores, a, b, start, plan, history_f, history_g, count, eps, n_iters, tol
    ):
        return differentiable_backward(grad_plan, grad_f, grad_g, scores, a, b, start, eps, n_iters, tol)


def differentiable_backward(grad_plan, grad_f, grad_g, scores, a, b, start, eps, n_iters, tol):
    """Gradients of scores, a and b by autograd through the reference; differentiable again in grad mode."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [scores, a, b]
        if not again:
            inputs = [None if t is None else t.detach() for t in inputs]
        # A fresh view, so that only this call's graph is walked, wherever the inputs came from.
        leaves = [None if t is None else t.view_as(t) if t.requires_grad else t.requires_grad_() for t in inputs]
        found = reference.scalings(*leaves, start, eps=eps, n_iters=n_iters, tol=tol)
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


def _sinkhorn(scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error, backend):
    _check_masses(a, b)
    name = _backends.select("sinkhorn", backend, **facts(scores, n_iters, tol, start))
    found = _implementation(name).forward(
        scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error
    )
    dtypes = _dtypes(scores)
    return tuple(
        scores.new_empty(0, dtype=dtypes[name]) if found[name] is None else found[name].contiguous() for name in dtypes
    )


def _check_masses(a, b):
    # Not in the public function: this reads values, which torch.compile cannot trace.
    for name, mass in (("a", a), ("b", b)):
        if mass is not None and not (mass.is_cuda and torch.cuda.is_current_stream_capturing()):
            _checks.non_negative(name, mass)


def _dtypes(scores):
    """The results of the op in their order."""
    dtype = compute_dtype(scores.dtype)
    names = ("f", "g", "error", "history_f", "history_g")
    return {"plan": scores.dtype, **dict.fromkeys(names, dtype), "count": torch.int64}


def _sinkhorn_backward(
    grad_plan, grad_f, grad_g, scores, a, b, start, plan, history_f, history_g, count, eps, n_iters, tol, backend
):
    name = _backends.select("sinkhorn", backend, **facts(scores, n_iters, tol, start))
    grads = _implementation(name).backward(
        grad_plan, grad_f, grad_g, scores, a, b, start, plan, history_f, history_g, count, eps, n_iters, tol
    )
    like = (scores, history_f, history_f)
    return tuple(t.new_empty(0) if grad is None else grad.contiguous() for t, grad in zip(like, grads, strict=True))


def _fake_sinkhorn(scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error, backend):
    *batch, n, m = scores.shape
    shapes = {
        "plan": (*batch, n, m) if store_plan else 0,
        "f": 0 if store_plan else (*batch, n),
        "g": 0 if store_plan else (*batch, m),
        "error": batch if return_error else 0,
        "history_f": (1 + n_iters, *batch, n) if history else 0,
        "history_g": (n_iters, *batch, m) if history else 0,
        "count": batch if history else 0,
    }
    return tuple(scores.new_empty(shapes[name], dtype=dtype) for name, dtype in _dtypes(scores).items())


def _fake_backward(
    grad_plan, grad_f, grad_g, scores, a, b, start, plan, history_f, history_g, count, eps, n_iters, tol, backend
):
    return (
        scores.new_empty(scores.shape),
        history_f.new_empty(0 if a is None else history_f.shape[1:]),
        history_f.new_empty(0 if b is None else history_g.shape[1:]),
    )


def _setup_context(ctx, inputs, output):
    scores, a, b, start, eps, n_iters, tol, history, store_plan, _, backend = inputs
    plan, _, _, error, *iterations = output
    ctx.save_for_backward(scores, a, b, start, plan, *iterations)
    # The choice made for the forward serves the backward too, which may run outside of `use_backend`.
    backend = _backends.select("sinkhorn", backend, **facts(scores, n_iters, tol, start))
    ctx.settings = eps, n_iters, tol
    ctx.history, ctx.store_plan, ctx.backend = history, store_plan, backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(error, *iterations)


def _backward(ctx, grad_plan, grad_f, grad_g, *_):
    scores, a, b, start, plan, *iterations = ctx.saved_tensors
    nothing = (None,) * 8
    if ctx.store_plan:
        grad_f = grad_g = None
    else:
        grad_plan = None
    if grad_plan is None and grad_f is None and grad_g is None:
        return (None, None, None, *nothing)
    grads = (grad_plan, grad_f, grad_g)
    if torch.is_grad_enabled():
        return (*differentiable_backward(*grads, scores, a, b, start, *ctx.settings), *nothing)
    if not ctx.history:
        raise RuntimeError("objslot::sinkhorn was called with history=False, so it has no gradient")
    found = torch.ops.objslot.sinkhorn_backward(
        *grads, scores, a, b, start, plan, *iterations, *ctx.settings, ctx.backend
    )
    return (found[0], None if a is None else found[1], None if b is None else found[2], *nothing)


class _Direct(torch.autograd.Function):
    """The op on tensors that need no dispatcher."""

    @staticmethod
    def forward(ctx, scores, a, b, start, eps, n_iters, tol, store_plan, return_error):
        plan, f, g, error, block = native.forward_in_one(
            scores, a, b, start, eps, n_iters, tol, True, store_plan, return_error
        )
        ctx.save_for_backward(scores, a, b, start, plan)
        ctx.block = block
        ctx.settings = eps, n_iters, tol
        ctx.set_materialize_grads(False)
        if return_error:
            ctx.mark_non_differentiable(error)
        return plan, f, g, error

    @staticmethod
    def backward(ctx, grad_plan, grad_f, grad_g, _):
        scores, a, b, start, plan = ctx.saved_tensors
        grads, nothing = (grad_plan, grad_f, grad_g), (None,) * 6
        if grad_plan is None and grad_f is None and grad_g is None:
            return (None, None, None, *nothing)
        if torch.is_grad_enabled():
            return (*differentiable_backward(*grads, scores, a, b, start, *ctx.settings), *nothing)
        if _direct.possible(*grads, scores):
            found = native.backward_from_one(*grads, scores, a, b, start, plan, ctx.block, *ctx.settings)
            return (*found, *nothing)
        plan = scores.new_empty(0) if plan is None else plan
        iterations = native.iterations_of(ctx.block, scores, ctx.settings[1])
        found = torch.ops.objslot.sinkhorn_backward(
            *grads, scores, a, b, start, plan, *iterations, *ctx.settings, "cpu"
        )
        return (found[0], None if a is None else found[1], None if b is None else found[2], *nothing)


def sinkhorn(scores, a, b, start, eps, n_iters, tol, store_plan, return_error, backend):
    """plan, f, g and error, by the shortest way; what is not asked for is empty or None."""
    history = torch.is_grad_enabled() and (
        scores.requires_grad
        or (a is not None and a.requires_grad)
        or (b is not None and b.requires_grad)
        or _direct.transformed()
    )
    if backend is None and _direct.possible(scores, a, b, start):
        _check_masses(a, b)
        if history:
            return _Direct.apply(scores, a, b, start, eps, n_iters, tol, store_plan, return_error)
        return native.forward_in_one(scores, a, b, start, eps, n_iters, tol, False, store_plan, return_error)[:4]
    return torch.ops.objslot.sinkhorn(
        scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error, backend
    )[:4]


def why_not_cpu(*, device, **facts):
    """The row of the capability table for the compiled kernels."""
    if device.type != "cpu":
        return f"needs a CPU tensor, got {device.type}"
    return None if _native.load() is not None else _native.why_missing()


_library.impl("sinkhorn", _sinkhorn, "CompositeExplicitAutograd")
_library.impl("sinkhorn_backward", _sinkhorn_backward, "CompositeExplicitAutograd")
torch.library.register_fake("objslot::sinkhorn", _fake_sinkhorn, lib=_library)
torch.library.register_fake("objslot::sinkhorn_backward", _fake_backward, lib=_library)
torch.library.register_autograd("objslot::sinkhorn", _backward, setup_context=_setup_context, lib=_library)
# The histories begin with the iterations.
register_vmap("sinkhorn", _library, results={4: 1, 5: 1})
register_vmap("sinkhorn_backward", _library, inputs={8: 1, 9: 1})

_backends.register("sinkhorn", "cpu", why_not_cpu)
_backends.register("sinkhorn", "cuda", cuda.why_not, automatic=False)
_backends.register("sinkhorn", "triton", _triton.why_not(__package__), automatic=False)
_backends.register("sinkhorn", "reference", lambda **facts: None)
