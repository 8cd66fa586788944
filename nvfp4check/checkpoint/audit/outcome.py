"""What the audit says of a checkpoint: sums over its weights, the convention, what is foreign."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvfp4check.checkpoint.audit.patterns import patterns
from nvfp4check.checkpoint.audit.results import Copied, CopyAudit, Foreign, WeightAudit
from nvfp4check.checkpoint.naming import Layout
from nvfp4ref.conventions import Convention

if TYPE_CHECKING:
    from nvfp4check.checkpoint.audit.pairs import Pairing

#: Names that the document lists of weights the base does not have, and of those missing here.
_LISTED = 20

#: Conventions of each layout's own producer: of those that fit alike, one of these is named.
_OWN = {
    Layout.MODELOPT: (Convention.MODELOPT_0_39, Convention.MODELOPT),
    Layout.COMPRESSED_TENSORS: (Convention.COMPRESSED_TENSORS,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConventionFit:
    """How far one convention reproduces the quantised weights."""

    convention: str
    #: Scale bytes, and codes under the stored scales, that it makes otherwise.
    scale_bytes: int
    codes: int
    #: Weights that it reproduces byte for byte.
    weights: int

    @property
    def differs(self) -> int:
        """Scale bytes and codes together."""
        return self.scale_bytes + self.codes


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOutcome:
    """The audit of one checkpoint against its base."""

    base: str
    layout: Layout
    weights: Mapping[str, WeightAudit]
    copies: Mapping[str, CopyAudit]
    foreign: Mapping[str, Foreign]
    pairing: "Pairing"

    @property
    def native(self) -> tuple[WeightAudit, ...]:
        """The quantised weights that are this base's."""
        return tuple(w for w in self.weights.values() if w.name not in self.foreign)

    @property
    def fits(self) -> tuple[ConventionFit, ...]:
        """Every convention, the best first; of equals, those of the layout's producer.

        None where all weights were smoothed: which values exactly were quantised is not known.
        """
        exact = [weight for weight in self.native if not weight.slack]
        if not exact:
            return ()
        own = _OWN.get(self.layout, ())
        found = [
            ConventionFit(
                convention=convention.value,
                scale_bytes=sum(w.scale_differs[convention] for w in exact),
                codes=sum(w.code_differs[convention] for w in exact),
                weights=sum(w.differs(convention) == 0 for w in exact),
            )
            for convention in Convention
        ]
        order = [*own, *(c for c in Convention if c not in own)]
        return tuple(
            sorted(found, key=lambda fit: (fit.differs, order.index(Convention(fit.convention))))
        )

    def total(self, count: str) -> int:
        """Add up one of `kernel.Count` over the quantised weights that are this base's."""
        return sum(weight.counts[count] for weight in self.native)

    def to_json(self) -> dict[str, Any]:
        """Return the part of a validation's document that tells of the audit."""
        elements = sum(weight.elements for weight in self.native)
        nearest = sum(weight.nearest for weight in self.native)
        formats = Counter((w.base_format, w.way, w.dtype) for w in self.native)
        copied = Counter(copy.how for copy in self.copies.values())
        return {
            "base": self.base,
            "quantized": {
                "weights": len(self.weights),
                "blocks": sum(weight.blocks for weight in self.native),
                "elements": elements,
                "nearest": nearest,
                "nearest_share": nearest / elements if elements else None,
                "exact_ties": self.total("exact_ties"),
                "near_ties": self.total("near_ties"),
                "other_side_of_a_tie": self.total("other_side"),
                "off": self.total("off"),
                "beyond": self.total("beyond"),
                "searched_blocks": self.total("searched"),
                "four_over_six_blocks": self.total("over_four"),
                "made_from": [
                    {"format": form, "way": way, "dtype": dtype, "weights": count}
                    for (form, way, dtype), count in sorted(formats.items())
                ],
            },
            "conventions": [
                {
                    "convention": fit.convention,
                    "scale_bytes": fit.scale_bytes,
                    "codes": fit.codes,
                    "weights": fit.weights,
                }
                for fit in self.fits
            ],
            "copied": {how.value: copied[how] for how in Copied if copied[how]},
            "foreign": [foreign.to_json() for _, foreign in sorted(self.foreign.items())],
            "patterns": list(patterns(self.foreign.values())),
            "hindered": len(self.pairing.hindered),
            "not_in_base": _listed(self.pairing.added),
            "only_in_base": _listed(self.pairing.missing),
        }


def _listed(names: list[str]) -> dict[str, Any]:
    return {"count": len(names), "first": names[:_LISTED]}
