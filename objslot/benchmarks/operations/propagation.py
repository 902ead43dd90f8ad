"""Labels carried from context frames to the next, with the settings that videos at stride 16 are judged by."""

from collections.abc import Sequence

import torch

from objslot import ops
from objslot.benchmarks.peers import propagation as peers
from objslot.benchmarks.problem import Operation, Problem, Work, generator, normal, size_in_bytes
from objslot.ops.propagate import reference

SETTINGS = {"radius": 7, "topk": 7, "temperature": 0.2, "n_global": 1}


def _propagate(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    frames, height, width, features, classes = sizes
    source = generator(sizes)
    query = normal(source, (1, height, width, features), device, dtype)
    keys = normal(source, (1, frames, height, width, features), device, dtype)
    labels = normal(source, (1, frames, height, width, classes), device, torch.float32).softmax(-1).to(dtype)
    places = torch.arange(height * width)
    near = reference.within(height, width, SETTINGS["radius"], places).sum().item()
    pairs = (height * width) ** 2 + (frames - 1) * near
    return Problem(
        tensors=(query, keys, labels),
        settings=SETTINGS,
        ours=lambda query, keys, labels: ops.propagate(query, keys, labels, **SETTINGS),
        exact=lambda query, keys, labels: reference.bounded(query, keys, labels, **SETTINGS),
        plain=lambda query, keys, labels: reference.plain(query, keys, labels, **SETTINGS),
        gradients=(),
        work=Work(
            size_in_bytes(dtype, query.shape, keys.shape, labels.shape, (1, height, width, classes)),
            2 * pairs * features,
        ),
    )


OPERATIONS = (
    Operation(
        name="propagate",
        axes=("frames", "height", "width", "features", "classes"),
        build=_propagate,
        peers=peers.PROPAGATION,
        shapes=((8, 30, 53, 384, 4),),
        quick=((3, 30, 53, 384, 4),),
        differentiable=False,
    ),
)
