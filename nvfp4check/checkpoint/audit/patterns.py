"""What several foreign weights have in common, in words."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from nvfp4check.checkpoint.audit.results import Foreign
from nvfp4check.checkpoint.naming import FUSED_GROUPS

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.weight$")
_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.(.*)$")


def fused_with(name: str) -> Iterable[str]:
    """Yield the names of the weights that engines fuse with this one."""
    module = name.removesuffix(".weight")
    parent, _, leaf = module.rpartition(".")
    for members in FUSED_GROUPS.values():
        if leaf in members:
            yield from (f"{parent}.{other}.weight" for other in members if other != leaf)


def patterns(found: Iterable[Foreign]) -> tuple[str, ...]:
    """Say in one sentence each what several foreign weights have in common."""
    experts: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    layers: Counter[int] = Counter()
    swapped: Counter[str] = Counter()
    for foreign in found:
        if foreign.holds is None or foreign.holds == foreign.weight:
            continue
        here, there = _EXPERT.match(foreign.weight), _EXPERT.match(foreign.holds)
        if here and there and here[1] == there[1] and here[3] == there[3]:
            experts[here[1]][int(here[2])].add(int(there[2]))
            continue
        here, there = _LAYER.match(foreign.weight), _LAYER.match(foreign.holds)
        if here and there and here[3] == there[3] and here[2] != there[2]:
            layers[int(there[2]) - int(here[2])] += 1
        elif foreign.holds in fused_with(foreign.weight):
            swapped[_NUMBERS.sub("*", foreign.weight.rpartition(".")[0].rpartition(".")[0])] += 1
    said = [
        f"{parent}: experts in other places: "
        + ", ".join(
            f"{here} holds {'/'.join(map(str, sorted(there)))}"
            for here, there in sorted(moved.items())
        )
        for parent, moved in sorted(experts.items())
    ]
    said += [
        f"{count:,} {'weight holds' if count == 1 else 'weights hold'} that of the layer "
        f"{abs(shift)} {'above' if shift > 0 else 'below'}"
        for shift, count in sorted(layers.items())
    ]
    said += [
        f"{module}: {count:,} {'linear holds' if count == 1 else 'linears hold'} what it is fused "
        "with, or rows of it"
        for module, count in sorted(swapped.items())
    ]
    return tuple(said)
