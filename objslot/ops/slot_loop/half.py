"""The iterations of slot attention in bfloat16 on AMX tiles, forward alone, where nobody goes back through them.

Rows are rounded to bfloat16 for every product, as PyTorch does; slots, norms and gates stay in float32.
"""

import torch
from torch import Tensor

from objslot.ops import _direct, _native
from objslot.ops.slot_loop import native


def serves(x: Tensor, initial: Tensor, mask: Tensor | None, layers: tuple[Tensor | None, ...]) -> bool:
    """Whether `forward` takes these inputs, slots and layers."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and all(tensor is None or tensor.dtype == torch.bfloat16 for tensor in layers)
        and not torch.is_autocast_enabled("cpu")
        and _direct.possible(x, initial, mask, *layers)
        and _native.load().multiplies_on_tiles()
    )


def forward(
    x: Tensor,
    initial: Tensor,
    mask: Tensor | None,
    layers: tuple[Tensor | None, ...],
    *,
    scale: float,
    eps: tuple[float, ...],
    iterations: int,
    return_iterations: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, logits and earlier logits as of `slot_loop`, without gradient, of inputs that are normalised already."""
    matrices = [layer is not None and layer.dim() == 2 for layer in layers]
    layers = [
        layer if layer is None or matrix else layer.float() for layer, matrix in zip(layers, matrices, strict=True)
    ]
    if mask is not None:
        mask = mask.to(x.dtype)
    logits_shape = (*initial.shape[:-1], x.shape[-2])
    slots = _native.empty(initial.shape, torch.float32)
    logits = _native.empty(logits_shape, x.dtype)
    history = _native.empty((iterations - 1, *logits_shape) if return_iterations else (0,), x.dtype)
    start = native.elements(initial).float()
    problem, alive = native.describe(x, mask, initial, layers, scale, eps)
    earlier = [step.data_ptr() for step in history] if return_iterations else [0] * (iterations - 1)
    _native.load().slot_loop_forward(
        problem, start.data_ptr(), start.stride(0), iterations, iterations, [], [0, 0], False, eps[1],
        [*earlier, logits.data_ptr()], slots.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del alive
    return slots.to(initial.dtype), logits, history
