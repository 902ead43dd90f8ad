"""The command line: what it accepts, what it refuses and how, and the whole way from videos to pages."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from objslot.cli import main
from objslot.data.synthetic import SyntheticVideos
from objslot.viz import write_indexed_png

ENCODER = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return SyntheticVideos(seed=1, n_videos=2, n_frames=6, size=64).write(
        tmp_path_factory.mktemp("data") / "davis"
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_file(timm.create_model(ENCODER, pretrained=False).state_dict(), path)
    return path


def train_arguments(data, out, weights, *others):
    return [
        "train",
        str(data),
        "--out",
        str(out),
        "--encoder",
        ENCODER,
        "--weights",
        str(weights),
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--frames",
        "2",
        "--resolution",
        "64",
        "--slots",
        "4",
        "--instances",
        "2",
        "--device",
        "cpu",
        *others,
    ]


@pytest.fixture(scope="module")
def model(data, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "model"
    assert main(train_arguments(data, out, weights)) == 0
    return out


def names(data):
    return sorted(path.name for path in (data / "JPEGImages" / "480p").iterdir())


def refused(capsys, arguments, *expected):
    """Runs the command, which must print one line on stderr that holds `expected`, and leave with 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("objslot: error:")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    for text in expected:
        assert str(text) in lines[0]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "objslot.cli", *arguments], capture_output=True, text=True, timeout=300
    )


def test_help_is_fast_and_light():
    code = (
        "import sys\nfrom objslot.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as leaving: assert leaving.code == 0\n"
        "assert not {'torch', 'timm', 'av', 'scipy'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("train", "discover", "evaluate", "info"):
        assert command in done.stdout


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["train"], ["evaluate", "--dataset", "imagenet"]])
def test_wrong_words_leave_with_two(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_the_whole_way(data, model, tmp_path, capsys):
    assert {path.name for path in model.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
    }
    assert len((model / "metrics.jsonl").read_text().splitlines()) == 3

    first = names(data)[0]
    video = data / "JPEGImages" / "480p" / first
    found = tmp_path / "found"
    assert main(["discover", str(video), "--model", str(model), "--out", str(found), "--instances", "3"]) == 0
    assert {path.name for path in (found / first).iterdir()} == {
        "masks",
        "slots",
        "overlay.mp4",
        "sheet.png",
        "objects.json",
        "report.html",
    }
    summary = json.loads((found / first / "objects.json").read_text())
    assert summary["frames"] == 6 and (summary["height"], summary["width"]) == (64, 64)
    assert summary["settings"]["instances"] == 3
    regions = [np.asarray(Image.open(path)) for path in sorted((found / first / "slots").iterdir())]
    assert len(regions) == 6 and max(region.max() for region in regions) <= 4 * 3
    page = json.loads(
        re.search(r'id="data">(.*?)</script>', (found / first / "report.html").read_text(), re.S)[1]
    )
    assert set(page["layers"]) == {"objects", "slots", "semantic"}
    assert (page["attention"]["iterations"], page["attention"]["slots"]) == (3, 4)

    judged = tmp_path / "judged"
    capsys.readouterr()
    arguments = [
        "evaluate",
        "--dataset",
        "davis2017",
        "--root",
        str(data),
        "--out",
        str(judged),
        "--model",
        str(model),
    ]
    assert main([*arguments, "--baselines"]) == 0
    results = json.loads((judged / "results.json").read_text())
    assert set(results) >= {"dataset", "protocols", "sequences", "baselines", "settings"}
    assert list(results["protocols"]) == ["A", "B", "C"] and set(results["baselines"]) == {"null", "frozen"}
    assert sorted(results["sequences"]) == names(data)
    for scores in (
        results["protocols"]["A"],
        results["baselines"]["null"]["A"],
        results["baselines"]["frozen"]["C"],
    ):
        assert 0 <= scores["JF"] <= 1 and scores["JF"] == pytest.approx((scores["J"] + scores["F"]) / 2)
    assert f"{100 * results['protocols']['B']['J']:.1f}" in capsys.readouterr().out
    assert {path.name for path in judged.iterdir()} == {
        "results.json",
        "table.md",
        "table.txt",
        "report.html",
        "sheet.png",
        "sequences",
    }


def test_resume_continues_with_the_flags_of_the_run(data, model, weights, tmp_path, capsys):
    refused(capsys, train_arguments(data, model, weights), "--resume", model)
    assert main(["train", str(data), "--out", str(model), "--resume"]) == 0
    refused(capsys, ["train", data, "--out", model, "--resume", "--slots", "5"], "slots: 4 -> 5")


def test_predictions_that_are_the_annotation_score_one(data, tmp_path):
    predictions = data / "Annotations" / "480p"
    out = tmp_path / "judged"
    arguments = ["evaluate", "--dataset", "davis2017", "--root", str(data), "--out", str(out), "--baselines"]
    first = names(data)[0]
    assert (
        main([*arguments, "--predictions", str(predictions), "--protocols", "B", "--sequences", first]) == 0
    )
    results = json.loads((out / "results.json").read_text())
    assert results["protocols"]["B"]["J"] == 1 and list(results["protocols"]) == ["B"]
    assert list(results["sequences"]) == [first] and set(results["baselines"]) == {"null"}


class TestRefusals:
    def test_a_folder_without_video(self, tmp_path, weights, capsys):
        (tmp_path / "empty").mkdir()
        out = tmp_path / "out"
        refused(capsys, train_arguments(tmp_path / "empty", out, weights), "empty", "no video")
        refused(capsys, ["discover", tmp_path / "empty", "--model", "m", "--out", out], "empty", "no video")
        refused(capsys, ["discover", tmp_path / "absent", "--model", "m", "--out", out], "absent")

    def test_a_truncated_video(self, data, tmp_path, capsys):
        whole = SyntheticVideos(seed=2, n_videos=1, n_frames=6, size=64)[0].write_mp4(tmp_path / "whole.mp4")
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(whole.read_bytes()[:-2000])
        refused(capsys, ["discover", cut, "--model", "m", "--out", tmp_path / "out"], "cut.mp4")

    def test_a_folder_that_is_no_model(self, data, tmp_path, capsys):
        video = data / "JPEGImages" / "480p" / names(data)[0]
        refused(capsys, ["discover", video, "--model", tmp_path, "--out", tmp_path / "out"], tmp_path)
        assert not (tmp_path / "out").exists()

    def test_weights_of_another_model(self, data, tmp_path, capsys):
        other = tmp_path / "other.safetensors"
        save_file(timm.create_model("test_resnet.r160_in1k", pretrained=False).state_dict(), other)
        refused(capsys, train_arguments(data, tmp_path / "out", other), "other.safetensors")

    def test_an_output_that_exists(self, data, model, tmp_path, capsys):
        first = names(data)[0]
        taken = tmp_path / "out"
        (taken / first).mkdir(parents=True)
        (taken / first / "mine").write_text("keep")
        video = data / "JPEGImages" / "480p" / first
        refused(capsys, ["discover", video, "--model", model, "--out", taken], "already exists", first)
        predictions = data / "Annotations" / "480p"
        refused(
            capsys,
            [
                "evaluate",
                "--dataset",
                "davis2017",
                "--root",
                data,
                "--out",
                taken,
                "--predictions",
                predictions,
            ],
            "already exists",
        )
        assert [path.name for path in taken.rglob("*")] == [first, "mine"]

    def test_predictions_that_do_not_match(self, data, tmp_path, capsys):
        arguments = [
            "evaluate",
            "--dataset",
            "davis2017",
            "--root",
            data,
            "--out",
            tmp_path / "out",
            "--predictions",
        ]
        refused(capsys, [*arguments, tmp_path / "absent"], "absent")
        first, second = names(data)
        wrong = tmp_path / "wrong"
        (wrong / first).mkdir(parents=True)
        refused(capsys, [*arguments, wrong], second, "no predictions")
        (wrong / second).mkdir()
        for name in (first, second):
            for t in range(6):
                write_indexed_png(wrong / name / f"{t:05d}.png", np.ones((32, 64), np.uint8))
        refused(capsys, [*arguments, wrong], "64 x 32", "64 x 64")
        assert not (tmp_path / "out").exists()

    def test_model_and_predictions_exclude_each_other(self, data, tmp_path, capsys):
        arguments = ["evaluate", "--dataset", "davis2017", "--root", data, "--out", tmp_path / "out"]
        refused(capsys, arguments, "one of --model DIR and --predictions DIR")
        refused(
            capsys,
            [*arguments, "--model", "m", "--predictions", "p"],
            "one of --model DIR and --predictions DIR",
        )

    def test_unknown_protocols_and_sequences(self, data, tmp_path, capsys):
        arguments = [
            "evaluate",
            "--dataset",
            "davis2017",
            "--root",
            data,
            "--out",
            tmp_path / "out",
            "--predictions",
            data / "Annotations" / "480p",
        ]
        refused(capsys, [*arguments, "--protocols", "A,Z"], "Z")
        refused(capsys, [*arguments, "--sequences", "nobody"], "nobody")

    def test_counts_below_one(self, data, model, tmp_path, capsys):
        video = data / "JPEGImages" / "480p" / names(data)[0]
        arguments = ["discover", video, "--model", model, "--out", tmp_path / "out"]
        refused(capsys, [*arguments, "--instances", "0"], "--instances must be at least 1, got 0")
        refused(capsys, [*arguments, "--instances", "100"], "instances", "100")
        assert not list(tmp_path.iterdir()) or not list((tmp_path / "out").iterdir())


def test_a_missing_torchvision_is_named(data, model, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    video = data / "JPEGImages" / "480p" / names(data)[0]
    done = subprocess.run(
        [sys.executable, "-m", "objslot.cli", "discover", video, "--model", model, "--out", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "torchvision::nms" in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_a_traceback(tmp_path, capsys):
    arguments = ["discover", str(tmp_path / "absent"), "--model", "m", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_warnings_are_one_line(data, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{names(data)[0]}\nabsent\n")
    arguments = [
        "evaluate",
        "--dataset",
        "davis2017",
        "--root",
        data,
        "--out",
        tmp_path / "out",
        "--predictions",
    ]
    arguments += [data / "Annotations" / "480p", "--sequences", tmp_path / "list.txt", "--protocols", "B"]
    assert main([str(argument) for argument in arguments]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("objslot: warning:") and "absent" in line for line in lines) == 1


def test_unexpected_errors_are_one_line_too(monkeypatch, capsys):
    def fail(check):
        raise KeyError("surprise")

    monkeypatch.setattr("objslot.info.collect", fail)
    assert main(["info"]) == 1
    error = capsys.readouterr().err
    assert error == "objslot: error: unexpected KeyError: 'surprise'; --debug shows where\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave_with_their_code(data, weights, tmp_path, number, code):
    out = tmp_path / "run"
    arguments = train_arguments(data, out, weights)
    arguments[arguments.index("--steps") + 1] = "100000"
    child = subprocess.Popen(
        [sys.executable, "-m", "objslot.cli", *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 300
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert child.poll() is None and time.monotonic() < deadline, child.stderr.read()
            time.sleep(0.05)
        child.send_signal(number)
        error = child.communicate(timeout=300)[1]
    finally:
        child.kill()
    assert child.returncode == code
    assert "Traceback" not in error
    assert list((out / "checkpoints").iterdir()) and (out / "model.safetensors").exists()


def test_info_prints_json():
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    assert "sinkhorn" in json.loads(done.stdout)["ops"]
