"""The training loop.

Everything random about a step is a function of the seed and of the step, so a run that was stopped, however
suddenly, continues from its newest checkpoint exactly as if it had not been.
"""

import math
import os
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from objslot.data import Video, find_videos
from objslot.data.clips import ClipDataset, PixelSource, load_clips
from objslot.errors import UserError
from objslot.models import SMTC
from objslot.training.checkpoint import load_checkpoint, save_checkpoint
from objslot.training.config import TrainingConfig
from objslot.training.distributed import World, join
from objslot.training.features import FeatureStore, FrozenEncoder
from objslot.training.folder import RunFolder
from objslot.training.guards import Interruption, UnusableVideos, save_failed_batch
from objslot.training.reporting import Reporter
from objslot.training.step import TrainingStep
from objslot.training.views import Views


def train(config: TrainingConfig, data: str | Path | Sequence[Video], out: str | Path, *, resume: bool = False) -> Path:
    """Train a model on the videos under ``data`` and return ``out``, which `SMTC.load` reads.

    ``data`` is a path (see `find_videos`) or videos with different names. ``out`` gets config.json,
    metrics.jsonl (a line a step, with the seconds it took and those it waited for clips), checkpoints/ and
    model.safetensors, the newest checkpoint's. With ``resume`` the run in ``out`` goes on from its newest
    checkpoint; where there is none it begins. Started by torchrun, every process takes its share of each batch.

    On Ctrl-C and on SIGTERM the step is finished and saved, then `KeyboardInterrupt` or `SystemExit` (143)
    raised. Raises `UserError` for videos, weights or an output folder that will not do, and for losses that
    stay not finite.
    """
    with join(config.device) as world:
        folder = None
        with world.leader_first():
            if world.leads:
                folder = RunFolder(out, config, resume=resume)
        with folder or nullcontext():
            return _run(config, data, Path(out).expanduser(), folder, world)


def _run(
    config: TrainingConfig,
    data: str | Path | Sequence[Video],
    out: Path,
    folder: RunFolder | None,
    world: World,
) -> Path:
    share = world.share(config.batch_size, config.accumulate)
    unusable: list[UserError] = []
    found = find_videos(data, check=False, unusable=unusable) if isinstance(data, str | Path) else list(data)
    where = str(Path(data).expanduser().resolve()) if isinstance(data, str | Path) else "videos"

    # The leader reads what the folder holds; the others are told.
    videos, newest = world.gather((folder.order_videos(found), folder.newest) if folder else None)[0]
    model = _build_model(config, out, resumed=newest is not None).to(world.device)
    stepper = TrainingStep(model, config, world)
    start, nonfinite = 0, 0
    if newest is not None:
        state = load_checkpoint(newest, model, stepper.optimizer)
        start, nonfinite = state["step"], state["nonfinite"]
    if folder:
        folder.start(where, [video.name for video in found])
        folder.keep_metrics(start)

    reporter = Reporter(
        config.steps,
        start,
        log_every=config.log_every,
        tensorboard=out / "tensorboard" if config.tensorboard else None,
        silent=not world.leads,
    )
    tally = UnusableVideos(len(videos) + len(unusable), config.max_unreadable, reporter.say)
    for error in unusable:
        tally.note(str(error), error)
    reporter.say(_summary(config, model, videos, start, world))
    if start == config.steps:
        return out

    views = Views(model, config, world.device)
    if config.cache_features:
        views.store = _stored_features(config, model, videos, views.encode, out, world, reporter)
    source = views.store or PixelSource(model.frame_size)
    dataset = ClipDataset(videos, source, frames=config.frames, stride=config.stride, seed=config.seed)
    batches = (
        list(_sample_numbers(config, step, part, world, share))
        for step in range(start, config.steps)
        for part in range(config.accumulate)
    )
    clips = load_clips(dataset, batches, workers=_workers(config), pin_memory=world.device.type == "cuda")
    metrics = folder.metrics() if folder else None

    def save(step: int) -> None:
        if folder:
            metrics.sync()
            # The model first: whoever finds a checkpoint reads the encoder, which is not in it, from there.
            folder.save_model(model)
            state = {"nonfinite": nonfinite}
            save_checkpoint(folder.checkpoints, step, model, stepper.optimizer, state, keep=config.keep)

    if newest is None:
        # Proves, before any work is done, that a checkpoint fits the disk.
        save(0)
    if config.model.train_encoder:
        stepper.let_encoder_learn(start >= config.unfreeze_at)

    with Interruption() as interruption, closing(clips), closing(metrics) if metrics else nullcontext(), reporter:
        for step in range(start, config.steps):
            began = time.perf_counter()
            waited = 0.0
            if config.model.train_encoder and step == config.unfreeze_at:
                stepper.let_encoder_learn(True)
            torch.manual_seed(_number(config.seed, step, world.rank))
            rate = stepper.set_rate(config.learning_rate_factor(step))
            for part in range(config.accumulate):
                asked = time.perf_counter()
                batch = next(clips)
                waited += time.perf_counter() - asked
                for index, error in batch.pop("failures"):
                    tally.note(index, error)
                numbers = _sample_numbers(config, step, part, world, share)
                generators = [torch.Generator().manual_seed(_number(config.seed, n)) for n in numbers]
                stepper.add(*views(batch), generators, last=part == config.accumulate - 1)
            terms, failed, interrupted = stepper.finish(interruption.signal is not None)
            nonfinite = nonfinite + 1 if failed else 0

            record: dict[str, Any] = {"step": step, "skipped": failed}
            record |= {name: value if math.isfinite(value) else None for name, value in terms.items()}
            record |= {
                "lr": rate,
                "seconds": round(time.perf_counter() - began, 6),
                "seconds_waiting": round(waited, 6),
            }
            if metrics:
                metrics.write(record)
            reporter.step(record, config.batch_size * config.frames)

            if nonfinite == config.max_nonfinite:
                kept = f"; {save_failed_batch(out, step, batch, record)}" if folder else ""
                raise UserError(
                    f"the loss or its gradient was not finite {nonfinite} steps in a row, to step {step}{kept}"
                )
            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps or interrupted:
                save(done)
            if interrupted and done < config.steps:
                reporter.say(f"stopped after step {done}; resume it to go on")
                interruption.leave()
        if len(tally):
            reporter.say(f"{len(tally)} of {tally.total} videos could not be used")
    return out


def _stored_features(
    config: TrainingConfig,
    model: SMTC,
    videos: Sequence[Video | UserError],
    encode: FrozenEncoder,
    out: Path,
    world: World,
    reporter: Reporter,
) -> FeatureStore:
    store = FeatureStore(config.cache_dir or out / "features", model.encoder, model.frame_size, config.precision)
    store.build(
        [video for video in videos if not isinstance(video, UserError)],
        encode,
        world,
        limit=config.cache_limit,
        progress=partial(reporter.progress, "frames whose features are stored"),
    )
    return store


def _build_model(config: TrainingConfig, out: Path, *, resumed: bool) -> SMTC:
    if resumed:
        # The encoder as it was written down at the start: its file or the hub may have changed since.
        return SMTC.load(out)
    torch.manual_seed(config.seed)
    return SMTC(config.model)


def _sample_numbers(config: TrainingConfig, step: int, part: int, world: World, share: int) -> range:
    """The clips of a part of this process's share of a step: each clip belongs to one part of one process."""
    first = step * config.batch_size + (world.rank * config.accumulate + part) * share
    return range(first, first + share)


def _number(*key: int) -> int:
    """A seed of its own for every key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _workers(config: TrainingConfig) -> int:
    if config.num_workers is not None:
        return config.num_workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, len(os.sched_getaffinity(0)) // processes - 1))


def _summary(config: TrainingConfig, model: SMTC, videos: Sequence[Video | UserError], start: int, world: World) -> str:
    height, width = model.frame_size
    went_on = f", from step {start}" if start else ""
    encoder = "trained" if config.model.train_encoder else "frozen"
    return (
        f"{config.steps} steps{went_on}: {config.batch_size} clips of {config.frames} frames, "
        f"{height} x {width} pixels, from {len(videos)} videos; {config.model.encoder} ({encoder}), "
        f"{config.model.slots} x {config.model.instances} slots, {config.precision}, "
        f"{world.size} x {world.device.type}"
    )
