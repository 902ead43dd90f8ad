"""An encoder that remembers on disk what it once computed, for models that share it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from objslot.errors import UserError
from objslot.models.encoder import Encoder, FrameFeatures
from objslot.models.files import write_whole
from objslot.training.checkpoint import reason
from objslot.training.features import fingerprint


class RememberingEncoder(nn.Module):
    """Gives the features that `encoder`, frozen, gives of the same frames; each chunk of frames is encoded once.

    A file a chunk, named after the content of the frames, in a folder named after the encoder and its weights.
    Output tokens are left out. Other attributes are those of the encoder.
    """

    def __init__(self, encoder: Encoder, folder: str | Path):
        super().__init__()
        self.inner = encoder
        self.folder = Path(folder) / fingerprint(encoder, (0, 0), "fp32")

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    @torch.no_grad()
    def forward(self, frames: Tensor, *, tokens: bool = False) -> FrameFeatures:
        """As `Encoder.forward` without tokens. Raises `UserError` when features cannot be stored."""
        grid = self.inner.grid(tuple(frames.shape[-2:]))
        pixels = frames.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(pixels.shape)} {pixels.dtype}".encode())
        digest.update(pixels.flatten().view(torch.uint8).numpy())
        path = self.folder / f"{digest.hexdigest()[:32]}.safetensors"
        held = _read(path)
        if held is None:
            found = self.inner(frames, tokens=False)
            held = {"keys": found.keys}
            if found.cls_attention is not None:
                held["cls_attention"] = found.cls_attention
            self._write(path, held)
        held = {name: value.to(frames.device) for name, value in held.items()}
        return FrameFeatures(held["keys"], None, held.get("cls_attention"), grid)

    def _write(self, path: Path, held: dict[str, Tensor]) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in held.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: save_file(tensors, temporary))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder}: features cannot be stored there ({reason(error)})") from error


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        # Not there, or damaged: it is computed anew.
        return None
