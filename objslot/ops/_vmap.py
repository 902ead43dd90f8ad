"""`torch.vmap` of the ops: what is mapped over becomes one more dimension of the batch."""

from collections.abc import Mapping

import torch
from torch import Tensor


def register_vmap(name: str, lib, *, inputs: Mapping[int, int] | None = None, results: Mapping[int, int] | None = None):
    """Make the op `name` map over a batch in one call.

    `inputs` and `results` say, for the tensors that do not begin with the batch, at which dimension it begins.
    """
    inputs, results = inputs or {}, results or {}
    op = getattr(torch.ops.objslot, name)

    def rule(info, in_dims, *arguments):
        given = [
            _batched(value, in_dims[place], info.batch_size, inputs.get(place, 0))
            for place, value in enumerate(arguments)
        ]
        found = op(*given)
        if isinstance(found, Tensor):
            return found, 0
        return found, tuple(None if _left_out(x) else results.get(place, 0) for place, x in enumerate(found))

    torch.library.register_vmap(f"objslot::{name}", rule, lib=lib)


def _batched(value, mapped: int | None, size: int, place: int):
    if not isinstance(value, Tensor) or _left_out(value):
        return value
    if mapped is not None:
        return value.movedim(mapped, place)
    return value.unsqueeze(place).expand(*value.shape[:place], size, *value.shape[place:])


def _left_out(value: Tensor) -> bool:
    """Whether this stands for a result that was not asked for."""
    return value.shape == (0,)
