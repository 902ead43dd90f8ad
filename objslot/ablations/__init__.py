"""The ablations and figures of the paper, as runs that can be stopped and go on."""

from objslot.ablations.study import ABLATIONS, run_ablation

__all__ = ["ABLATIONS", "run_ablation"]
