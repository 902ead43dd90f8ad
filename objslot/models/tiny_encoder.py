"""The encoder that ships with the package, for use without a download: a small ViT on fixed texture filters.

`objslot_tiny` sees luminance only. Its first layer is a fixed bank of Gabor energies at four scales and eight
orientations, beside the magnitudes of their Fourier transform over orientation, which a rotation leaves as
they are. The transformer on top has no position embedding. Its weights were learned without labels from
procedural textures, by `scripts/train_tiny_encoder.py`: it knows textures, not things.
"""

from __future__ import annotations

import math
from importlib import resources

import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NAME", "TextureEmbed", "create_tiny_encoder"]

NAME = "objslot_tiny"
_WEIGHTS = "tiny_encoder.safetensors"

_PERIODS = (4.0, 6.0, 9.0, 13.0)  # pixels
_ORIENTATIONS = 8
_RADIUS = 13  # of a filter, pixels
_STRIDE = 2  # of the filters, pixels
_LEAST_ENERGY = 0.02
# Luminance (Rec. 601) of frames normalised with ImageNet's deviations; their means only add a constant.
_LUMINANCE = (0.299 * 0.229, 0.587 * 0.224, 0.114 * 0.225)


class TextureEmbed(nn.Module):
    """Frames to one token a patch: energies of fixed Gabor filters, averaged over the patch, a linear map.

    Args: those that timm's VisionTransformer gives its patch embedding. `forward` takes (B, 3, H, W),
    normalised, H and W multiples of the patch, and returns (B, H / patch, W / patch, embed_dim).
    """

    def __init__(self, img_size=224, patch_size=8, in_chans=3, embed_dim=128, **_):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.register_buffer("filters", _gabor_filters(), persistent=False)
        self.register_buffer("window", _window(patch_size // _STRIDE), persistent=False)
        self.register_buffer("luminance", torch.tensor(_LUMINANCE).view(1, 3, 1, 1), persistent=False)
        channels = len(_PERIODS) * (_ORIENTATIONS + _ORIENTATIONS // 2 + 1)
        self.norm = nn.BatchNorm1d(channels, affine=False)
        self.proj = nn.Linear(channels, embed_dim)

    def feat_ratio(self, as_scalar: bool = True):
        """Pixels a position stands for, as timm asks for it."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def forward(self, frames: Tensor) -> Tensor:
        energies = self.energies(frames)
        grid = energies.shape[1:3]
        return self.proj(self.norm(energies.flatten(0, 2))).unflatten(0, (-1, *grid))

    def energies(self, frames: Tensor) -> Tensor:
        """Log energies around every patch and their rotation-free magnitudes: (B, h, w, channels)."""
        grey = (frames * self.luminance).sum(1, keepdim=True).to(self.filters.dtype)
        # A frame smaller than a filter cannot be continued by its mirror image.
        padding = "reflect" if min(grey.shape[-2:]) > _RADIUS else "replicate"
        response = F.conv2d(F.pad(grey, (_RADIUS,) * 4, mode=padding), self.filters, stride=_STRIDE)
        energy = response.unflatten(1, (2, -1)).square().sum(1).add(1e-12).sqrt()
        channels, stride = energy.shape[1], self.patch_size[0] // _STRIDE
        energy = F.pad(energy, ((len(self.window) - stride) // 2,) * 4, mode="replicate")
        for shape, step in (((-1, 1), (stride, 1)), ((1, -1), (1, stride))):
            kernel = self.window.view(1, 1, *shape).expand(channels, 1, -1, -1)
            energy = F.conv2d(energy, kernel, stride=step, groups=channels)
        # The Fourier transform knows no half precision.
        energy = (energy + _LEAST_ENERGY).log().float().unflatten(1, (len(_PERIODS), _ORIENTATIONS))
        magnitudes = torch.fft.rfft(energy, dim=2).abs() / _ORIENTATIONS
        return torch.cat([energy.flatten(1, 2), magnitudes.flatten(1, 2)], dim=1).permute(0, 2, 3, 1).to(frames.dtype)


def create_tiny_encoder(pretrained: bool = True) -> VisionTransformer:
    """The network of `objslot_tiny`: patch 8, width 128, 3 blocks; its own weights or random ones."""
    model = VisionTransformer(
        img_size=192, patch_size=8, embed_dim=128, depth=3, num_heads=4, num_classes=0, pos_embed="none",
        dynamic_img_size=True, embed_layer=TextureEmbed,
    )  # fmt: skip
    if pretrained:
        data = resources.files("objslot.models").joinpath(_WEIGHTS).read_bytes()
        model.load_state_dict({name: value.float() for name, value in safetensors.torch.load(data).items()})
    return model


def _gabor_filters() -> Tensor:
    """Zero-mean even filters, then odd ones: (2 * scales * orientations, 1, side, side)."""
    steps = torch.arange(-_RADIUS, _RADIUS + 1.0)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    even, odd = [], []
    for period in _PERIODS:
        envelope = torch.exp(-(x * x + y * y) / (2 * (0.45 * period) ** 2))
        envelope = envelope / envelope.sum()
        for k in range(_ORIENTATIONS):
            angle = math.pi * k / _ORIENTATIONS
            phase = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
            wave = envelope * phase.cos()
            even.append(wave - envelope * wave.sum())
            odd.append(envelope * phase.sin())
    return torch.stack(even + odd).unsqueeze(1)


def _window(stride: int) -> Tensor:
    """A Gaussian over the positions around a patch's middle, which lies between two of them; its sum is 1."""
    steps = torch.arange(2 * stride) - (2 * stride - 1) / 2
    window = torch.exp(-steps.square() / (2 * (0.5 * stride) ** 2))
    return window / window.sum()
