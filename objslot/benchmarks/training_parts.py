"""The parts of a training step with a frozen encoder in float32, beside the authors' formulation of each."""

from collections.abc import Callable, Iterator

import torch

from objslot.benchmarks import checking, memory, runner
from objslot.benchmarks.suite import AUTHORS, TRAINING_STEP
from objslot.benchmarks.timing import measure
from objslot.benchmarks.training_step import SETTINGS, Step, base_record, row
from objslot.models.branch import random_noise
from objslot.models.correspondence import draw_other_frames, gather_frames

ROUNDS, BUDGET = (5, 15), 1.5
PARTS = ("encoder", "correspondence", "slots", "losses", "optimiser", "teacher")


def rows(device: torch.device, threads: int) -> Iterator[dict]:
    """The time of each part forward, and backward where something learns, on inputs that are made beforehand."""
    torch.set_num_threads(threads)
    step = Step(device, SETTINGS[0])
    error, authors_error = step.errors()
    bound = checking.bound(authors_error, step.dtype)
    for mode, ours, theirs in part_calls(step):
        calls = {AUTHORS: theirs} | ({runner.OURS: ours} if error <= bound else {})
        for call in calls.values():
            call()
        samples = measure(calls, BUDGET, device, rounds=ROUNDS)
        base, own = base_record(device, step.dtype, threads, mode), samples.get(runner.OURS)
        yield base | {"name": runner.OURS} | row(error, bound, own, own)
        yield base | {"name": AUTHORS} | row(authors_error, bound, samples[AUTHORS], own)


def peaks(device: torch.device, threads: int) -> Iterator[dict]:
    """What each part holds at most on top of its inputs."""
    with memory.Measurer(device) as measurer:
        for part in PARTS:
            base = base_record(device, SETTINGS[0].dtype, threads, part)
            for name in (runner.OURS, AUTHORS):
                request = {TRAINING_STEP: SETTINGS[0].encoder, "part": part, "name": name}
                request |= {"dtype": base["dtype"], "threads": threads}
                call = None if device.type == "cpu" else part_call(Step(device, SETTINGS[0]), request)
                yield {**base, "kind": "memory", "name": name, "peak_bytes": measurer.peak_of(request, call)}


def part_call(step: Step, request: dict) -> Callable:
    """The part that a request for its peak memory describes."""
    ours, theirs = next(calls for part, *calls in part_calls(step) if part == request["part"])
    return ours if request["name"] == runner.OURS else theirs


def part_calls(step: Step) -> Iterator[tuple[str, Callable, Callable]]:
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
