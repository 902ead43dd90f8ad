"""A training run in a process of its own: `python run.py DATA OUT RESUME JSON-FIELDS [kill at save N]`.

Prints nothing but what training prints. Leaves as the command line does: 2 on a user's error, 130, 143.
"""

import json
import os
import signal
import sys

import torch
from timm.models.vision_transformer import VisionTransformer

from objslot.errors import UserError
from objslot.models import SMTCConfig, register_encoder
from objslot.training import TrainingConfig, train


def tiny_vit(pretrained: bool) -> VisionTransformer:
    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=12,
        depth=2,
        num_heads=3,
        num_classes=0,
        dynamic_img_size=True,
        drop_path_rate=0.2,
    )


register_encoder("test_training", tiny_vit)


def make_config(**changes) -> TrainingConfig:
    model = {"encoder": "test_training", "image_size": 32, "slots": 3, "instances": 2}
    model |= {"valid_similarity": -1.0, "valid_threshold": 0.0, "valid_area": 0.0}
    model |= changes.pop("model", {})
    settings = {"steps": 6, "batch_size": 2, "frames": 3, "lr": 1e-2, "num_workers": 0, "checkpoint_every": 2}
    return TrainingConfig(model=SMTCConfig(**model), **(settings | changes))


def main(data: str, out: str, resume: str, fields: str) -> int:
    torch.set_num_threads(1)
    try:
        train(make_config(**json.loads(fields)), data, out, resume=resume == "resume")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:5])
    sys.stdout.flush()
    sys.stderr.flush()
    # After the work is done, a process of a group sometimes aborts while its libraries are taken down.
    os._exit(code) if "RANK" in os.environ else sys.exit(code)
