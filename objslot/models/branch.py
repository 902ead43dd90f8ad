"""The part of the model that student and teacher have one each of, and what it finds."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from objslot.models.config import SMTCConfig
from objslot.models.correspondence import TemporalFusion
from objslot.nn import SemanticSlotAttention, SemanticSlots


class IterationMaps(NamedTuple):
    """The masks after one slot attention iteration of both stages."""

    semantic: Tensor
    """(B, T, N, HW), summing to 1 over N."""
    instance: Tensor
    """(B, T, N, P, HW), summing to 1 over P."""


class SlotMaps(NamedTuple):
    """N semantics and P instances of each, found in B clips of T frames on an h x w grid of HW positions."""

    semantic: Tensor
    """(B, T, N, HW): A, softmax over N."""
    instance: Tensor
    """(B, T, N, P, HW): M, softmax over P; the final mask of an instance is A[n] * M[n, p]."""
    semantic_slots: Tensor
    """(B, T, N, D)."""
    instance_slots: Tensor
    """(B, T, N, P, D)."""
    initial: Tensor
    """(N, P, D): the instance slots before the first iteration, the same in every frame."""
    grid: tuple[int, int]
    """(h, w)."""
    iterations: list[IterationMaps] | None
    """The masks after every iteration, when asked for."""


class SlotBranch(nn.Module):
    """Projection to the width of the slots, temporal fusion, both slot stages, and the instance head.

    The head h maps an instance slot to what instances are aligned by: D -> 2D -> D with a ReLU.
    """

    def __init__(self, config: SMTCConfig, encoder_width: int, grid: tuple[int, int]):
        super().__init__()
        width = config.width or encoder_width
        self.project = nn.Identity() if width == encoder_width else nn.Linear(encoder_width, width)
        self.fusion = TemporalFusion(
            width, grid, correspondence=config.correspondence, temperature=config.correspondence_temperature
        )
        self.slots = SemanticSlotAttention(
            config.slots,
            width,
            instances=config.instances,
            iterations=config.iterations,
            update=config.update,
            aggregation=config.aggregation,
            full_bptt=config.full_bptt,
        )
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, keys: Tensor, correspondence: Tensor, **slot_options) -> tuple[SemanticSlots, Tensor]:
        """Slots of frames with `keys` (B, T, HW, D), and the ratio |E| / |F| of the fusion.

        `correspondence` is theirs with other frames, from `TemporalFusion.correspond`; `slot_options` go to
        SemanticSlotAttention.
        """
        fused, ratio = self.fusion(self.project(keys), correspondence)
        return self.slots(fused, **slot_options), ratio


def random_noise(
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Standard normal noise (B, ...) on `device`; of several generators each draws for one of the B clips."""
    if isinstance(generator, Sequence):
        return torch.stack([random_noise(shape[1:], device, one) for one in generator])
    if generator is not None and generator.device.type != device.type:
        # Drawing millions of numbers on the CPU would take longer than a step on a GPU.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator)


def seeded_noise(semantics: int, instances: int, width: int, seed: int) -> Tensor:
    """(N, P, D) standard normal noise on the CPU; the first instances are the same for every larger P."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(semantics, width, generator=generator) for _ in range(instances)], dim=1)
