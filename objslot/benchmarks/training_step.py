"""A whole training step, and its parts, beside the authors' formulation.

A step: both views of B clips of T frames through the encoder, fusion, both slot stages, the losses, the backward
pass, the optimiser and the teacher. Losses, and the gradient of the student, are compared with the authors'
formulation in float64 before anything is timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from objslot.benchmarks import checking, memory, runner
from objslot.benchmarks.peers.training import AuthorsModel
from objslot.benchmarks.suite import AUTHORS, TRAINING_STEP, WHOLE_STEP, Job, Plan
from objslot.benchmarks.timing import measure, paired_ratio
from objslot.models import SMTC, SMTCConfig
from objslot.models.branch import random_noise
from objslot.models.correspondence import draw_other_frames, gather_frames
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

ROUNDS, BUDGET = (5, 9), 8.0
PART_ROUNDS, PART_BUDGET = (5, 15), 1.5


class Step:
    """Both sides of a comparison: the same weights, frames, draws and settings."""

    def __init__(self, device: torch.device, dtype: torch.dtype, trains: bool, sizes=SIZES, encoder: str = ENCODER):
        clips, frames, pixels = sizes
        source = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = SMTCConfig(
                encoder=encoder, pretrained=False, image_size=pixels, train_encoder=trains, **VALID
            )  # fmt: skip
            self.ours = SMTC(config).to(device)
        self.authors = AuthorsModel(self.ours)
        self.device, self.dtype, self.trains = device, dtype, trains
        size = (clips, frames, 3, *self.ours.frame_size)
        self.views = [torch.randn(size, generator=source).to(device) for _ in range(2)]
        self.encode = None if trains else FrozenEncoder(self.ours.encoder, "bf16" if self._half else "fp32")
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
        """What the model is given: a frozen encoder has seen both views in one pass."""
        if self.encode is None:
            return self.views
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
    """Whole steps with the encoder frozen (float32, bfloat16) and learning (float32), and the parts of the first."""
    threads = plan.threads[0]
    cases = [("float32", False)] if plan.quick else [("float32", False), ("bfloat16", False), ("float32", True)]
    found = [
        Job(
            f"{TRAINING_STEP} {dtype} {'trained' if trains else 'frozen'}",
            partial(_whole, plan.device, getattr(torch, dtype), threads, trains, peaks=not plan.quick),
        )
        for dtype, trains in cases
    ]
    return found if plan.quick else [*found, Job(f"{TRAINING_STEP} parts", partial(_parts, plan.device, threads))]


def mode_of(trains: bool) -> str:
    return f"{WHOLE_STEP}, {'encoder learns' if trains else 'encoder frozen'}"


def _base(device: torch.device, dtype: torch.dtype, threads: int) -> dict:
    return {
        "kind": "time",
        "operation": TRAINING_STEP,
        "shape": "x".join(map(str, SIZES)),
        "sizes": dict(zip(AXES, SIZES, strict=True)),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
    }


def _whole(
    device: torch.device, dtype: torch.dtype, threads: int, trains: bool, *, peaks: bool
) -> Iterator[dict]:
    torch.set_num_threads(threads)
    step = Step(device, dtype, trains)
    errors = dict(zip((runner.OURS, AUTHORS), step.errors(), strict=True))
    base = _base(device, dtype, threads) | {"mode": mode_of(trains)}
    calls = {runner.OURS: step.run_ours, AUTHORS: step.run_theirs}
    yield from _rows(base, calls, errors, dtype, device, BUDGET, ROUNDS)
    if peaks:
        del step, calls
        with memory.Measurer(device) as measurer:
            for name in (runner.OURS, AUTHORS):
                request = {TRAINING_STEP: trains, "name": name, "dtype": base["dtype"], "threads": threads}
                call = None if device.type == "cpu" else step_call(device, request)
                yield {**base, "kind": "memory", "name": name, "peak_bytes": measurer.peak_of(request, call)}


def step_call(device: torch.device, request: dict) -> Callable[[], None]:
    """The step that a request for its peak memory describes."""
    step = Step(device, getattr(torch, request["dtype"]), request[TRAINING_STEP])
    return step.run_ours if request["name"] == runner.OURS else step.run_theirs


def _rows(base, calls, errors, dtype, device, budget, rounds) -> Iterator[dict]:
    bound = checking.bound(errors[AUTHORS], dtype)
    right = {name: call for name, call in calls.items() if errors[name] <= bound}
    for call in right.values():
        call()
    samples = measure(right, budget, device, rounds=rounds)
    for name in calls:
        error = errors[name]
        row = {
            **base, "name": name, "status": runner.OK if name in right else runner.WRONG, "note": "",
            "error": error if error < float("inf") else None, "bound": bound,
        }  # fmt: skip
        if name in right:
            own = samples[name]
            row |= {"seconds": asdict(own.quartiles), "samples": own.taken, "dropped": own.dropped}
            if name != runner.OURS and runner.OURS in right:
                ratio = paired_ratio(own, samples[runner.OURS])
                row |= {} if ratio is None else {"ratio": asdict(ratio)}
        yield row


def _parts(device: torch.device, threads: int) -> Iterator[dict]:
    """Each part forward, and backward where something learns, on inputs that are made beforehand."""
    torch.set_num_threads(threads)
    dtype = torch.float32
    step = Step(device, dtype, trains=False)
    errors = dict(zip((runner.OURS, AUTHORS), step.errors(), strict=True))
    for mode, ours, theirs in _part_calls(step):
        base = _base(device, dtype, threads) | {"mode": mode}
        yield from _rows(
            base, {runner.OURS: ours, AUTHORS: theirs}, errors, dtype, device, PART_BUDGET, PART_ROUNDS
        )


def _part_calls(step: Step) -> Iterator[tuple[str, Callable, Callable]]:
    ours, authors = step.ours, step.authors
    config = ours.config
    student, teacher = step.our_views()
    clips, frames = student.keys.shape[:2]
    index = draw_other_frames(clips, frames, config.n_other, sampling=config.sampling).to(step.device)
    noise = random_noise((clips, frames, config.slots, config.instances, ours.width), step.device)

    def encode_theirs():
        authors.encoder(step.views[0])
        with torch.no_grad():
            authors.teacher_encoder(step.views[1])

    yield "encoder", step.our_views, encode_theirs

    def fuse_ours(branch, features):
        other = gather_frames(branch.fusion.prepare(features.keys, features.grid), index).squeeze(2)
        return branch.fusion(branch.project(features.keys), branch.fusion.correspond(features.keys, other))[0]

    def fuse_theirs(branch, features):
        return authors.fuse(branch, features.keys, index)

    def sides(call, model):
        """Forward and backward for the student, forward for the teacher, as in a step."""

        def both():
            found = call(model.student, student)
            torch.autograd.backward(found, [torch.ones_like(part) for part in found])
            with torch.no_grad():
                call(model.teacher, teacher)
            model.zero_grad()

        return both

    yield "correspondence", sides(lambda *a: [fuse_ours(*a)], ours), sides(lambda *a: [fuse_theirs(*a)], authors)

    with torch.no_grad():
        fused = {id(features): fuse_ours(ours.student, features) for features in (student, teacher)}

    def stages_ours(branch, features):
        found = branch.slots(fused[id(features)].detach().requires_grad_(), noise=noise)
        return [found.semantic_logits, branch.head(found.instance_slots)]

    def stages_theirs(branch, features):
        found = authors.stages(branch, fused[id(features)].detach().requires_grad_(), noise)
        return [found["logits"], found["objects"]]

    yield "slots", sides(stages_ours, ours), sides(stages_theirs, authors)

    with torch.no_grad():
        found = ours.student.slots(fused[id(student)], noise=noise)
        target = ours.teacher.slots(fused[id(teacher)], noise=noise)
        objects, target_objects = ours.student.head(found.instance_slots), ours.teacher.head(target.instance_slots)
        their_found = authors.stages(authors.student, fused[id(student)], noise)
        their_target = authors.stages(authors.teacher, fused[id(teacher)], noise)

    def losses_ours():
        logits, leaves = found.semantic_logits.detach().requires_grad_(), objects.detach().requires_grad_()
        learned = found._replace(semantic_logits=logits, semantic=logits.softmax(-2))
        ours._losses(learned, leaves, target, target_objects, teacher)["loss"].backward()

    def losses_theirs():
        logits, leaves = (their_found[name].detach().requires_grad_() for name in ("logits", "objects"))
        learned = their_found | {"logits": logits, "semantic": logits.softmax(-2), "objects": leaves}
        authors.losses(learned, their_target, teacher.keys)["loss"].backward()

    yield "losses", losses_ours, losses_theirs
    for parameter in (*ours.student.parameters(), *authors.student.parameters()):
        parameter.grad = torch.ones_like(parameter)
    yield "optimiser", step.step.optimizer.step, step.authors_optimizer.step
    yield "teacher", ours.update_teacher, authors.update_teacher
