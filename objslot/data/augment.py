"""Photometric augmentation of whole clips: drawn per clip, applied to a batch in three tensor operations.

Grayscale, colour jitter and Gaussian blur; the geometry stays untouched, so that the positions of two
differently augmented views stay aligned. Every frame of a clip gets the same change.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from objslot.data.statistics import MEAN, STD

# ITU-R BT.601 luma.
_LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
# What a drawn vector holds: gray or not, four factors, the order of the four, sigma of the blur (0: none).
N_PARAMETERS = 10


@dataclass(frozen=True)
class Photometric:
    """How strongly and how often clips are changed; the defaults are the recipe of the method."""

    grayscale: float = 0.2
    """Probability of a gray clip."""
    jitter: float = 0.8
    """Probability of a colour jitter."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    """Factors are drawn from 1 - value to 1 + value."""
    hue: float = 0.1
    """Largest turn of the hue, as a share of the colour circle."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's deviation in pixels."""

    def draw(self, random: np.random.Generator) -> Tensor:
        """Parameters of one view of one clip: float32 (N_PARAMETERS,), all from `random`."""
        gray = random.random() < self.grayscale
        factors = [random.uniform(1 - s, 1 + s) for s in (self.brightness, self.contrast, self.saturation)]
        factors.append(random.uniform(-self.hue, self.hue))
        order = random.permutation(4)
        if random.random() >= self.jitter:
            factors = [1.0, 1.0, 1.0, 0.0]
        sigma = random.uniform(*self.sigma)
        if random.random() >= self.blur:
            sigma = 0.0
        return torch.tensor([float(gray), *factors, *order, sigma], dtype=torch.float32)


def augment(frames: Tensor, parameters: Tensor) -> Tensor:
    """Change clips (B, T, 3, H, W), in [0, 1], as `parameters` (B, N_PARAMETERS) say; the result is in [0,
    1].

    Brightness, contrast and saturation blend with black, with the clip's mean luma and with each pixel's
    luma; the hue turns in the YIQ plane. All are affine in the colour, so they are composed per clip, in the
    drawn order, into one 3 x 3 matrix and an offset, and clipped once at the end.
    """
    matrix, offset = _colour_transform(frames.mean(dim=(1, 3, 4)), parameters)
    clips, length, _, height, width = frames.shape
    # One matrix product per clip over its pixels, with the channels as rows.
    pixels = frames.transpose(1, 2).reshape(clips, 3, -1)
    changed = torch.baddbmm(offset.unsqueeze(-1), matrix, pixels).clamp_(0, 1)
    changed = changed.view(clips, 3, length, height, width).transpose(1, 2)
    sigma = parameters[:, 9]
    blurred = sigma.nonzero().squeeze(1)
    if len(blurred):
        changed = changed.contiguous()
        changed[blurred] = _blur(changed[blurred], sigma[blurred])
    return changed


def normalise(frames: Tensor) -> Tensor:
    """Frames (..., 3, H, W) in [0, 1] with ImageNet's mean taken off, over its deviation."""
    mean = torch.tensor(MEAN, device=frames.device, dtype=frames.dtype)[:, None, None]
    deviation = torch.tensor(STD, device=frames.device, dtype=frames.dtype)[:, None, None]
    return (frames - mean) / deviation


def _colour_transform(mean: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, 3) and (B, 3) from the clips' mean colours (B, 3)."""
    clips = len(mean)
    identity = torch.eye(3, device=mean.device).expand(clips, 3, 3)
    luma = torch.tensor(_LUMA, device=mean.device).expand(3, 3)
    gray, factors, order = parameters[:, 0], parameters[:, 1:5], parameters[:, 5:9].long()

    def blend(index: int) -> Tensor:
        return factors[:, index, None, None]

    scaled = blend(_BRIGHTNESS) * identity, blend(_CONTRAST) * identity
    saturated = blend(_SATURATION) * identity + (1 - blend(_SATURATION)) * luma
    candidates = torch.stack([*scaled, saturated, _hue_rotation(factors[:, _HUE])], dim=1)

    matrix, offset = identity, torch.zeros_like(mean)
    rows = torch.arange(clips, device=mean.device)
    for position in range(4):
        which = order[:, position]
        current = (matrix @ mean.unsqueeze(-1)).squeeze(-1) + offset
        pull = ((1 - factors[:, _CONTRAST]) * (current @ luma[0]))[:, None].expand_as(mean)
        step = candidates[rows, which]
        offset = (step @ offset.unsqueeze(-1)).squeeze(-1) + torch.where(
            (which == _CONTRAST)[:, None], pull, 0
        )
        matrix = step @ matrix
    to_gray = torch.where((gray > 0)[:, None, None], luma, identity)
    return to_gray @ matrix, (to_gray @ offset.unsqueeze(-1)).squeeze(-1)


def _hue_rotation(turn: Tensor) -> Tensor:
    """(B, 3, 3) that turns the hue by shares `turn` (B,) of the circle and keeps the luma."""
    forth = torch.tensor(_YIQ, device=turn.device)
    cosine, sine = torch.cos(2 * torch.pi * turn), torch.sin(2 * torch.pi * turn)
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    rows = [one, zero, zero, zero, cosine, sine, zero, -sine, cosine]
    return torch.linalg.inv(forth) @ torch.stack(rows, dim=-1).view(-1, 3, 3) @ forth


def _blur(frames: Tensor, sigma: Tensor) -> Tensor:
    for side in frames.shape[:-3:-1]:
        # One product per clip over all rows; after two of them height and width are back in place.
        rows = frames.reshape(len(frames), -1, side) @ _blur_matrix(side, sigma).transpose(1, 2)
        frames = rows.view(frames.shape).transpose(-2, -1)
    return frames


def _blur_matrix(side: int, sigma: Tensor) -> Tensor:
    """(B, side, side): a Gaussian of deviation `sigma` (B,) cut at the border and summing to 1 at every
    pixel.
    """
    position = torch.arange(side, device=sigma.device, dtype=torch.float32)
    distance = position[:, None] - position
    weight = torch.exp(-0.5 * (distance / sigma[:, None, None]).square())
    # Processors multiply numbers this far below 1 ten times slower, and no pixel would change by them.
    weight = weight.masked_fill(weight < 1e-12, 0)
    return weight / weight.sum(dim=-1, keepdim=True)
