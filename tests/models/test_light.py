"""The encoders load without PyTorch's compiler, and what it serves works all the same."""

import subprocess
import sys

import pytest


def runs(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_encoders_load_no_compiler():
    runs(
        "import sys, torch\n"
        "disable = torch.compiler.disable\n"
        "import objslot.models, objslot.evaluation, objslot.inference.baselines, objslot.inference.writer\n"
        "objslot.models.build_encoder('objslot_tiny')(torch.rand(1, 1, 3, 32, 32))\n"
        "loaded = {'torch._dynamo', 'torch._dynamo.utils', 'sympy', 'triton'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert torch.compiler.disable is disable"
    )


def test_what_the_compiler_serves_works_later():
    runs(
        "import objslot.models, torch\n"
        "from timm.models.naflexvit import NaFlexRopeIterator\n"
        "from torchvision.ops import roi_align\n"
        "assert roi_align(torch.ones(1, 2, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4]]), 3).shape == (1, 2, 3, 3)\n"
        "import torch._dynamo.utils as utils\n"
        "assert utils.__file__ and utils.counters is not None\n"
        "encoder = objslot.models.build_encoder('objslot_tiny')\n"
        "frames = torch.rand(1, 1, 3, 32, 32)\n"
        "compiled = torch.compile(encoder, backend='eager')\n"
        "torch.testing.assert_close(compiled(frames).keys, encoder(frames).keys)"
    )


@pytest.mark.parametrize("wanted", ["import torch._dynamo", "from torch._dynamo.utils import counters"])
def test_whoever_needs_the_compiler_meanwhile_gets_it(wanted):
    runs(
        "import sys, torch\n"
        "from objslot.models.light import compiler_on_demand\n"
        f"with compiler_on_demand(): {wanted}\n"
        "from torch._dynamo.utils import counters\n"
        "assert sys.modules['torch._dynamo.utils'].__file__\n"
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2"
    )
