"""Trainings and judgements of an ablation, each done once and kept, and the report made of them."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import objslot
from objslot.ablations import report
from objslot.ablations.datasets import find_data_sets, training_videos
from objslot.ablations.figures import draw_figures
from objslot.ablations.memory import RememberingEncoder
from objslot.ablations.summary import summarise
from objslot.ablations.tables import BASE, FULL, STAGE_ONE, TABLES, THREE, UNMASKED, Variant, variants_of
from objslot.data import Video, find_videos
from objslot.data.sequences import open_sequences
from objslot.errors import UserError
from objslot.evaluation import evaluate_dataset
from objslot.inference import colour_null, frozen_backbone, segment_video
from objslot.models import SMTC
from objslot.models.files import write_whole
from objslot.training import TrainingConfig, train
from objslot.training.checkpoint import list_checkpoints
from objslot.training.config import OPERATIONAL

ABLATIONS = (*TABLES, "figures")
PROTOCOLS = ("A", "B", "C")
# What a run is judged by on each data set: the measure that the paper reports there.
MEASURES = {"davis2016": "J", "davis2017": "JF"}


def run_ablation(
    what: str,
    root: str | Path,
    out: str | Path,
    training: TrainingConfig,
    seeds: Sequence[int],
    *,
    data: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Train and judge the variants of one table, or draw the figures; returns the report.

    Every training and every judgement is kept in `out` and found there again, so that a call that was stopped goes
    on, from the newest checkpoint of the training it was in, and tables share the runs they have in common.

    Args:
        what: one of `ABLATIONS`.
        root: holds DAVIS-2016, DAVIS-2017 or both (see `find_data_sets`), which the runs are judged on.
        out: gets features/, runs/, tables/ (JSON and Markdown), figures/, report.md and report.html, which show
            every table and figure made there so far.
        training: what the runs have in common; features are always stored, once for all runs.
        seeds: a run each of every variant. Figures show the first.
        data: videos to train on; by default those of the data sets, without their annotations.
        say: is told, in a line each, what is going on.

    Raises:
        UserError: an unknown ablation, no seed or one given twice, no data set, settings that do not fit a variant
            (before anything is trained), and what `train` raises.
    """
    if what not in ABLATIONS:
        raise UserError(f"ablation: got {what!r}, expected one of {', '.join(ABLATIONS)}")
    seeds = list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds: got {', '.join(map(str, seeds)) or 'none'}, expected different numbers")
    data_sets = find_data_sets(root)
    videos = training_videos(data_sets) if data is None else find_videos(data)
    study = _Study(Path(out).expanduser(), training, data_sets, videos, say)
    if what == "figures":
        shown = {variant.name: variant for variant in (FULL, STAGE_ONE, UNMASKED, THREE)}
        study.check(shown.values(), seeds[:1])
        models = {name: study.model(study.train(variant, seeds[0])) for name, variant in shown.items()}
        sequences = [s for name in reversed(data_sets) for s in study.sequences[name]]
        figures = draw_figures(study.out / "figures", models, sequences)
        report.keep(study.out / "figures", "figures", {"figures": figures, "settings": study.settings(seeds[:1])})
    else:
        variants = variants_of(TABLES[what], training.model.encoder)
        study.check(variants, seeds)
        scores = {
            variant.name: {
                dataset: [study.judge(study.train(variant, seed), dataset) for seed in seeds] for dataset in data_sets
            }
            for variant in variants
        }
        baselines = {dataset: study.baselines(study.train(variants[0], seeds[0]), dataset) for dataset in data_sets}
        table = summarise(TABLES[what], variants, scores, baselines, training.model.encoder)
        report.keep(study.out / "tables", what, table | {"settings": study.settings(seeds)})
    return report.write(study.out)


class _Study:
    def __init__(
        self,
        out: Path,
        training: TrainingConfig,
        data_sets: dict[str, Path],
        videos: list[Video],
        say: Callable[[str], None],
    ):
        self.out, self.data_sets, self.videos, self.say = out, data_sets, videos, say
        self.training = dataclasses.replace(training, cache_features=True, cache_dir=str(out / "features"))
        self._content = hashlib.sha256("\n".join(video.identity() for video in videos).encode()).hexdigest()
        self.sequences = {name: open_sequences(name, folder) for name, folder in data_sets.items()}

    def config(self, variant: Variant, seed: int) -> TrainingConfig:
        model = dataclasses.replace(self.training.model, **variant.fields)
        return dataclasses.replace(self.training, model=model, seed=seed)

    def check(self, variants, seeds: Sequence[int]) -> None:
        """`UserError` when a variant cannot be trained with these settings."""
        for variant in variants:
            for seed in seeds:
                self.config(variant, seed)

    def train(self, variant: Variant, seed: int) -> Path:
        """The folder of the variant's finished run."""
        config = self.config(variant, seed)
        changes = [f"{name}={value}" for name, value in variant.model.items() if BASE[name] != value]
        folder = self.out / "runs" / f"{'-'.join(changes) or 'base'}-seed{seed}-{self._digest(config)}"
        done = list_checkpoints(folder / "checkpoints")
        if not done or done[-1].step < config.steps:
            self.say(f"training {folder.name}" + (f" from step {done[-1].step}" if done else ""))
            train(config, self.videos, folder, resume=True)
        return folder

    def _digest(self, config: TrainingConfig) -> str:
        plain = {name: value for name, value in config.to_dict().items() if name not in OPERATIONAL}
        return hashlib.sha256(f"{json.dumps(plain, sort_keys=True)} {self._content}".encode()).hexdigest()[:10]

    def model(self, folder: Path) -> SMTC:
        """The model of a run, ready to segment, its encoder's output remembered."""
        model = SMTC.load(folder).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        model.encoder = RememberingEncoder(model.encoder, self.out / "features" / "frames")
        return model

    def judge(self, folder: Path, dataset: str) -> dict[str, float]:
        """The measure of the data set under each protocol."""

        def judged() -> dict:
            model = self.model(folder)

            def segment(sequence):
                return segment_video(model, sequence.video, merge_foreground=sequence.merge_objects)

            return self._evaluate(segment, dataset, folder.name)

        results = self._once(folder / f"judged-{dataset}.json", dataset, judged)
        return {protocol: results["protocols"][protocol][MEASURES[dataset]] for protocol in PROTOCOLS}

    def baselines(self, folder: Path, dataset: str) -> dict[str, dict[str, float]]:
        """The same of the null model and of the frozen backbone, whose encoder is that of the run in `folder`."""

        def judged() -> dict:
            model = self.model(folder)

            def frozen(sequence):
                return frozen_backbone(
                    model.encoder,
                    sequence.video,
                    resolution=min(model.frame_size),
                    merge_foreground=sequence.merge_objects,
                )

            def null(sequence):
                return colour_null(sequence.video, merge_foreground=sequence.merge_objects)

            return self._evaluate(null, dataset, "baselines", {"frozen": frozen})

        frame = "x".join(map(str, self.training.model.frame_size))
        weights = self.training.model.weights or ""
        key = hashlib.sha256(f"{self.training.model.encoder} {weights} {frame}".encode()).hexdigest()[:10]
        results = self._once(self.out / "baselines" / f"{dataset}-{key}.json", dataset, judged)
        scores = {"null": results["protocols"], "frozen": results["baselines"]["frozen"]["protocols"]}
        return {
            name: {protocol: values[protocol][MEASURES[dataset]] for protocol in PROTOCOLS}
            for name, values in scores.items()
        }

    def _evaluate(self, segment, dataset: str, name: str, baselines=None) -> dict:
        self.say(f"judging {name} on {dataset}")
        return evaluate_dataset(segment, self.sequences[dataset], PROTOCOLS, dataset=dataset, baselines=baselines)

    def _once(self, path: Path, dataset: str, judged: Callable[[], dict]) -> dict:
        """The judgement held in `path`, or else made and put there; one of other sequences does not count."""
        names = [sequence.name for sequence in self.sequences[dataset]]
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if list(held["sequences"]) == names and held["settings"]["version"] == objslot.__version__:
                return held
        except (OSError, ValueError, KeyError, TypeError):
            pass
        results = judged()
        results["settings"]["version"] = objslot.__version__
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return results

    def settings(self, seeds: Sequence[int]) -> dict:
        """What the runs were, for the report."""
        training, model = self.training, self.training.model
        cuda = torch.cuda.is_available() and training.device != "cpu"
        return {
            "encoder": model.encoder,
            "weights": Path(model.weights).name if model.weights else "published",
            "frame size": "{} x {}".format(*model.frame_size),
            "semantics": model.slots,
            "steps": training.steps,
            "clips in a step": training.batch_size,
            "frames in a clip": training.frames,
            "learning rate": training.lr,
            "precision": training.precision,
            "seeds": ", ".join(map(str, seeds)),
            "training videos": len(self.videos),
            "judged on": ", ".join(f"{name}: {len(sequences)} sequences" for name, sequences in self.sequences.items()),
            "device": torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
            "versions": f"objslot {objslot.__version__}, torch {torch.__version__}",
            "date": datetime.date.today().isoformat(),
        }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
