"""Temporal correspondence between frames, and its fusion with the features of a frame."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from objslot.errors import UserError


def draw_other_frames(
    clips: int,
    frames: int,
    count: int,
    *,
    sampling: str = "other",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """(B, T, count) int64: `count` different other frames for every frame of every clip; with "self", itself.

    Drawn on the CPU, so that a seed gives the same frames on every device; of several generators each draws
    for one clip. Raises `UserError` when a clip
    has fewer than `count` other frames.
    """
    if sampling == "self":
        return torch.arange(frames).view(1, frames, 1).expand(clips, frames, 1)
    if count > frames - 1:
        raise UserError(
            f"n_other: got {count}, expected at most {frames - 1} other frames in clips of {frames}"
        )
    if isinstance(generator, Sequence):
        drawn = torch.stack([torch.rand(frames, frames - 1, generator=one) for one in generator])
    else:
        drawn = torch.rand(clips, frames, frames - 1, generator=generator)
    order = drawn.argsort(dim=-1)[..., :count]
    return order + (order >= torch.arange(frames).view(1, frames, 1))


def previous_frames(frames: int, *, sampling: str = "other") -> Tensor:
    """(T,) int64: what each frame corresponds to at inference: the one before, the first to the one after."""
    index = torch.arange(frames)
    if sampling == "self" or frames == 1:
        return index
    return torch.where(index == 0, 1, index - 1)


def gather_frames(features: Tensor, index: Tensor) -> Tensor:
    """Frames `index` (B, T, K) of features (B, T, n, D) -> (B, T, K, n, D)."""
    clip = torch.arange(features.shape[0], device=features.device).view(-1, 1, 1)
    return features[clip, index]


class TemporalFusion(nn.Module):
    """X = F + E: features of a frame joined with what corresponds to them in other frames.

    E = W C + b over the positions of the other frame, W: width x positions of the training grid. With
    `correspondence="cosine"` C is the cosine over `temperature`, and E is layer-normalised and scaled by a
    learned number that starts at 1; "raw" takes dot products and no normalisation.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], *, correspondence: str = "cosine", temperature: float = 0.1
    ):
        super().__init__()
        self.grid = tuple(grid)
        self.correspondence = correspondence
        self.temperature = temperature
        self.embed = nn.Linear(grid[0] * grid[1], width)
        if correspondence == "cosine":
            self.norm = nn.LayerNorm(width)
            self.scale = nn.Parameter(torch.ones(()))

    def prepare(self, keys: Tensor, grid: tuple[int, int]) -> Tensor:
        """Keys (..., hw, D) of `grid` as the other side of a correspondence: (..., positions of training, D).

        The map is linear in them, so averaging frames and resizing here is averaging and resizing maps.
        """
        if self.correspondence == "cosine":
            keys = F.normalize(keys, dim=-1)
        if tuple(grid) == self.grid:
            return keys
        leading = keys.shape[:-2]
        image = keys.flatten(0, -3).transpose(1, 2).unflatten(2, grid)
        image = F.interpolate(image, size=self.grid, mode="bilinear", align_corners=False)
        return image.flatten(2).transpose(1, 2).unflatten(0, leading)

    def correspond(self, keys: Tensor, other: Tensor) -> Tensor:
        """C (..., n, positions of training): nothing in it is learned.

        `keys` (..., n, D) are those of a frame, `other` (..., positions of training, D) is what `prepare` made of the
        other frames, averaged.
        """
        if self.correspondence == "cosine":
            keys = F.normalize(keys, dim=-1) / self.temperature
        return keys @ other.transpose(-2, -1)

    def forward(self, features: Tensor, correspondence: Tensor) -> tuple[Tensor, Tensor]:
        """Fused features and the ratio |E| / |F|, a scalar mean over positions, without gradient.

        `features` (..., n, width) are what E is added to, `correspondence` is what `correspond` made.
        """
        embedding = self.embed(correspondence)
        if self.correspondence == "cosine":
            embedding = self.norm(embedding) * self.scale
        with torch.no_grad():
            feature_norm = features.float().norm(dim=-1)
            ratio = (embedding.float().norm(dim=-1) / feature_norm.clamp_min(1e-6)).mean()
        return features + embedding, ratio
