"""Transport that stores no plan, and the loss that rests on it."""

from collections.abc import Sequence

import torch

from objslot import objectives, ops
from objslot.benchmarks.peers import transport as peers
from objslot.benchmarks.problem import Operation, Problem, Work, generator, normal, size_in_bytes, unit
from objslot.ops.transport import reference

SETTINGS = {"eps": 0.05}


def _transport(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    batch, rows, columns, width, channels, n_iters = sizes
    source = generator(sizes)
    x, y = (unit(source, (batch, size, width), device, dtype) for size in (rows, columns))
    values = normal(source, (batch, columns, channels), device, dtype)
    settings = SETTINGS | {"n_iters": n_iters}

    def definition(x, y, values):
        return reference.sinkhorn_transport(x, y, values, **settings)

    moved = size_in_bytes(dtype, x.shape, y.shape, values.shape, (batch, rows, channels))
    flops = 2 * batch * rows * columns * (width + channels + 2 * n_iters)
    return Problem(
        tensors=(x, y, values),
        settings=settings,
        ours=lambda x, y, values: ops.sinkhorn_transport(x, y, values, **settings),
        exact=definition,
        plain=definition,
        gradients=(0, 1, 2),
        work=Work(
            moved, flops, batch * rows * columns, Work(2 * moved, 3 * flops, batch * rows * columns)
        ),
    )


def _alignment(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    clips, frames, positions, width, slots = sizes
    source = generator(sizes)
    logits = normal(source, (clips, frames, slots, positions), device, dtype)
    masks = normal(source, (clips, frames, slots, positions), device, torch.float32).softmax(2).to(dtype)
    keys = normal(source, (clips, frames, positions, width), device, dtype)
    settings = SETTINGS | {"n_iters": 3}

    def definition(logits, masks, keys):
        return peers.definition_of_alignment(logits, masks, keys, **settings)

    moved = size_in_bytes(dtype, logits.shape, masks.shape, keys.shape)
    pairs = clips * frames * (frames - 1)
    # One product of the keys serves both directions of a pair.
    flops = 2 * pairs * positions**2 * (width // 2 + slots + 2 * settings["n_iters"])
    exponentials = pairs * positions**2 // 2
    return Problem(
        tensors=(logits, masks, keys),
        settings=settings,
        ours=lambda logits, masks, keys: objectives.semantic_alignment_loss(logits, masks, keys, **settings),
        exact=definition,
        plain=definition,
        gradients=(0,),
        # The plan is a constant: backward adds a softmax of the logits.
        work=Work(moved, flops, exponentials, Work(moved + size_in_bytes(dtype, logits.shape), flops, exponentials)),
    )


OPERATIONS = (
    Operation(
        name="sinkhorn_transport",
        axes=("batch", "rows", "columns", "width", "channels", "iterations"),
        build=_transport,
        peers=peers.TRANSPORT,
        shapes=((12, 256, 256, 384, 16, 3), (1, 1620, 1620, 384, 16, 3)),
        quick=((12, 256, 256, 384, 16, 3),),
        scaling={"rows": tuple((1, side, side, 64, 16, 3) for side in (256, 1024, 2048, 4096))},
    ),
    Operation(
        name="alignment_loss",
        axes=("clips", "frames", "positions", "width", "slots"),
        build=_alignment,
        peers=peers.ALIGNMENT,
        shapes=((4, 4, 256, 384, 16),),
        quick=((4, 4, 256, 384, 16),),
    ),
)
