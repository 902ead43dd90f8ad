"""Learn the weights of the encoder `objslot_tiny` that ships with the package. No label is used.

Frames of procedural videos are seen in two views, each turned, scaled and recoloured at random. The keys of
the same place in both views shall agree while every channel keeps its variance and channels stay
decorrelated (Bardes, Ponce, LeCun: VICReg, ICLR 2022, equations 1 to 6); so shall the class tokens of the two
views. These videos are used nowhere else. Takes some 15 minutes on two cores.

    python scripts/train_tiny_encoder.py --out objslot/models/tiny_encoder.safetensors
"""

import argparse
import math
import time
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from objslot.data import MEAN, STD
from objslot.data.synthetic import SyntheticVideos
from objslot.models import Encoder
from objslot.models.tiny_encoder import create_tiny_encoder

_SEED = 715_517
_VIEW = 80  # side of a view, pixels
_PATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=300)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=50, help="steps between two lines")
    settings = parser.parse_args()

    torch.manual_seed(_SEED)
    videos = SyntheticVideos(_SEED, settings.videos, n_frames=2)
    frames = torch.cat([video.read([0, 1]) for video in videos]).permute(0, 3, 1, 2).contiguous()
    encoder = Encoder(create_tiny_encoder(pretrained=False), name="objslot_tiny", train=True).train()
    # The class token learns too, through layers that the keys do not depend on.
    encoder.model.requires_grad_(True)
    width = encoder.width
    heads = nn.ModuleDict({name: _projector(width) for name in ("local", "whole")})
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.05)
    class_tokens = []
    encoder.model.norm.register_forward_hook(lambda module, arguments, tokens: class_tokens.append(tokens[:, 0]))
    started = time.monotonic()
    for step in range(settings.steps):
        rate = min(1, (step + 1) / 50) * (0.525 + 0.475 * math.cos(math.pi * step / settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * rate
        batch = frames[torch.randint(len(frames), (settings.batch_size,))].float() / 255
        (one, from_one), (other, from_other) = _view(batch), _view(batch)
        features = encoder(torch.stack([one, other], dim=1))
        keys = features.keys.unflatten(2, features.grid).permute(1, 0, 4, 2, 3)
        places, inside = _places(from_one, from_other, features.grid)
        matched = F.grid_sample(keys[1], places, align_corners=False).permute(0, 2, 3, 1)[inside]
        here = keys[0].permute(0, 2, 3, 1)[inside]
        local = _vicreg(heads["local"](here), heads["local"](matched))
        whole = class_tokens.pop().unflatten(0, (-1, 2))
        loss = local + 0.1 * _vicreg(heads["whole"](whole[:, 0]), heads["whole"](whole[:, 1]))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        if step % settings.every == 0 or step == settings.steps - 1:
            print(
                f"step {step}: loss {loss:.3f}, local {local:.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    even_out_keys(encoder, frames[::4])
    _write(encoder, settings.out)
    print(f"{settings.out}: {settings.out.stat().st_size / 2**20:.2f} MiB")


def _projector(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256))


def _view(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Random views (B, 3, side, side) of frames (B, 3, H, W) in 0..1, normalised, and affine maps (B, 2, 3).

    The maps take coordinates of the views to those of the frames, both in -1..1.
    """
    count, side = len(frames), frames.shape[-1]
    angle = torch.rand(count) * 2 * math.pi
    scale = torch.exp((torch.rand(count) - 0.5) * 0.3) * _VIEW / side
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    shift = (torch.rand(count, 2) - 0.5) * 2 * (1 - scale * 1.2).clamp_min(0).unsqueeze(1)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack([torch.stack([cosine * mirror, -sine], 1), torch.stack([sine * mirror, cosine], 1)], 1)
    affine = torch.cat([affine, shift.unsqueeze(2)], 2)
    grid = F.affine_grid(affine, (count, 3, _VIEW, _VIEW), align_corners=False)
    view = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    # A new colour for every view: mixed channels, contrast, brightness, sometimes a negative.
    mix = torch.eye(3) + 0.25 * torch.randn(count, 3, 3)
    contrast = torch.exp(0.3 * torch.randn(count, 1, 1, 1)) * torch.where(torch.rand(count, 1, 1, 1) < 0.3, -1.0, 1.0)
    view = torch.einsum("bij,bjhw->bihw", mix, view - 0.5) * contrast + 0.5 + 0.1 * torch.randn(count, 3, 1, 1)
    view = view + 0.01 * torch.randn_like(view)
    return _normalised(view.clamp(0, 1)), affine


def _places(one: Tensor, other: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the patches of one view lie in the other: coordinates (B, h, w, 2) in -1..1, jittered by up to a
    patch, and which of them (B, h, w) lie inside."""
    points = F.affine_grid(one, (len(one), 1, *grid), align_corners=False)
    inverse = torch.linalg.inv(other[:, :, :2])
    places = torch.einsum("bij,bhwj->bhwi", inverse, points - other[:, None, None, :, 2])
    places = places + (torch.rand_like(places) - 0.5) * 2 * _PATCH / _VIEW
    return places, (places.abs() < 1 - _PATCH / _VIEW).all(-1)


def _vicreg(x: Tensor, y: Tensor) -> Tensor:
    """Equation 6 of VICReg with its weights (25, 25, 1), divided by 25."""
    loss = F.mse_loss(x, y)
    for z in (x, y):
        z = z - z.mean(0)
        loss = loss + 0.5 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        covariance = z.T @ z / (len(z) - 1)
        off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
        loss = loss + 0.04 * off_diagonal / z.shape[1]
    return loss


@torch.no_grad()
def even_out_keys(encoder: Encoder, frames: Tensor) -> None:
    """Centre the keys over `frames` (B, 3, H, W), uint8, and bring the spreads of their directions closer.

    A few directions hold most of the keys' variance, and a mean they all share hides it from the cosine. Both
    are changed without a change to what the network computes: a shift of the block's input goes into its
    biases, and a map M of a head's keys is undone by the inverse of M on its queries. M is
    (S + s / 10) ** -1/4, S the covariance of the keys of a head and s its mean eigenvalue; the mean length of
    the keys becomes twice the root of their width.
    """
    encoder.set_training(False)
    block = encoder.model.blocks[-1]
    attention, seen = block.attn, []
    handle = attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0][:, 1:]))
    for part in frames.split(16):
        encoder(_normalised(part.float() / 255)[None])
    handle.remove()
    inputs = torch.cat(seen).flatten(0, 1).double()
    mean = inputs.mean(0)
    weight, bias = (
        attention.qkv.weight.double(),
        attention.qkv.bias.double() + attention.qkv.weight.double() @ mean,
    )
    queries, keys, values = weight.chunk(3)
    query_bias, key_bias, value_bias = bias.chunk(3)
    centred = ((inputs - mean) @ keys.T).unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
    spread, directions = torch.linalg.eigh(centred.transpose(1, 2) @ centred / centred.shape[1])
    powers = (spread.clamp_min(0) + 0.1 * spread.mean(1, keepdim=True)) ** -0.25
    mapped = torch.block_diag(*(directions @ (powers[..., None] * directions.transpose(1, 2))))
    length = (centred.transpose(0, 1).flatten(1) @ mapped).norm(dim=1).mean()
    mapped *= 2 * encoder.width**0.5 / length
    undone = torch.linalg.inv(mapped)
    attention.qkv.weight.copy_(torch.cat([undone @ queries, mapped @ keys, values]))
    attention.qkv.bias.copy_(torch.cat([undone @ query_bias, mapped @ key_bias, value_bias]))
    block.norm1.bias.sub_(mean)


def _normalised(frames: Tensor) -> Tensor:
    return (frames - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _write(encoder: Encoder, path: Path) -> None:
    state = {
        name: value.half() if value.is_floating_point() else value for name, value in encoder.model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path)


if __name__ == "__main__":
    main()
