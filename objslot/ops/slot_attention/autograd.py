"""Registration of objslot::slot_attention: schema, choice of backend, fake, gradient."""

import torch
from torch import Tensor

from objslot.ops import _autocast, _backends, _direct, _native, _triton
from objslot.ops._arithmetic import compute_dtype
from objslot.ops._second_order import register_second_order
from objslot.ops._vmap import register_vmap
from objslot.ops.slot_attention import native, reference

_lib = torch.library.Library("objslot", "FRAGMENT")
# v is None where the keys are the values too; the gradient of k then holds both parts.
_lib.define(
    "slot_attention(Tensor q, Tensor k, Tensor? v, Tensor? mask, Tensor? bias, float scale, float eps, "
    "bool return_logits, str? backend) -> (Tensor updates, Tensor logits, Tensor mass)"
)
# `needs` says which of the gradients of q, k, v, mask and bias are wanted; the others come back empty.
_lib.define(
    "slot_attention_backward(Tensor? grad_updates, Tensor? grad_logits, Tensor q, Tensor k, Tensor? v, "
    "Tensor? mask, Tensor? bias, Tensor updates, Tensor mass, float scale, float eps, bool[5] needs, "
    "str? backend) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_mask, Tensor grad_bias)"
)

_backends.register("slot_attention", "reference", lambda **facts: None)
_backends.register("slot_attention", "cpu", _native.why_not_cpu)
_backends.register("slot_attention", "triton", _triton.why_not(__package__), automatic=False)


def facts(q: Tensor, k: Tensor, v: Tensor | None) -> dict:
    """What the table of backends is asked with."""
    return {
        "device": q.device,
        "dtype": q.dtype,
        "groups": q.shape[-3],
        "slots": q.shape[-2],
        "positions": k.shape[-2],
        "width": q.shape[-1],
        "value_width": (k if v is None else v).shape[-1],
    }


def _kernels(q, k, v, backend):
    """The module of kernels that serves the call, None for the reference."""
    name = _backends.select("slot_attention", backend, **facts(q, k, v))
    if name == "triton":
        return _triton.kernels(__package__)
    return native if name == "cpu" else None


def _forward(q, k, v, mask, bias, scale, eps, return_logits, backend):
    kernels = _kernels(q, k, v, backend)
    if kernels is not None:
        return kernels.forward(q, k, v, mask, bias, scale, eps, return_logits)
    with _autocast.disabled(q.device):
        updates, logits, mass = reference.slot_attention(q, k, v, mask, bias, scale, eps)
    logits = logits.to(q.dtype).contiguous() if return_logits else q.new_empty(0)
    return updates.to(q.dtype).contiguous(), logits, mass.contiguous()


def _backward(grad_updates, grad_logits, q, k, v, mask, bias, updates, mass, scale, eps, needs, backend):
    kernels = _kernels(q, k, v, backend)
    if kernels is not None:
        return kernels.backward(
            grad_updates, grad_logits, q, k, v, mask, bias, updates, mass, scale, eps, needs
        )
    with _autocast.disabled(q.device):
        grads = reference.slot_attention_backward(
            grad_updates, grad_logits, q, k, v, mask, bias, scale, eps
        )
    return tuple(
        grad.contiguous() if wanted else q.new_empty(0) for grad, wanted in zip(grads, needs, strict=True)
    )


def _fake_forward(q, k, v, mask, bias, scale, eps, return_logits, backend):
    rows = q.shape[:-1]
    return (
        q.new_empty((*rows, (k if v is None else v).shape[-1])),
        q.new_empty((*rows, k.shape[-2])) if return_logits else q.new_empty(0),
        q.new_empty(rows, dtype=compute_dtype(q.dtype)),
    )


def _fake_backward(grad_updates, grad_logits, q, k, v, mask, bias, updates, mass, scale, eps, needs, backend):
    return tuple(
        like.new_empty(like.shape) if wanted else q.new_empty(0)
        for like, wanted in zip((q, k, v, mask, bias), needs, strict=True)
    )


def _setup_context(ctx, inputs, output, *probabilities):
    q, k, v, mask, bias, ctx.scale, ctx.eps, ctx.has_logits, ctx.backend = inputs
    updates, _, mass = output
    ctx.save_for_backward(q, k, v, mask, bias, updates, mass, *probabilities)
    ctx.mark_non_differentiable(mass)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_updates, grad_logits, _):
    needs = list(ctx.needs_input_grad[:5])
    if not ctx.has_logits:
        grad_logits = None
    if grad_updates is None and grad_logits is None:
        return (None,) * 9
    # Once: gradient checkpointing lets nobody look twice.
    saved = ctx.saved_tensors
    given, probabilities = (grad_updates, grad_logits, *saved[:7]), saved[7:]
    if ctx.backend == "cpu" and not torch.is_grad_enabled() and _direct.possible(*given):
        grads = native.backward(*given, ctx.scale, ctx.eps, needs, *probabilities)
    else:
        grads = torch.ops.objslot.slot_attention_backward(*given, ctx.scale, ctx.eps, needs, ctx.backend)
    grads = (grad if wanted else None for grad, wanted in zip(grads, needs, strict=True))
    return (*grads, None, None, None, None)


class _Direct(torch.autograd.Function):
    """The op on tensors that need no dispatcher."""

    @staticmethod
    def forward(ctx, q, k, v, mask, bias, scale, eps, return_logits, backend):
        inputs = q, k, v, mask, bias, scale, eps, return_logits
        *found, probabilities = native.forward_for_backward(*inputs)
        _setup_context(ctx, (*inputs, backend), found, probabilities)
        return tuple(found)

    backward = staticmethod(_gradients)


def slot_attention(q, k, v, mask, bias, scale, eps, return_logits, backend):
    """Updates and logits, by the shortest way; the latter empty unless asked for."""
    tensors = q, k, v, mask, bias
    if backend is None and _direct.possible(*tensors):
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return _Direct.apply(*tensors, scale, eps, return_logits, "cpu")[:2]
        return native.forward(*tensors, scale, eps, return_logits)[:2]
    return torch.ops.objslot.slot_attention(*tensors, scale, eps, return_logits, backend)[:2]


def _differentiable_backward(
    grad_updates, grad_logits, q, k, v, mask, bias, updates, mass, scale, eps, needs, backend
):
    grads = reference.slot_attention_backward(grad_updates, grad_logits, q, k, v, mask, bias, scale, eps)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, needs, strict=True))


_lib.impl("slot_attention", _forward, "CompositeExplicitAutograd")
_lib.impl("slot_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("objslot::slot_attention", _fake_forward, lib=_lib)
torch.library.register_fake("objslot::slot_attention_backward", _fake_backward, lib=_lib)
torch.library.register_autograd("objslot::slot_attention", _gradients, setup_context=_setup_context, lib=_lib)
register_second_order("objslot::slot_attention_backward", _differentiable_backward, _lib)
register_vmap("slot_attention", _lib)
register_vmap("slot_attention_backward", _lib)
