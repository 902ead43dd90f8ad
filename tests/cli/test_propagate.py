"""`objslot propagate`, and the judgement of its masks by `objslot evaluate`."""

import json

import pytest
import torch

from objslot.cli import main
from objslot.data.synthetic import SyntheticVideos
from objslot.models import SMTC, SMTCConfig

ENCODER = "objslot_tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "davis"
    return SyntheticVideos(seed=1, n_videos=2, n_frames=6, size=128).write(root)


def saved_model(folder, train_encoder):
    config = SMTCConfig(encoder=ENCODER, image_size=64, slots=3, instances=2, train_encoder=train_encoder)
    model = SMTC(config)
    if train_encoder:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.mul_(1 + torch.randn_like(parameter))
    model.save(folder)
    return folder


def run(data, out, *arguments):
    words = ["propagate", "--dataset", "davis2017", "--root", data, "--out", out, *arguments]
    code = main([str(word) for word in words])
    return code, json.loads((out / "results.json").read_text()) if code == 0 else None


def test_both_settings_and_their_judgement(data, tmp_path, capsys):
    code, results = run(data, tmp_path / "out", "--encoder", ENCODER)
    assert code == 0
    assert list(results["runs"]) == ["untrained-stride16", "untrained-stride8"]
    scores = results["runs"]["untrained-stride8"]["protocols"]["semi-supervised"]
    assert results["runs"]["untrained-stride8"]["settings"]["topk"] == 28
    assert f"{100 * scores['JF']:.1f}" in capsys.readouterr().out
    folder = tmp_path / "out" / "untrained-stride8"
    assert (folder / "report.html").is_file() and (folder / "table.md").is_file()

    # The masks on disk, judged by themselves, give the same figures.
    arguments = ["--root", data, "--predictions", folder / "masks", "--out", tmp_path / "judged"]
    assert main([str(word) for word in ["evaluate", "--dataset", "davis2017-semi", *arguments]]) == 0
    judged = json.loads((tmp_path / "judged" / "results.json").read_text())
    assert list(judged["protocols"]) == ["semi-supervised"]
    assert judged["protocols"]["semi-supervised"] == scores


def test_a_trained_encoder_stands_beside_the_untrained_one(data, tmp_path, capsys):
    model = saved_model(tmp_path / "model", train_encoder=True)
    code, results = run(data, tmp_path / "out", "--model", model, "--stride", 8)
    assert code == 0 and list(results["runs"]) == ["trained-stride8", "untrained-stride8"]
    trained, untrained = (run["protocols"] for run in results["runs"].values())
    assert trained != untrained
    _, alone = run(data, tmp_path / "alone", "--encoder", ENCODER, "--stride", 8)
    assert alone["runs"]["untrained-stride8"]["protocols"] == untrained


def test_a_frozen_encoder_is_not_compared_with_itself(data, tmp_path, capsys):
    model = saved_model(tmp_path / "model", train_encoder=False)
    code, results = run(data, tmp_path / "out", "--model", model, "--stride", 16)
    assert code == 0 and list(results["runs"]) == ["untrained-stride16"]
    assert "the encoder of this model was frozen" in capsys.readouterr().out


def test_a_model_and_an_encoder_exclude_each_other(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", "--model", "m", "--encoder", ENCODER)[0] == 2
    assert "one of --model DIR and --encoder NAME" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dataset", "others", "message"),
    [
        ("davis2017-semi", ["--protocols", "A"], "expected semi-supervised, and nothing else, for davis2017-semi"),
        ("davis2017", ["--protocols", "semi-supervised"], "not that protocol for other data sets"),
        ("davis2017-semi", ["--baselines"], "expected --predictions DIR and no --baselines"),
    ],
)
def test_the_semi_supervised_task_is_kept_apart(data, tmp_path, capsys, dataset, others, message):
    words = ["evaluate", "--dataset", dataset, "--root", data, "--out", tmp_path / "out"]
    words += ["--predictions", data / "Annotations" / "480p", *others]
    assert main([str(word) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_messages_name_the_data_set_that_was_asked_for(data, tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "out", "--encoder", ENCODER)[0] == 2
    assert capsys.readouterr().err.rstrip().endswith("no such folder; expected the root of davis2017")
    assert run(data, tmp_path / "out", "--encoder", ENCODER, "--sequences", "unknown")[0] == 2
    assert "--sequences: davis2017 has no sequence or list 'unknown'" in capsys.readouterr().err
