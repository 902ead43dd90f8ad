"""Features of a frozen encoder: computed on the way, or once for every video and stored on disk."""

import copy
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from objslot.data import Video
from objslot.data.augment import normalise
from objslot.data.clips import resize
from objslot.errors import UserError
from objslot.models.encoder import Encoder, FrameFeatures
from objslot.models.files import make_readable
from objslot.training.checkpoint import reason
from objslot.training.distributed import World

# Frames that go through the encoder at a time: bounds its memory, and is enough to keep a GPU busy.
_CHUNK = 64
# On a CPU as many frames at a time as keep the widest activation, four times the width, below this many bytes: larger
# ones come as fresh memory from the system on every call, which cost a fifth of the time at 256 pixels.
_CPU_BYTES = 1 << 24
# Temporary files, and the age in seconds at which one is certainly left over from a run that was killed.
_WRITING = ".writing-"
_STALE = 24 * 3600


class FrozenEncoder:
    """Features without a gradient, from a copy of the encoder in the precision of the run."""

    def __init__(self, encoder: Encoder, precision: str, compile: bool = False):
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.encoder = encoder
        if self.dtype != torch.float32:
            # bfloat16 weights, not autocast: casting them on every call costs a third of the gain.
            self.encoder = copy.deepcopy(encoder).to(self.dtype)
        self._encode = torch.compile(self.encoder) if compile else self.encoder

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> FrameFeatures:
        """Features, in float32, of normalised frames (B, T, 3, H, W)."""
        clips = frames.shape[:2]
        frames = frames.flatten(0, 1).unsqueeze(1)
        parts = [self._encode(part.to(self.dtype), tokens=False) for part in frames.split(self._at_a_time(frames))]
        attention = None
        if parts[0].cls_attention is not None:
            attention = torch.cat([part.cls_attention for part in parts]).squeeze(1).unflatten(0, clips).float()
        keys = torch.cat([part.keys for part in parts]).squeeze(1).unflatten(0, clips).float()
        return FrameFeatures(keys, None, attention, parts[0].grid)

    def _at_a_time(self, frames: Tensor) -> int:
        """How many of (frames, 1, 3, H, W) to encode together."""
        most = _CHUNK
        if frames.device.type == "cpu":
            height, width = self.encoder.grid((frames.shape[-2], frames.shape[-1]))
            activation = height * width * 4 * self.encoder.width * self.dtype.itemsize
            most = max(1, min(_CHUNK, _CPU_BYTES // activation))
        # Parts of one size, which compiled code need not be compiled anew for.
        return math.ceil(len(frames) / math.ceil(len(frames) / most))


class FeatureStore:
    """Stored features of videos: the source of clips for training without an encoder.

    Two files a video in a folder named after the encoder, its weights and the frame size: keys, float16
    (frames, positions, D), and class-token attention, float32 (frames, positions), where there is one; each
    written whole or not at all, and named after the video's path, size and time of change. Frames are not
    augmented.
    """

    augmentable = False

    def __init__(self, folder: str | Path, encoder: Encoder, size: tuple[int, int], precision: str):
        self.size = size
        self.grid = encoder.grid(size)
        self.width = encoder.width
        self.has_attention = encoder.has_cls_attention
        self.folder = Path(folder).expanduser() / fingerprint(encoder, size, precision)
        self._reasons: dict[str, str] = {}

    def build(
        self,
        videos: Sequence[Video],
        encode: FrozenEncoder,
        world: World,
        *,
        limit: float,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Encode what is not stored yet, the videos shared out among the processes.

        ``limit`` is in gigabytes. A video that cannot be read is left out; reading it then raises. Raises
        `UserError` when the features would not fit the limit or the disk.
        """
        todo, lengths = [], {}
        for video in videos:
            try:
                if not self._path(video, "keys").exists():
                    lengths[video.name] = video.n_frames
                    todo.append(video)
            except UserError as error:
                self._reasons[video.name] = str(error)
        with world.leader_first():
            if world.leads:
                self._require_room(sum(lengths.values()), limit)
                self._clear_leftovers()
        done, mine = 0, todo[world.rank :: world.size]
        total = sum(lengths[video.name] for video in mine)
        for video in mine:
            try:
                for count in self._store(video, encode, world.device):
                    progress(done + count, total)
            except UserError as error:
                self._reasons[video.name] = str(error)
            done += lengths[video.name]
        for reasons in world.gather(self._reasons):
            self._reasons |= reasons

    def read(self, video: Video, frames: Sequence[int]) -> dict[str, Tensor]:
        if video.name in self._reasons:
            raise UserError(self._reasons[video.name])
        clip = {"keys": self._load(video, "keys", frames)}
        if self.has_attention:
            clip["cls_attention"] = self._load(video, "attention", frames)
        return clip

    def features(self, clips: dict[str, Tensor]) -> FrameFeatures:
        """What the model takes, of a batch of clips read."""
        attention = clips.get("cls_attention")
        return FrameFeatures(clips["keys"].float(), None, attention, self.grid)

    def _load(self, video: Video, what: str, frames: Sequence[int]) -> Tensor:
        path = self._path(video, what)
        try:
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
            if stored.shape[0] != video.n_frames or stored.shape[1] != self.grid[0] * self.grid[1]:
                raise ValueError(f"shape {stored.shape}")
            return torch.from_numpy(np.array(stored[list(frames)]))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: stored features of {video.path} cannot be read ({reason(error)})") from error

    def _path(self, video: Video, what: str) -> Path:
        return self.folder / f"{video.identity()[:32]}.{what}.npy"

    def _require_room(self, frames: int, limit: float) -> None:
        positions = self.grid[0] * self.grid[1]
        needed = frames * positions * (2 * self.width + 4 * self.has_attention) / 1e9
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free / 1e9
        except OSError as error:
            raise UserError(f"{self.folder}: features cannot be stored there ({reason(error)})") from error
        for most, what in ((limit, "allowed (cache_limit in Python)"), (free, "free")):
            if needed > most:
                raise UserError(
                    f"{self.folder}: features of {frames} frames take {needed:.1f} GB, but {most:.1f} GB are {what}"
                )

    def _clear_leftovers(self) -> None:
        # Another run may share the folder: what it is writing now is younger than this.
        for leftover in self.folder.glob(f"{_WRITING}*"):
            if time.time() - leftover.stat().st_mtime > _STALE:
                leftover.unlink(missing_ok=True)

    def _store(self, video: Video, encode: FrozenEncoder, device: torch.device) -> Iterator[int]:
        """Encode and store one video; yields how many of its frames are done."""
        positions = self.grid[0] * self.grid[1]
        layout: dict[str, tuple[Any, tuple[int, ...]]] = {}
        if self.has_attention:
            layout["attention"] = np.float32, (video.n_frames, positions)
        # The keys take their name last: where they are, the rest is too.
        layout["keys"] = np.float16, (video.n_frames, positions, self.width)
        files = {}
        try:
            for what, (dtype, shape) in layout.items():
                files[what] = tempfile.NamedTemporaryFile(dir=self.folder, prefix=_WRITING, delete=False)
                header = {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_1_0(files[what], header)
            done = 0
            for frames in _chunks(video, self.size):
                found = encode(normalise(frames.to(device).float() / 255)[None])
                files["keys"].write(found.keys[0].half().cpu().numpy().tobytes())
                if self.has_attention:
                    files["attention"].write(found.cls_attention[0].float().cpu().numpy().tobytes())
                done += len(frames)
                yield done
            for what, file in files.items():
                file.flush()
                os.fsync(file.fileno())
                make_readable(file.name)
                os.replace(file.name, self._path(video, what))
        except OSError as error:
            raise UserError(f"{self.folder}: features of {video.path} cannot be stored ({reason(error)})") from error
        finally:
            for file in files.values():
                file.close()
                Path(file.name).unlink(missing_ok=True)


def _chunks(video: Video, size: tuple[int, int]):
    waiting = []
    for frame in video.frames():
        # Resized one by one: a chunk of large frames would be most of the memory in use.
        waiting.append(resize(frame[None], size))
        if len(waiting) == _CHUNK:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def fingerprint(encoder: Encoder, size: tuple[int, int], precision: str) -> str:
    """A name for the features of frames of `size`: another encoder, other weights or a precision change it."""
    digest = hashlib.sha256(f"1 {encoder.name} {encoder.key_center} {size} {precision}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
