"""The subcommands of `objslot`: dataclasses whose fields are the flags. Heavy imports wait until one runs."""

from objslot.commands._common import Command
from objslot.commands.ablate import Ablate
from objslot.commands.bench import Bench
from objslot.commands.demo import Demo
from objslot.commands.discover import Discover
from objslot.commands.evaluate import Evaluate
from objslot.commands.info import Info
from objslot.commands.propagate import Propagate
from objslot.commands.train import Train

COMMANDS = {
    "demo": Demo,
    "train": Train,
    "discover": Discover,
    "evaluate": Evaluate,
    "propagate": Propagate,
    "ablate": Ablate,
    "bench": Bench,
    "info": Info,
}

__all__ = ["COMMANDS", "Command"]
