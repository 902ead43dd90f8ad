"""Trains on made-up video files, resumes, discovers and evaluates, all through the installed command.

Usage: end_to_end.py DIR. It says nothing of quality: the encoder is random. It shows that the commands work
together and leave behind what they promise.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from objslot.data.synthetic import SyntheticVideos

ENCODER = "vit_tiny_patch16_224"
N_FRAMES, SIZE, STEPS = 8, 96, 6


def objslot(*words):
    command = ["objslot", *map(str, words)]
    print("$", *command, flush=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def main(root: Path):
    videos = SyntheticVideos(seed=1, n_videos=3, n_frames=N_FRAMES, size=SIZE)
    for video in videos:
        video.write_mp4(root / "videos" / f"{video.name}.mp4")
    videos.write(root / "annotated")
    torch.manual_seed(0)
    save_file(timm.create_model(ENCODER, num_classes=0).state_dict(), root / "encoder.safetensors")

    run, found, judged = root / "run", root / "found", root / "judged"
    train = [
        "train",
        root / "videos",
        "--out",
        run,
        "--encoder",
        ENCODER,
        "--weights",
        root / "encoder.safetensors",
    ]
    train += ["--resolution", SIZE, "--slots", 4, "--instances", 2, "--batch-size", 2, "--steps", STEPS]
    objslot(*train)
    objslot(*train, "--resume")
    objslot("discover", *sorted((root / "videos").iterdir()), "--model", run, "--out", found)
    objslot(
        "evaluate",
        "--dataset",
        "davis2017",
        "--root",
        root / "annotated",
        "--out",
        judged,
        "--model",
        run,
        "--baselines",
    )

    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), steps
    assert len(steps) == STEPS, steps
    assert {"config.json", "model.safetensors"} <= {path.name for path in run.iterdir()}
    for video in videos:
        folder = found / video.name
        masks = sorted((folder / "masks").glob("*.png"))
        assert len(masks) == N_FRAMES, masks
        assert all(np.asarray(Image.open(mask)).shape == (SIZE, SIZE) for mask in masks)
        assert {"overlay.mp4", "sheet.png", "objects.json"} <= {path.name for path in folder.iterdir()}
    results = json.loads((judged / "results.json").read_text())
    assert set(results["protocols"]) == {"A", "B", "C"}
    assert set(results["baselines"]) == {"null", "frozen"}
    for figures in [results, *results["baselines"].values()]:
        protocols = figures.get("protocols", figures)
        assert all(0 <= protocols[name]["J"] <= 1 for name in ("A", "B", "C")), protocols


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
