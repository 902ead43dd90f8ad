"""Slot attention: the softmax, the core and the modules."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from objslot import nn as modules
from objslot import ops
from objslot.benchmarks.peers import slots as peers
from objslot.benchmarks.problem import Operation, Problem, Work, generator, normal, size_in_bytes
from objslot.ops.slot_attention import reference as core_reference
from objslot.ops.slot_softmax import reference as softmax_reference

EPS = 1e-8
ITERATIONS = 3


def _mask(source: torch.Generator, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a softmax over the groups leaves to each of them."""
    return normal(source, shape, device, torch.float32).softmax(-2).to(dtype)


def _softmax(masked: bool):
    def build(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
        batch, groups, slots, positions = sizes
        source = generator(sizes)
        tensors = [normal(source, (batch, groups, slots, positions), device, dtype)]
        if masked:
            tensors.append(_mask(source, (batch, groups, positions), device, dtype))

        def definition(logits, mask=None):
            return softmax_reference.slot_softmax(logits, mask, EPS)[0]

        once = size_in_bytes(dtype, *(tensor.shape for tensor in tensors))
        count = tensors[0].numel()
        return Problem(
            tensors=tuple(tensors),
            settings={},
            ours=ops.slot_softmax,
            exact=definition,
            plain=definition,
            gradients=tuple(range(len(tensors))),
            work=Work(once + size_in_bytes(dtype, tensors[0].shape), 0, count, Work(3 * once, 0, count)),
        )

    return build


def _core(masked: bool):
    def build(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
        batch, groups, slots, positions, width = sizes
        source = generator(sizes)
        q = normal(source, (batch, groups, slots, width), device, dtype)
        k, v = (normal(source, (batch, positions, width), device, dtype) for _ in range(2))
        tensors = [q, k, v]
        if masked:
            tensors.append(_mask(source, (batch, groups, positions), device, dtype))

        def definition(q, k, v, mask=None):
            return core_reference.slot_attention(q, k, v, mask, None, width**-0.5, EPS)[0].to(q.dtype)

        once = size_in_bytes(dtype, *(tensor.shape for tensor in tensors))
        entries = batch * groups * slots * positions
        flops = 4 * entries * width
        return Problem(
            tensors=tuple(tensors),
            settings={},
            ours=ops.slot_attention,
            exact=definition,
            plain=definition,
            gradients=tuple(range(len(tensors))),
            # Backward makes the logits again, and four more products of the same size.
            work=Work(
                once + size_in_bytes(dtype, q.shape),
                flops,
                entries,
                Work(2 * once + size_in_bytes(dtype, q.shape), 3 * flops, entries),
            ),
        )

    return build


class _Slots(modules.SlotAttention):
    """The slots alone, of learned initial ones."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).slots


class _SemanticSlots(modules.SemanticSlotAttention):
    """Both slots and both logits."""

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        found = super().forward(x, noise=noise)
        return found.semantic_slots, found.instance_slots, found.semantic_logits, found.instance_logits


def _seeded(build, device: torch.device, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().to(device, dtype)


def _module(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    batch, slots, positions, width = sizes
    ours = _seeded(lambda: _Slots(slots, width, initial="learned", bias=True), device, dtype)
    plain = peers.PlainSlots(slots, width).to(device, dtype)
    x = normal(generator(sizes), (batch, positions, width), device, dtype)
    flops = _module_flops(batch, (slots,), positions, width)
    # The GRU: six products of the width for every slot and iteration.
    flops += 2 * batch * slots * 6 * width**2 * ITERATIONS
    return _module_problem(ours, plain, (x,), flops, batch * slots * positions * ITERATIONS)


def _semantic(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    batch, semantics, instances, positions, width = sizes
    ours = _seeded(lambda: _SemanticSlots(semantics, width, instances=instances), device, dtype)
    plain = peers.TwoStages(semantics, width).to(device, dtype)
    source = generator(sizes)
    x = normal(source, (batch, positions, width), device, dtype)
    noise = normal(source, (semantics, instances, width), device, dtype)
    rows = semantics * (1 + instances)
    flops = _module_flops(batch, (semantics, semantics * instances), positions, width)
    return _module_problem(ours, plain, (x, noise), flops, batch * rows * positions * ITERATIONS)


def _module_flops(batch: int, stages: Sequence[int], positions: int, width: int) -> int:
    """The fewest: keys and values projected once, or slots projected in every iteration; then attention and MLP."""
    rows = sum(stages) * ITERATIONS
    projections = 2 * batch * width**2 * (2 * min(rows, positions) + rows)
    attention = 4 * batch * rows * positions * width
    return projections + attention + 4 * batch * rows * width * max(width, 128)


def _module_problem(ours, plain, tensors, flops: int, exponentials: int) -> Problem:
    plain.load_state_dict(ours.state_dict())
    moved = size_in_bytes(tensors[0].dtype, tensors[0].shape)
    return Problem(
        tensors=tensors,
        settings={},
        ours=ours,
        exact=copy.deepcopy(plain).double(),
        plain=plain,
        gradients=(0,),
        work=Work(moved, flops, exponentials, Work(3 * moved, 3 * flops, exponentials)),
    )


def _assign(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Problem:
    scores = normal(generator(sizes), sizes, device, dtype)
    return Problem(
        tensors=(scores,),
        settings={},
        ours=ops.assign,
        exact=peers.scipy_loop,
        plain=peers.scipy_loop,
        gradients=(),
        work=Work(size_in_bytes(dtype, sizes) + 8 * sizes[0] * sizes[1]),
    )


SOFTMAX_AXES = ("batch", "groups", "slots", "positions")
CORE_AXES = (*SOFTMAX_AXES, "width")

OPERATIONS = (
    Operation(
        name="slot_softmax",
        axes=SOFTMAX_AXES,
        build=_softmax(False),
        peers=peers.SOFTMAX,
        shapes=((32, 1, 16, 256),),
        quick=((32, 1, 16, 256),),
    ),
    Operation(
        name="slot_softmax_masked",
        axes=SOFTMAX_AXES,
        build=_softmax(True),
        peers=peers.SOFTMAX,
        shapes=((8, 16, 4, 256),),
        quick=(),
    ),
    Operation(
        name="slot_attention",
        axes=CORE_AXES,
        build=_core(False),
        peers=peers.CORE,
        shapes=((32, 1, 16, 256, 384), (2, 1, 16, 1620, 384)),
        quick=((32, 1, 16, 256, 384),),
        scaling={
            "positions": tuple((8, 1, 16, count, 64) for count in (64, 256, 1024, 4096, 16384)),
            "slots": tuple((8, 1, count, 1024, 64) for count in (4, 16, 64, 256)),
        },
    ),
    Operation(
        name="slot_attention_masked",
        axes=CORE_AXES,
        build=_core(True),
        peers=peers.CORE,
        shapes=((8, 16, 4, 256, 384),),
        quick=((8, 16, 4, 256, 384),),
    ),
    Operation(
        name="nn.SlotAttention",
        axes=("batch", "slots", "positions", "width"),
        build=_module,
        peers=peers.SLOTS,
        shapes=((32, 16, 256, 384), (8, 7, 4096, 64)),
        quick=((32, 16, 256, 384),),
    ),
    Operation(
        name="nn.SemanticSlotAttention",
        axes=("batch", "semantics", "instances", "positions", "width"),
        build=_semantic,
        peers=peers.TWO_STAGES,
        shapes=((16, 16, 4, 256, 384),),
        quick=((16, 16, 4, 256, 384),),
    ),
    Operation(
        name="assign",
        axes=("problems", "rows", "columns"),
        build=_assign,
        peers=peers.ASSIGNMENT,
        shapes=((512, 4, 4),),
        quick=((512, 4, 4),),
        dtypes=("float32",),
        differentiable=False,
    ),
)
