"""Ablations on tiny made-up videos: what is trained and judged, what is kept, what the report says."""

import base64
import json
import re
import shutil

import pytest
import torch
from PIL import Image

from objslot import ablations
from objslot.ablations import run_ablation, study
from objslot.ablations.datasets import find_data_sets, training_videos
from objslot.ablations.diagram import draw_diagram, measure_shapes
from objslot.ablations.memory import RememberingEncoder
from objslot.ablations.summary import spread, verdict
from objslot.ablations.tables import BASE, TABLES, variants_of
from objslot.cli import main
from objslot.data.synthetic import SyntheticVideos
from objslot.errors import UserError
from objslot.models import SMTC, SMTCConfig
from objslot.training import TrainingConfig

SIZE = 48


def settings(**changes) -> TrainingConfig:
    model = {"encoder": "objslot_tiny", "image_size": SIZE, "slots": 3} | changes.pop("model", {})
    fields = {"steps": 3, "batch_size": 1, "frames": 4, "num_workers": 0, "checkpoint_every": 1, "log_every": 99}
    return TrainingConfig(model=SMTCConfig(**model), **(fields | changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Both data sets, of one video each."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("davis2016", "davis2017")):
        made = SyntheticVideos(seed=seed, n_videos=1, n_frames=5, size=SIZE).write(folder / name)
        shutil.rmtree(made / "ImageSets")
    return folder


@pytest.fixture(scope="module")
def out(root, tmp_path_factory):
    """A finished Table 1 of two seeds and the figures, in one folder."""
    folder = tmp_path_factory.mktemp("out") / "study"
    run_ablation("marginals", root, folder, settings(), [0, 1])
    run_ablation("figures", root, folder, settings(), [0])
    return folder


def runs(out):
    return {path.name.rsplit("-", 1)[0] for path in (out / "runs").iterdir()}


def test_every_variant_and_seed_is_a_run(out):
    marginals = {f"{name}-seed{seed}" for name in ("base", "marginal=caam", "marginal=attention") for seed in (0, 1)}
    shown = {"instance_weight=0.0-seed0", "aggregation=none-seed0", "instances=3-seed0"}
    assert runs(out) == marginals | shown
    for path in (out / "runs").iterdir():
        held = json.loads((path / "config.json").read_text())
        change = path.name.split("-seed")[0]
        expected = BASE | ({} if change == "base" else dict([change.split("=")]))
        assert {name: str(held["model"][name]) for name in BASE} == {n: str(v) for n, v in expected.items()}
        assert f"-seed{held['training']['seed']}-" in path.name
        assert len((path / "metrics.jsonl").read_text().splitlines()) == 3


def test_features_are_stored_once_for_all_runs(out):
    assert not list((out / "runs").rglob("*.npy"))
    assert len(list((out / "features").rglob("*.keys.npy"))) == 2


def test_the_table_is_the_mean_of_the_judgements(out):
    table = json.loads((out / "tables" / "marginals.json").read_text())
    columns = dict(zip(table["header"], zip(*table["rows"], strict=True), strict=True))
    assert columns["marginal"][:3] == ("uniform", "CAAM", "CLS attention")
    assert columns["DAVIS-2016 J, paper"] == ("71.8", "72.1", "73.3", "-", "-")
    assert columns["DAVIS-2017-U J&F, paper"] == ("40.5", "40.8", "41.3", "-", "-")
    for dataset, measure, title in (("davis2016", "J", "DAVIS-2016 J"), ("davis2017", "JF", "DAVIS-2017-U J&F")):
        for protocol in "ABC":
            values = [
                json.loads(path.read_text())["protocols"][protocol][measure]
                for seed in (0, 1)
                for path in (out / "runs").glob(f"marginal=caam-seed{seed}-*/judged-{dataset}.json")
            ]
            assert len(values) == 2
            assert columns[f"{title}, {protocol}"][1] == spread(values)
    assert len(table["findings"]) == 3
    assert table["settings"]["steps"] == 3


def test_the_report_stands_alone(out):
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [table["title"] for table in data["tables"]] == [TABLES["marginals"].title]
    assert len(data["figures"]) == 5
    kinds = [figure["source"].split(";")[0] for figure in data["figures"]]
    assert kinds == ["data:image/svg+xml", *["data:image/jpeg"] * 4]
    assert base64.b64decode(data["figures"][0]["source"].split(",")[1]).startswith(b"<svg")
    text = (out / "report.md").read_text()
    assert (out / "tables" / "marginals.md").read_text() in text
    for number in range(1, 6):
        assert f"figures/figure-{number}." in text
    for number in range(2, 6):
        Image.open(out / "figures" / f"figure-{number}.png").load()


def test_what_is_done_is_not_done_again(root, out, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("done twice")

    monkeypatch.setattr(study, "train", refuse)
    monkeypatch.setattr(study, "evaluate_dataset", refuse)
    before = (out / "tables" / "marginals.md").read_text()
    run_ablation("marginals", root, out, settings(), [0, 1])
    assert (out / "tables" / "marginals.md").read_text() == before
    with pytest.raises(AssertionError, match="done twice"):
        run_ablation("marginals", root, out, settings(steps=4), [0])


def test_a_run_that_was_stopped_goes_on_to_the_same_result(root, out, tmp_path, monkeypatch):
    follow, steps = SMTC.update_teacher, []

    def stop(model):
        follow(model)
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SMTC, "update_teacher", stop)
        run_ablation("marginals", root, tmp_path, settings(), [0, 1])
    assert not (tmp_path / "tables").exists()
    said = []
    run_ablation("marginals", root, tmp_path, settings(), [0, 1], say=said.append)
    assert any(text.startswith("training base-seed1") and text.endswith("from step 1") for text in said)
    assert not any(text.startswith("training base-seed0") for text in said)
    for name in ("rows", "findings"):
        held = [json.loads((folder / "tables" / "marginals.json").read_text())[name] for folder in (tmp_path, out)]
        assert held[0] == held[1]


def test_bad_input_is_refused_before_anything_is_trained(root, tmp_path):
    def refused(what="marginals", where=root, training=None, seeds=(0,)):
        with pytest.raises(UserError) as caught:
            run_ablation(what, where, tmp_path / "out", training or settings(), list(seeds))
        assert not (tmp_path / "out" / "runs").exists()
        return str(caught.value)

    assert "expected one of marginals, instances, sampling, figures" in refused(what="slots")
    assert "seeds: got none" in refused(seeds=())
    assert "seeds: got 1, 1" in refused(seeds=(1, 1))
    assert "no such folder" in refused(where=tmp_path / "nowhere")
    assert "holds no DAVIS data set" in refused(where=tmp_path)
    assert "frames: got 3, expected more than the 3 others" in refused(what="sampling", training=settings(frames=3))
    assert "train_encoder" in refused(training=settings(model={"train_encoder": True}))


def test_the_command(root, tmp_path, capsys):
    flags = ["--encoder", "objslot_tiny", "--resolution", str(SIZE), "--slots", "2", "--steps", "1"]
    flags += ["--batch-size", "1", "--frames", "2", "--seeds", "0", "--root", str(root / "davis2016")]
    assert main(["ablate", "marginals", "--out", str(tmp_path / "out"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "| CAAM |" in printed
    assert "DAVIS-2017" not in printed
    assert str(tmp_path / "out" / "report.html") in printed
    assert main(["ablate", "marginals", "--out", str(tmp_path / "b"), *flags, "--seeds", "zero"]) == 2
    assert "--seeds: got 'zero'" in capsys.readouterr().err


def test_data_sets_are_found_by_looking(tmp_path):
    def make(path, *lists):
        for folder in ("JPEGImages/480p", "Annotations/480p", *(f"ImageSets/{name}" for name in lists)):
            (path / folder).mkdir(parents=True)
        return path

    both = make(tmp_path / "one" / "DAVIS", "480p", "2017")
    assert find_data_sets(both) == {"davis2016": both, "davis2017": both}
    assert find_data_sets(tmp_path / "one") == {"davis2016": both, "davis2017": both}
    plain, old = make(tmp_path / "two" / "plain"), make(tmp_path / "two" / "davis-2016")
    (tmp_path / "two" / "videos").mkdir()
    assert find_data_sets(tmp_path / "two") == {"davis2016": old, "davis2017": plain}


def test_videos_of_one_name_are_one_video(root):
    data_sets = find_data_sets(root)
    assert len(training_videos(data_sets)) == 2
    assert len(training_videos({"davis2016": root / "davis2016", "davis2017": root / "davis2016"})) == 1


def test_rows_without_class_token():
    names = [variant.name for variant in variants_of(TABLES["marginals"], "resnet50.a1_in1k")]
    assert names == ["uniform", "caam"]
    assert TABLES["marginals"].variants[1].published["resnet"] == pytest.approx(
        {"davis2016": 0.681, "davis2017": 0.398}
    )


def test_every_variant_is_a_configuration_of_its_own():
    for table in TABLES.values():
        configs = [SMTCConfig(**variant.fields).to_dict() for variant in table.variants]
        assert all(a != b for k, a in enumerate(configs) for b in configs[:k])
        names = {variant.name for variant in table.variants}
        assert all({claim.better, claim.worse} <= names for claim in table.claims)
    assert set(ablations.ABLATIONS) == {*TABLES, "figures"}


@pytest.mark.parametrize(
    ("gains", "margin", "expected"),
    [
        ([0.01], 0.0, "holds in this one run"),
        ([-0.01], 0.0, "does not hold in this one run"),
        ([0.0], 0.0, "does not hold in this one run"),
        ([-0.004], -0.005, "holds in this one run"),
        ([0.0, 0.0], 0.0, "undecided"),
        ([0.02, 0.01], 0.0, "holds"),
        ([0.05, -0.03], 0.0, "undecided"),
        ([-0.02, -0.01], 0.0, "does not hold"),
    ],
)
def test_verdicts(gains, margin, expected):
    assert verdict(gains, margin) == expected


def test_spread():
    assert spread([0.5]) == "50.0"
    assert spread([0.5, 0.6]) == "55.0 ± 7.1"


def test_the_diagram_shows_the_shapes_of_the_model():
    model = SMTC(SMTCConfig(encoder="objslot_tiny", image_size=(48, 64), slots=5, instances=2, iterations=2))
    shapes = measure_shapes(model)
    assert shapes["keys"] == (1, 2, 48, 128)
    assert shapes["correspondence"] == (1, 2, 48, 48)
    assert shapes["instance"] == (1, 2, 5, 2, 48)
    svg = draw_diagram(model)
    for shape in ("5 × 128", "1 × 2 × 5 × 2 × 48", "1 × 2 × 5 × 48", "1 × 2 × 5 × 2 × 128"):
        assert f">{shape}<" in svg
    assert "2 × : q" in svg


def test_the_encoder_remembers(tmp_path):
    model = SMTC(SMTCConfig(encoder="objslot_tiny", image_size=48, slots=2))
    encoder = model.encoder
    remembering = RememberingEncoder(encoder, tmp_path)
    assert (remembering.width, remembering.patch_size) == (128, 8)
    clips = torch.randn(2, 1, 2, 3, 48, 48)
    first = [remembering(clip) for clip in clips]
    calls = []
    encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    again = [remembering(clip) for clip in clips]
    assert not calls
    for one, other, clip in zip(first, again, clips, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert torch.equal(other.keys, encoder(clip).keys)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"torn")
    assert torch.equal(remembering(clips[0]).keys, first[0].keys)
    with torch.no_grad():
        encoder.model.blocks[0].attn.qkv.weight.mul_(2)
    changed = RememberingEncoder(encoder, tmp_path)
    assert not torch.equal(changed(clips[0]).keys, first[0].keys)
