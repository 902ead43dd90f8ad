"""Whole training steps, in every setting of the recipe, beside the authors' formulation.

A step: both views of B clips of T frames through the encoder, fusion, both slot stages, the losses, the backward
pass, the optimiser and the teacher. Losses, and the gradient of the student, are compared with the authors'
formulation in float64 before anything is timed. Views are given as normalised frames: augmentation is on neither side.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from objslot.benchmarks import checking, memory, runner
from objslot.benchmarks.peers.training import AuthorsModel
from objslot.benchmarks.suite import AUTHORS, AUTHORS_LEARNING, TRAINING_STEP, WHOLE_STEP, Job, Plan
from objslot.benchmarks.timing import Samples, measure, paired_ratio
from objslot.models import SMTC, SMTCConfig
from objslot.models.encoder import FrameFeatures
from objslot.training import TrainingConfig
from objslot.training.distributed import World
from objslot.training.features import FrozenEncoder
from objslot.training.step import TrainingStep

AXES = ("clips", "frames", "pixels")
SIZES = (2, 4, 256)
ENCODER = "vit_small_patch16_224.dino"
LOSSES = ("loss", "semantic", "instance", "diversity")

# Untrained slots would all be left out of the instance loss, and neither side would do its work.
VALID = {"valid_similarity": 0.0, "valid_threshold": 0.0, "valid_area": 0.0}

ROUNDS, BUDGET = (5, 9), 40.0


class Setting(NamedTuple):
    """How a step is run."""

    dtype: torch.dtype
    encoder: str
    """"frozen", "learns", or "stored": its features were computed beforehand, the same for both views."""

    @property
    def mode(self) -> str:
        return f"{WHOLE_STEP}, {'stored features' if self.encoder == 'stored' else f'encoder {self.encoder}'}"


SETTINGS = (
    Setting(torch.float32, "frozen"),
    Setting(torch.bfloat16, "frozen"),
    Setting(torch.float32, "stored"),
    Setting(torch.float32, "learns"),
    Setting(torch.bfloat16, "learns"),
)
# The recipe taken literally: every step goes back through the encoder, in single precision.
LITERAL = Setting(torch.float32, "learns")


class Step:
    """Both sides of a comparison: the same weights, frames, draws and settings."""

    def __init__(self, device: torch.device, setting: Setting, sizes=SIZES, encoder: str = ENCODER):
        clips, frames, pixels = sizes
        source = torch.Generator().manual_seed(0)
        learns = setting.encoder == "learns"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = SMTCConfig(
                encoder=encoder, pretrained=False, image_size=pixels, train_encoder=learns, **VALID
            )  # fmt: skip
            self.ours = SMTC(config).to(device)
        self.authors = AuthorsModel(self.ours)
        self.device, self.dtype = device, setting.dtype
        size = (clips, frames, 3, *self.ours.frame_size)
        self.views = [torch.randn(size, generator=source).to(device) for _ in range(2)]
        self._stored: list[FrameFeatures] | None = None
        self.encode = None if learns else FrozenEncoder(self.ours.encoder, "bf16" if self._half else "fp32")
        if setting.encoder == "stored":
            self.views = [self.views[0]] * 2
            self._stored = self.our_views()
        recipe = TrainingConfig(
            model=config, precision="bf16" if self._half else "fp32", batch_size=clips, frames=frames
        )  # fmt: skip
        self.step = TrainingStep(self.ours, recipe, World(0, 1, device))
        learning = [p for p in self.authors.parameters() if p.requires_grad]
        self.authors_optimizer = torch.optim.AdamW(learning, lr=recipe.lr, weight_decay=recipe.weight_decay)

    @property
    def _half(self) -> bool:
        return self.dtype == torch.bfloat16

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._half)

    def _generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(clip) for clip in range(len(self.views[0]))]

    def our_views(self) -> list[Tensor] | list[FrameFeatures]:
        """What the model is given: a frozen encoder has seen both views."""
        if self.encode is None:
            return self.views
        if self._stored is not None:
            return self._stored
        keys, _, attention, grid = self.encode(torch.cat(self.views))
        attention = (None, None) if attention is None else attention.chunk(2)
        return [FrameFeatures(*parts, grid) for parts in zip(keys.chunk(2), (None, None), attention, strict=True)]

    def our_losses(self) -> dict[str, Tensor]:
        views = self.our_views()
        with self._autocast():
            return self.ours(*views, self._generators())

    def their_losses(self) -> dict[str, Tensor]:
        with self._autocast():
            return self.authors(*self.views, self._generators())

    def run_ours(self) -> None:
        self.step.add(*self.our_views(), self._generators())
        self.step.finish()

    def run_theirs(self) -> None:
        self.authors_optimizer.zero_grad()
        self.their_losses()["loss"].backward()
        self.authors_optimizer.step()
        self.authors.update_teacher()

    def errors(self) -> tuple[float, float]:
        """Those of ours and of the authors' formulation, against the latter in float64."""
        precise = AuthorsModel(self.ours).double()
        exact = _quantities(precise(*(view.double() for view in self.views), self._generators()), precise)
        names = sorted(exact)
        found = [_quantities(self.our_losses(), self.ours), _quantities(self.their_losses(), self.authors)]
        ours, theirs = (
            checking.error([part[name] for name in names], [exact[name] for name in names]) for part in found
        )
        self.ours.zero_grad()
        self.authors.zero_grad()
        return ours, theirs


def _quantities(losses: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The losses, and the gradient of everything in the student."""
    model.zero_grad()
    losses["loss"].backward()
    # What takes no part has no gradient in one formulation and zeros in another.
    learned = list(model.student.parameters())
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learned])
    return {name: losses[name].detach() for name in LOSSES} | {"gradient": gradient}


def jobs(plan: Plan) -> list[Job]:
    """Every setting in one interleaved run, and the parts of the first; a quick plan has the first setting alone."""
    threads = plan.threads[0]
    if plan.quick:
        return [Job(TRAINING_STEP, partial(_whole, plan.device, SETTINGS[:1], threads))]
    from objslot.benchmarks import training_parts

    return [
        Job(f"{TRAINING_STEP} whole", partial(_whole, plan.device, SETTINGS, threads)),
        Job(f"{TRAINING_STEP} memory", partial(_peaks, plan.device, SETTINGS, threads)),
        Job(f"{TRAINING_STEP} parts", partial(training_parts.rows, plan.device, threads)),
        Job(f"{TRAINING_STEP} parts' memory", partial(training_parts.peaks, plan.device, threads)),
    ]


def base_record(device: torch.device, dtype: torch.dtype, threads: int, mode: str) -> dict:
    return {
        "kind": "time",
        "operation": TRAINING_STEP,
        "shape": "x".join(map(str, SIZES)),
        "sizes": dict(zip(AXES, SIZES, strict=True)),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "mode": mode,
    }


def _whole(device: torch.device, settings: tuple[Setting, ...], threads: int) -> Iterator[dict]:
    torch.set_num_threads(threads)
    steps = {setting: Step(device, setting) for setting in settings}
    errors, bounds, calls = {}, {}, {}
    for setting, step in steps.items():
        found = dict(zip((runner.OURS, AUTHORS), step.errors(), strict=True))
        bounds[setting] = checking.bound(found[AUTHORS], setting.dtype)
        # Nobody stores features in the authors' formulation: there it only says what is right.
        for name, run in ((runner.OURS, step.run_ours), (AUTHORS, step.run_theirs)):
            if name == AUTHORS and setting.encoder == "stored":
                continue
            errors[setting, name] = found[name]
            if found[name] <= bounds[setting]:
                calls[setting, name] = run
    for call in calls.values():
        call()
    # `measure` names its contestants. Steps are too long to find anything of the one before in the caches.
    named = {str(key): call for key, call in calls.items()}
    samples = measure(named, BUDGET, device, rounds=ROUNDS, first_apart=False)
    for setting in settings:
        base = base_record(device, setting.dtype, threads, setting.mode)
        own = samples.get(str((setting, runner.OURS)))
        for name in (runner.OURS, AUTHORS):
            if (setting, name) in errors:
                found = samples.get(str((setting, name)))
                yield base | {"name": name} | row(errors[setting, name], bounds[setting], found, own)
        if setting != LITERAL and (LITERAL, AUTHORS) in calls:
            found = samples[str((LITERAL, AUTHORS))]
            note = "another setting" if setting.dtype == LITERAL.dtype else "another setting and precision"
            yield base | {"name": AUTHORS_LEARNING} | row(
                errors[LITERAL, AUTHORS], bounds[LITERAL], found, own, note=note
            )


def row(error: float, bound: float, found: Samples | None, own: Samples | None, note: str = "") -> dict:
    """The part of a record that says what was measured; `own` are objslot's samples, to form the ratio with."""
    record = {
        "status": runner.WRONG if found is None else runner.OTHER if note else runner.OK,
        "note": note,
        "error": error if error < float("inf") else None,
        "bound": bound,
    }
    if found is not None:
        record |= {"seconds": asdict(found.quartiles), "samples": found.taken, "dropped": found.dropped}
        ratio = None if own is None or own is found else paired_ratio(found, own)
        record |= {} if ratio is None else {"ratio": asdict(ratio)}
    return record


def _peaks(device: torch.device, settings: tuple[Setting, ...], threads: int) -> Iterator[dict]:
    with memory.Measurer(device) as measurer:
        for setting in settings:
            base = base_record(device, setting.dtype, threads, setting.mode)
            for name in (runner.OURS, AUTHORS):
                if name == AUTHORS and setting.encoder == "stored":
                    continue
                request = {TRAINING_STEP: setting.encoder, "name": name, "dtype": base["dtype"], "threads": threads}
                call = None if device.type == "cpu" else step_call(device, request)
                yield {**base, "kind": "memory", "name": name, "peak_bytes": measurer.peak_of(request, call)}


def step_call(device: torch.device, request: dict) -> Callable[[], None]:
    """The step, or its part, that a request for its peak memory describes."""
    step = Step(device, Setting(getattr(torch, request["dtype"]), request[TRAINING_STEP]))
    if "part" in request:
        from objslot.benchmarks import training_parts

        return training_parts.part_call(step, request)
    return step.run_ours if request["name"] == runner.OURS else step.run_theirs
