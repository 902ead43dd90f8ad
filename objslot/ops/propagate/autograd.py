"""Registration of objslot::propagate: schema, choice of backend, fake, gradient through the reference."""

import torch
from torch import Tensor

from objslot.ops import _autocast, _backends, _triton
from objslot.ops._second_order import register_second_order
from objslot.ops._vmap import register_vmap
from objslot.ops.propagate import native, reference

_lib = torch.library.Library("objslot", "FRAGMENT")
_SETTINGS = "int radius, int topk, float temperature, int n_global, str? backend"
_lib.define(f"propagate(Tensor query, Tensor keys, Tensor labels, {_SETTINGS}) -> Tensor")
_lib.define(
    f"propagate_backward(Tensor grad, Tensor query, Tensor keys, Tensor labels, {_SETTINGS}) "
    "-> (Tensor grad_query, Tensor grad_keys, Tensor grad_labels)"
)

_backends.register("propagate", "reference", lambda **facts: None)
_backends.register("propagate", "cpu", native.why_not)
_backends.register("propagate", "triton", _triton.why_not(__package__), automatic=False)


def facts(query: Tensor, keys: Tensor, labels: Tensor, radius: int, topk: int) -> dict:
    """What the table of backends is asked with."""
    return {
        "device": query.device,
        "dtype": query.dtype,
        "label_dtype": labels.dtype,
        "frames": keys.shape[-4],
        "width": query.shape[-1],
        "radius": radius,
        "topk": topk,
    }


def _forward(query, keys, labels, radius, topk, temperature, n_global, backend):
    name = _backends.select("propagate", backend, **facts(query, keys, labels, radius, topk))
    if name != "reference":
        kernels = native if name == "cpu" else _triton.kernels(__package__)
        return kernels.forward(query, keys, labels, radius, topk, temperature, n_global)
    with _autocast.disabled(query.device):
        return reference.bounded(query, keys, labels, radius, topk, temperature, n_global).contiguous()


def _differentiable_backward(grad, query, keys, labels, radius, topk, temperature, n_global, backend):
    return reference.backward(grad, query, keys, labels, radius, topk, temperature, n_global)


def _backward(grad, query, keys, labels, radius, topk, temperature, n_global, backend):
    with _autocast.disabled(query.device):
        grads = reference.backward(grad, query, keys, labels, radius, topk, temperature, n_global)
    return tuple(x.contiguous() for x in grads)


def _fake_forward(query, keys, labels, radius, topk, temperature, n_global, backend):
    return labels.new_empty((*query.shape[:-1], labels.shape[-1]))


def _fake_backward(grad, query, keys, labels, radius, topk, temperature, n_global, backend):
    return tuple(x.new_empty(x.shape) for x in (query, keys, labels))


def _setup_context(ctx, inputs, output):
    query, keys, labels, *ctx.settings = inputs
    ctx.save_for_backward(query, keys, labels)


def _gradients(ctx, grad):
    grads = torch.ops.objslot.propagate_backward(grad, *ctx.saved_tensors, *ctx.settings)
    needed = (grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad[:3], strict=True))
    return (*needed, None, None, None, None, None)


_lib.impl("propagate", _forward, "CompositeExplicitAutograd")
_lib.impl("propagate_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("objslot::propagate", _fake_forward, lib=_lib)
torch.library.register_fake("objslot::propagate_backward", _fake_backward, lib=_lib)
torch.library.register_autograd("objslot::propagate", _gradients, setup_context=_setup_context, lib=_lib)
register_second_order("objslot::propagate_backward", _differentiable_backward, _lib)
register_vmap("propagate", _lib)
register_vmap("propagate_backward", _lib)
