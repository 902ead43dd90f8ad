"""The output folder of a run: who may write to it, what run it holds, its metrics."""

import fcntl
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from objslot.data import Video
from objslot.errors import UserError
from objslot.models import SMTC
from objslot.models.files import CONFIG, WEIGHTS, write_whole
from objslot.training.checkpoint import Checkpoint, drop_old, list_checkpoints, reason, unwritable
from objslot.training.config import TrainingConfig, changed_fields

METRICS = "metrics.jsonl"
_VIDEOS = "videos.json"
_LOCK = ".lock"
# Folders that runs of this process hold: a record lock keeps out other processes alone.
_held: set[Path] = set()


class RunFolder:
    """Holds the folder ``path`` for one run; use it as a context.

    Attributes: ``path``; ``checkpoints``, their folder; ``newest``, the newest `Checkpoint` or None.

    Raises `UserError` when the folder cannot be written, is in use, holds a run and ``resume`` is false, or
    holds one whose configuration differs.
    """

    def __init__(self, path: str | Path, config: TrainingConfig, *, resume: bool):
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.config = config
        self._lock: IO[str] | None = None
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written as an output folder ({reason(error)})") from error
        try:
            self._check_held(resume)
        except UserError:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let another run have the folder; a run that did not start leaves nothing of its own."""
        if self._lock is not None:
            if [entry.name for entry in self.path.iterdir()] == [_LOCK]:
                (self.path / _LOCK).unlink()
                with suppress(OSError):
                    for folder in self._made:
                        folder.rmdir()
            self._lock.close()
            self._lock = None
            _held.discard(self.path.resolve())

    @property
    def newest(self) -> Checkpoint | None:
        checkpoints = list_checkpoints(self.checkpoints)
        return checkpoints[-1] if checkpoints else None

    def start(self, data: str, videos: Sequence[str]) -> None:
        """Write down what the run is."""
        written = (CONFIG, WEIGHTS, METRICS, _VIDEOS)
        leftovers = [path for name in written for path in self.path.glob(f".{name}.*")]
        leftovers += self.checkpoints.glob(".step-*")
        for folder in (self.path, self.checkpoints):
            # safetensors writes beside the file it is asked for.
            leftovers += folder.glob(".tmp??????")
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        drop_old(self.checkpoints, self.config.keep)
        if not (self.path / _VIDEOS).exists():
            self._write_json(_VIDEOS, {"data": data, "videos": list(videos)})
        # A later start may change what does not bear on the result.
        values = self._read_json(CONFIG) if (self.path / CONFIG).exists() else {}
        plain = self.config.to_dict()
        self._write_json(CONFIG, {**values, "model": plain.pop("model"), "training": plain})

    def order_videos(self, videos: Sequence[Video]) -> list[Video | UserError]:
        """``videos`` in the order that the run began with; an error stands for one that is gone, new ones are
        left.
        """
        if not (self.path / _VIDEOS).exists():
            return list(videos)
        present = {video.name: video for video in videos}
        names = self._read_json(_VIDEOS).get("videos", [])
        return [present.get(name, UserError(f"{name}: the video is gone since the run began")) for name in names]

    def keep_metrics(self, steps: int) -> int:
        """Cut the metrics back to the first ``steps`` steps, a torn last line included; returns how many are
        left.
        """
        path = self.path / METRICS
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] < steps:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue
        text = "".join(f"{line}\n" for line in kept)
        try:
            write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise unwritable(str(path), self.checkpoints, error) from error
        return len(kept)

    def save_model(self, model: SMTC) -> None:
        """Let the folder hold ``model`` as `SMTC.load` reads it."""
        try:
            model.save(self.path)
        except UserError:
            raise
        except Exception as error:
            raise unwritable(str(self.path / WEIGHTS), self.checkpoints, error) from error

    def metrics(self) -> "MetricsFile":
        """metrics.jsonl, to append to."""
        return MetricsFile(self.path / METRICS, self.checkpoints)

    def _take_lock(self) -> None:
        taken = UserError(f"{self.path}: another run is writing to this folder")
        # Looked at first: closing a second handle of the file would give up the lock of the first.
        if self.path.resolve() in _held:
            raise taken
        lock = open(self.path / _LOCK, "a+")
        try:
            # A record lock belongs to this process alone: loaders that outlive a kill do not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that did not start takes its file away.
            if os.fstat(lock.fileno()).st_nlink == 0:
                raise OSError
        except OSError:
            lock.close()
            raise taken from None
        self._lock = lock
        _held.add(self.path.resolve())

    def _check_held(self, resume: bool) -> None:
        values = self._read_json(CONFIG) if (self.path / CONFIG).exists() else None
        leftovers = [name for name in (WEIGHTS, METRICS, "checkpoints") if (self.path / name).exists()]
        if values is None or "training" not in values:
            if values is not None or leftovers:
                what = CONFIG if values is not None else leftovers[0]
                raise UserError(f"{self.path}: holds {what} of something else; choose another folder")
            return
        if not resume:
            raise UserError(f"{self.path}: holds a run already; resume it (--resume) or choose another folder")
        before = {**values["training"], "model": values.get("model", {})}
        changes = changed_fields(before, self.config.to_dict())
        if changes:
            raise UserError(f"{self.path}: the run there has another configuration ({'; '.join(changes)})")

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path / name}: cannot be read ({reason(error)})") from error
        if not isinstance(values, dict):
            raise UserError(f"{self.path / name}: holds {type(values).__name__}, expected named entries")
        return values

    def _write_json(self, name: str, values: dict[str, Any]) -> None:
        text = json.dumps(values, indent=2) + "\n"
        try:
            write_whole(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{self.path / name}: cannot be written ({reason(error)})") from error


class MetricsFile:
    """metrics.jsonl: one line of JSON a step, appended at once, made durable on ``sync``.

    Raises `UserError` when it cannot be written, for a full disk say.
    """

    def __init__(self, path: Path, checkpoints: Path):
        self._path = path
        self._checkpoints = checkpoints
        # Without a buffer: what could not be written is not tried again when the file is closed.
        self._file = open(path, "ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        line = memoryview(json.dumps(record).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise unwritable(str(self._path), self._checkpoints, error) from error

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(str(self._path), self._checkpoints, error) from error

    def close(self) -> None:
        self._file.close()
