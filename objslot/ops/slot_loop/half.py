"""The iterations of slot attention in bfloat16 on AMX tiles, forward alone, where nobody goes back through them.

Rows are rounded to bfloat16 for every product, as PyTorch does; slots, norms and gates stay in float32.
"""

import torch
from torch import Tensor

from objslot.ops import _direct, _native
from objslot.ops.slot_loop import native


def serves(x: Tensor, initial: Tensor, mask: Tensor | None, layers: tuple[Tensor | None, ...]) -> bool:
    """Whether `forward` takes these inputs, slots and layers: of bfloat16, or autocast to it."""
    taken = {torch.bfloat16}
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
        taken.add(torch.float32)
    return (
        x.device.type == "cpu"
        and all(tensor is None or tensor.dtype in taken for tensor in (x, *layers))
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
    x = x.to(torch.bfloat16)
    layers = [
        None if layer is None else layer.to(torch.bfloat16 if layer.dim() == 2 else torch.float32) for layer in layers
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
