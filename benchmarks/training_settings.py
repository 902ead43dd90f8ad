"""Times a training step beside the authors' formulation of it, in one interleaved run.

    python -m benchmarks.training_settings [--threads 2] [--rounds 7] [--encoder vit_small_patch16_224] [--clips 2]
        [--frames 4] [--size 256]

The authors' step takes both views as normalised frames; objslot's takes the uint8 frames and augments them itself
within the time that is measured. Weights are random: they do not bear on the time. Before anything is timed, losses
and gradients of both are compared. Prints medians, and how many times faster objslot is in the median round.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from objslot.benchmarks.peers.training import AuthorsStep
from objslot.data.augment import Photometric
from objslot.models import SMTC, SMTCConfig
from objslot.training import TrainingConfig
from objslot.training.step import TrainingStep
from objslot.training.views import Views

GOALS = {"frozen, bf16": 3.0, "frozen, fp32": 2.0, "stored features": 20.0, "encoder trains, bf16": 2.3}


def check(model: SMTC, peer: torch.nn.Module, views: tuple, relative: float = 1e-4) -> None:
    """Compares losses and gradients: times of different computations mean nothing."""
    found = []
    for module in (model, peer):
        terms = module(*views, [torch.Generator().manual_seed(clip) for clip in range(len(views[0]))])
        terms["loss"].backward()
        learned = [*module.student.parameters(), *module.encoder.parameters()]
        gradient = torch.cat([p.grad.flatten() for p in learned if p.grad is not None])
        found.append(
            {**{name: terms[name].detach() for name in ("semantic", "instance", "diversity")}, "gradient": gradient}
        )
        module.zero_grad()
    for name, expected in found[1].items():
        error = ((found[0][name] - expected).norm() / expected.norm()).item()
        print(f"{name}: differs from the authors' by {error:.1e}")
        assert error < relative, name


def steps_of(arguments) -> dict:
    """objslot's step in each setting, as a function without arguments, and the authors' as "authors"."""
    random = np.random.default_rng(0)
    shape = (arguments.clips, arguments.frames, 3, arguments.size, arguments.size)
    frames = torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))
    batch = {"frames": frames}
    for view in ("student", "teacher"):
        batch[view] = torch.stack([Photometric().draw(random) for _ in range(arguments.clips)])

    def config(precision="fp32", **model) -> TrainingConfig:
        fields = {"encoder": arguments.encoder, "pretrained": False, "image_size": arguments.size}
        # All instances take part, so that the check sees every term.
        fields |= {"valid_area": 0.0, "valid_threshold": 0.0, "valid_similarity": -1.0}
        return TrainingConfig(
            model=SMTCConfig(**fields | model), precision=precision, batch_size=arguments.clips,
            frames=arguments.frames, unfreeze_at=0,
        )  # fmt: skip

    def own(config, features=None):
        torch.manual_seed(0)
        model = SMTC(config.model)
        step = TrainingStep(model, config)
        views = Views(model, config)

        def run():
            generators = [torch.Generator().manual_seed(clip) for clip in range(arguments.clips)]
            student, teacher = (features, features) if features is not None else views(batch)
            step.add(student, teacher, generators)
            step.finish()

        return run

    torch.manual_seed(0)
    model = SMTC(config(train_encoder=True).model)
    views = Views(model, config(train_encoder=True))(batch)
    features = Views(SMTC(config().model), config())(batch)[0]
    authors = AuthorsStep(model)
    check(model, authors.model, views)

    def run_authors():
        authors(*views, [torch.Generator().manual_seed(clip) for clip in range(arguments.clips)])

    return {
        "authors": run_authors,
        "frozen, bf16": own(config("bf16")),
        "frozen, fp32": own(config()),
        "stored features": own(config(), features),
        "stored features, bf16": own(config("bf16"), features),
        "encoder trains, bf16": own(config("bf16", train_encoder=True)),
        "encoder trains, fp32": own(config(train_encoder=True)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 2), ("rounds", 7), ("clips", 2), ("frames", 4), ("size", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--encoder", default="vit_small_patch16_224")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = steps_of(arguments)
    times = {name: [] for name in steps}
    for round_ in range(arguments.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if round_:
                times[name].append(time.perf_counter() - began)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"{arguments.encoder}, B = {arguments.clips}, T = {arguments.frames}, {arguments.size} px, "
        f"{arguments.rounds} rounds"
    )
    print("| step | median, ms | times faster | goal |\n| --- | ---: | ---: | ---: |")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["authors"], values, strict=True))
        goal = GOALS.get(name, "-")
        print(f"| {name} | {1e3 * statistics.median(values):.0f} | {ratio:.1f} | {goal} |")


if __name__ == "__main__":
    main()
