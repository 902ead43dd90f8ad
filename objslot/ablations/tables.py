"""What the paper's supplementary material ablates: the variants of each table, its numbers, and what it finds.

Numbers are fractions: mean IoU on DAVIS-2016 and J&F on DAVIS-2017-Unsupervised. They stand for training on
YouTube-VOS and for a selection made with the annotation, which is protocol C here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from objslot.errors import UserError

# What every variant departs from: the setting that the paper's tables share.
BASE = {
    "marginal": "uniform",
    "instances": 4,
    "sampling": "other",
    "n_other": 1,
    "aggregation": "soft",
    "semantic_weight": 1.0,
    "instance_weight": 1.0,
    "diversity_weight": 1.0,
}

Published = Mapping[str, float]


@dataclass(frozen=True)
class Variant:
    """One row: what of `BASE` is different, and what the paper reports.

    Attributes:
        name: a short name, unique in its table.
        title: what the row is called.
        model: fields of `SMTCConfig` that differ from `BASE`.
        published: per kind of encoder ("vit", "resnet") the paper's figure of each data set.
    """

    name: str
    title: str
    model: Mapping[str, object] = field(default_factory=dict)
    published: Mapping[str, Published] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, object]:
        """Fields of `SMTCConfig`, those of `BASE` among them."""
        return BASE | dict(self.model)


@dataclass(frozen=True)
class Claim:
    """What the paper finds: the mean of `better` is above that of `worse`, by more than `margin`.

    A negative margin claims that `better` is no worse than that.
    """

    text: str
    better: str
    worse: str
    margin: float = 0.0


@dataclass(frozen=True)
class Table:
    """One table of the paper."""

    title: str
    column: str
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...]


def _published(vit: tuple[float, float], resnet: tuple[float, float] | None = None) -> dict[str, dict[str, float]]:
    kinds = {"vit": vit} | ({} if resnet is None else {"resnet": resnet})
    return {kind: {"davis2016": iou / 100, "davis2017": region / 100} for kind, (iou, region) in kinds.items()}


TABLES: dict[str, Table] = {
    "marginals": Table(
        "Table 1: marginals of the transport plan",
        "marginal",
        (
            Variant("uniform", "uniform", {}, _published((71.8, 40.5), (66.4, 39.0))),
            Variant("caam", "CAAM", {"marginal": "caam"}, _published((72.1, 40.8), (68.1, 39.8))),
            Variant("attention", "CLS attention", {"marginal": "attention"}, _published((73.3, 41.3))),
        ),
        (
            Claim("activation maps (CAAM) beat uniform marginals", "caam", "uniform"),
            Claim("CLS attention beats uniform marginals", "attention", "uniform"),
            Claim("CLS attention beats CAAM", "attention", "caam"),
        ),
    ),
    "instances": Table(
        "Table 2: instances P of each semantics in training",
        "P",
        (
            Variant("1", "1", {"instances": 1}, _published((66.4, 24.5))),
            Variant("2", "2", {"instances": 2}, _published((69.3, 35.4))),
            Variant("3", "3", {"instances": 3}, _published((71.1, 39.9))),
            Variant("4", "4", {}, _published((71.8, 40.5))),
            Variant("5", "5", {"instances": 5}, _published((71.5, 40.4))),
        ),
        (
            Claim("two instances beat one", "2", "1"),
            Claim("three instances beat two", "3", "2"),
            Claim("four instances beat three", "4", "3"),
            Claim("a fifth instance adds nothing", "4", "5"),
        ),
    ),
    "sampling": Table(
        "Table 3: frames that a frame corresponds to",
        "frames",
        (
            Variant("self-1", "Self-1", {"sampling": "self"}, _published((67.1, 24.3))),
            Variant("other-1", "Other-1", {}, _published((71.8, 40.5))),
            Variant("other-2", "Other-2", {"n_other": 2}, _published((71.7, 40.8))),
            Variant("other-3", "Other-3", {"n_other": 3}, _published((71.8, 40.7))),
        ),
        (
            Claim("another frame beats the frame itself", "other-1", "self-1"),
            Claim("one other frame is as good as two, to half a point", "other-1", "other-2", -0.005),
            Claim("one other frame is as good as three, to half a point", "other-1", "other-3", -0.005),
        ),
    ),
}

# The models that the figures show.
FULL = Variant("full", "full training")
STAGE_ONE = Variant("stage 1 only", "stage 1 only (semantic alignment and diversity)", {"instance_weight": 0.0})
UNMASKED = Variant("no masked aggregation", "without masked aggregation", {"aggregation": "none"})
THREE = Variant("3", "trained with P = 3", {"instances": 3})


def encoder_kind(encoder: str) -> str:
    """The paper's kind of encoder that a timm name stands beside: "vit" or "resnet"."""
    return "resnet" if "resnet" in encoder else "vit"


def variants_of(table: Table, encoder: str) -> tuple[Variant, ...]:
    """The rows that an encoder allows: without a class token there is no attention to weigh positions by."""
    kept = tuple(v for v in table.variants if encoder_kind(encoder) == "vit" or v.model.get("marginal") != "attention")
    if not kept:
        raise UserError(f"encoder: {encoder} allows no row of {table.title}")
    return kept
