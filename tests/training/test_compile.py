"""The option `compile`: encoder and model go through torch.compile and learn the same."""

import shutil

import pytest
import torch

from objslot.training import train


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("train_encoder", [False, True], ids=["frozen", "encoder trained"])
def test_compiled_training_takes_the_same_steps(shared_videos, tmp_path, config, metrics, train_encoder):
    fields = {"steps": 3, "model": {"train_encoder": train_encoder}, "unfreeze_at": 1}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    train(config(**fields), shared_videos, tmp_path / "eager")
    assert not graphs["unique_graphs"]
    train(config(compile=True, **fields), shared_videos, tmp_path / "compiled")
    assert graphs["unique_graphs"] >= (1 if train_encoder else 2)
    torch._dynamo.reset()
    eager, compiled = metrics(tmp_path / "eager"), metrics(tmp_path / "compiled")
    assert len(compiled) == 3 and not any(line["skipped"] for line in compiled)
    for line, expected in zip(compiled, eager, strict=True):
        for name in ("loss", "semantic", "instance", "diversity", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-5), (line["step"], name)
