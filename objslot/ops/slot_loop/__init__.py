"""All iterations of slot attention in one call: what the modules of `objslot.nn` run on the CPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from objslot.ops import _checks, _direct
from objslot.ops.slot_loop import autograd
from objslot.ops.slot_softmax import prepare_mask

__all__ = ["Epsilons", "Inputs", "Layers", "facts", "slot_loop", "slot_loop_in_turn"]


class Layers(NamedTuple):
    """The layers of slot attention, W wide, on inputs that are E wide; matrices are (outputs, inputs).

    The projections are folded: `query` (E + 1, W) turns a normalised slot into what it is compared with the
    normalised inputs by, its last row into the constant of its logits; `value` (W, E) projects the averages of the
    normalised inputs. Without `input_gates` the slots are added to, with them a GRU updates them.
    """

    query: Tensor
    query_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    norm_slots: Tensor
    norm_slots_bias: Tensor
    norm_mlp: Tensor
    norm_mlp_bias: Tensor
    input_gates: Tensor | None
    hidden_gates: Tensor | None
    input_gates_bias: Tensor | None
    hidden_gates_bias: Tensor | None
    mlp_in: Tensor
    mlp_in_bias: Tensor
    mlp_out: Tensor
    mlp_out_bias: Tensor


class Epsilons(NamedTuple):
    """Of the softmax (see `objslot.slot_attention`) and of the norms of inputs, slots and MLP."""

    softmax: float
    inputs: float
    slots: float
    mlp: float


class _Handed(NamedTuple):
    """What a call handed on: the tensors, the statistics of the inputs, whether gradients go back to that call."""

    x: Tensor
    layers: Layers
    statistics: Tensor
    follows: bool


class Inputs(NamedTuple):
    """Inputs and layers of calls of `slot_loop_in_turn`."""

    x: Tensor
    layers: Layers
    handed: _Handed | None = None


def slot_loop(
    x: Tensor,
    initial: Tensor,
    mask: Tensor | None,
    layers: Layers,
    *,
    scale: float,
    eps: Epsilons,
    iterations: int,
    only_last: bool = False,
    return_iterations: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slot attention (Locatello et al. 2020, Algorithm 1) in groups of slots, without keys, values or attention.

    Args:
        x: (..., n, E), inputs before their norm, whose weight and bias are part of `layers`; float32 or float64.
        initial: (..., g, p, W), leading dimensions, dtype and device of x.
        mask: (..., g, n), see `objslot.slot_attention`, leading dimensions of x; None counts every position once.
        layers: of the dtype and on the device of x.
        scale: above 0, factor of the logits.
        iterations: at least 1.
        only_last: the gradient passes through the last iteration and then straight to `initial`, as if the earlier
            ones had not changed the slots; memory does not depend on the number of iterations.
        return_iterations: also return the logits of the iterations before the last, without gradient.
        backend: see `objslot.use_backend`.

    Returns:
        slots (..., g, p, W), logits (..., g, p, n) of the last iteration, and those of the iterations before it
        (iterations - 1, ..., g, p, n), empty unless asked for.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or number.
        BackendError: the backend asked for by name cannot serve the call.
    """
    settings = {"scale": scale, "eps": eps, "iterations": iterations, "only_last": only_last}
    found = slot_loop_in_turn(
        Inputs(x, layers), initial, mask, **settings, return_iterations=return_iterations, backend=backend
    )
    return found[:3]


def slot_loop_in_turn(
    inputs: Inputs,
    initial: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    eps: Epsilons,
    iterations: int,
    only_last: bool = False,
    return_iterations: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Inputs]:
    """As `slot_loop`, and inputs for one next call with the same x and layers.

    Their statistics are found once, and the gradients of x and of the layers are added up in one memory.
    """
    x, layers, handed = inputs
    _checks.tensor("x", x, "(..., n, E)")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected float32 or float64, got {x.dtype}")
    _checks.tensor("initial", initial, "(..., g, p, W)")
    batch, width, input_width = x.shape[:-2], initial.shape[-1], x.shape[-1]
    _checks.shape("initial", initial, (*batch, *initial.shape[-3:]), "(..., g, p, W)")
    _checks.like("initial", initial, "x", x)
    hidden = layers.mlp_in.shape[0]
    sizes = autograd.layer_sizes(width, input_width, hidden)
    for name, value, size in zip(Layers._fields, layers, sizes, strict=True):
        if value is not None:
            _checks.like(f"layers.{name}", value, "x", x)
            _checks.shape(f"layers.{name}", value, size, "of this layer")
    _checks.positive("scale", scale)
    for name, value in zip(Epsilons._fields, eps, strict=True):
        _checks.positive(f"eps.{name}", value)
    _checks.at_least("iterations", iterations, 1)
    if mask is not None:
        mask = prepare_mask(mask, x, "x", (*batch, initial.shape[-3], x.shape[-2]))
    tensors = (x, mask, initial, *layers)
    kept = 0
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors):
        kept = 1 if only_last else iterations
    settings = (scale, list(eps), iterations, only_last)
    if backend is None and _direct.possible(*tensors):
        if handed is not None:
            tensors = (handed.x, mask, initial, *handed.layers)
        statistics, follows = (None, False) if handed is None else handed[2:]
        *found, statistics, (same, *others) = autograd.direct(
            tensors, settings, kept, return_iterations, statistics, follows
        )
        return *found, Inputs(x, layers, _Handed(same, Layers(*others), statistics, kept > 0))
    slots, logits, history, *_ = torch.ops.objslot.slot_loop(*tensors, *settings, kept, return_iterations, backend)
    return slots, logits, history, inputs


def facts(x: Tensor, *args, **kwargs) -> dict:
    """What decides the backend of `slot_loop(x, ...)`."""
    return autograd.facts(x)
