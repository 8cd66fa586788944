"""Which weight is held against which: by name, through fused names, and under another prefix.

Fused linears are taken apart by rows: `gate_up_proj` holds gate_proj and then up_proj; a stack
`experts.gate_up_proj` [E, 2 I, H] or `experts.down_proj` [E, H, I] holds those of every expert.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nvfp4check.checkpoint.diff.operands import Operand
from nvfp4check.checkpoint.naming import FUSED_GROUPS, LogicalWeight

#: Prefixes that some producers put before the language model's names, or leave out.
_PREFIXES = ("language_model.", "model.language_model.")


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight in both checkpoints, or in one."""

    name: str
    a: Operand | None
    b: Operand | None

    @property
    def nbytes(self) -> int:
        """Bytes that its comparison reads."""
        return sum(side.nbytes for side in (self.a, self.b) if side is not None)

    @property
    def both(self) -> tuple[Operand, Operand]:
        """Both sides of a pair that has them."""
        if self.a is None or self.b is None:
            raise ValueError(f"{self.name}: not in both checkpoints")
        return self.a, self.b


def pair_weights(
    a: Mapping[str, LogicalWeight], b: Mapping[str, LogicalWeight], only: str | None = None
) -> list[Pair]:
    """Pair the weights of two checkpoints, sorted by name; `only` chooses names by a glob."""
    left, right = _split_for(a, b), _split_for(b, a)
    shift = other_prefix(a, b)
    right = {_renamed(name, shift): side for name, side in right.items()}
    names = sorted({*left, *right})
    return [
        Pair(name, left.get(name), right.get(name))
        for name in names
        if only is None or fnmatchcase(name, only) or fnmatchcase(name.rpartition(".")[0], only)
    ]


def _split_for(
    weights: Mapping[str, LogicalWeight], other: Mapping[str, LogicalWeight]
) -> dict[str, Operand]:
    """Take fused weights apart whose members the other checkpoint has by themselves."""
    found: dict[str, Operand] = {}
    for name, weight in weights.items():
        parts = list(_members(weight)) if name not in other else []
        if parts and all(member in other for member, _ in parts):
            found.update(parts)
        else:
            found[name] = Operand(weight)
    return found


def _members(weight: LogicalWeight) -> Iterator[tuple[str, Operand]]:
    module = weight.name.removesuffix(".weight")
    parent, _, leaf = module.rpartition(".")
    if len(weight.shape) == 3 and parent.endswith("experts"):
        experts, rows, _ = weight.shape
        leaves = FUSED_GROUPS.get(leaf, (leaf,))
        if rows % len(leaves):
            return
        share = rows // len(leaves)
        for expert in range(experts):
            for place, member in enumerate(leaves):
                first = expert * rows + place * share
                yield f"{parent}.{expert}.{member}.weight", Operand(weight, first, share)
        return
    # Of q, k and v the sizes differ: only halves can be told from the shape.
    members = FUSED_GROUPS.get(leaf, ())
    if leaf in ("gate_up_proj", "w13") and len(weight.shape) == 2 and weight.shape[0] % 2 == 0:
        half = weight.shape[0] // 2
        for place, member in enumerate(members):
            yield f"{parent}.{member}.weight", Operand(weight, place * half, half)


def other_prefix(a: Mapping[str, object], b: Mapping[str, object]) -> tuple[str, str]:
    """Find the prefix of b's names that stands for one of a's; two empty ones where none does.

    It must make more than twice as many names shared as are without it.
    """
    shared = len(a.keys() & b.keys())
    if 2 * shared >= min(len(a), len(b)):
        return "", ""
    known = {_before_layers(names) for names in (a, b)}
    tried = [(prefix, "") for prefix in _PREFIXES] + [("", prefix) for prefix in _PREFIXES]
    tried += [("model." + prefix, "model.") for prefix in _PREFIXES]
    if len(known) == 2:
        tried.append((_before_layers(b), _before_layers(a)))
    best = max(tried, key=lambda shift: sum(_renamed(name, shift) in a for name in b))
    found = sum(_renamed(name, best) in a for name in b)
    return best if found > 2 * shared else ("", "")


def _before_layers(names: Iterable[str]) -> str:
    """Give what most names of layers have before them."""
    before = Counter(name.partition("layers.")[0] for name in names if "layers." in name)
    return before.most_common(1)[0][0] if before else ""


def _renamed(name: str, shift: tuple[str, str]) -> str:
    old, new = shift
    return new + name.removeprefix(old) if name.startswith(old) else name
