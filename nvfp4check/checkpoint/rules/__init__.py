"""The rules of validate, one file a group, and how a run chooses among them."""

from collections.abc import Iterable

from nvfp4check.checkpoint.rules import (
    audit,
    block_scales,
    blocks,
    card,
    codes,
    fp8,
    fusion,
    global_scales,
    kv_cache,
    metadata,
    serving,
    storage,
    stored_form,
    structure,
)
from nvfp4check.checkpoint.rules.base import Rule
from nvfp4check.findings import CheckError

#: The rules of each file.
_GROUPS: tuple[tuple[Rule, ...], ...] = (
    storage.RULES,
    structure.RULES,
    stored_form.RULES,
    blocks.RULES,
    block_scales.RULES,
    global_scales.RULES,
    kv_cache.RULES,
    codes.RULES,
    fusion.RULES,
    metadata.RULES,
    serving.RULES,
    card.RULES,
    audit.RULES,
    fp8.RULES,
)

#: Every rule by its id.
RULES: dict[str, Rule] = {
    rule.id: rule
    for rule in sorted((rule for group in _GROUPS for rule in group), key=lambda r: r.id)
}


def select_rules(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Return the rules that a run applies, in the order of their ids.

    Ids and prefixes of ids are accepted. Nothing selected means everything. Where a rule is both
    selected and ignored, the longer prefix decides, and at equal length the ignoring one.

    Raises:
        CheckError: A prefix fits no rule.
    """
    selected, ignored = tuple(select), tuple(ignore)
    for prefix in (*selected, *ignored):
        if not prefix or not any(identifier.startswith(prefix) for identifier in RULES):
            groups = ", ".join(sorted({identifier[:3] for identifier in RULES}))
            raise CheckError(
                f"no rule begins with {prefix!r}; the groups are {groups} "
                f"(`nvfp4check rules` lists every rule)"
            )

    def length(prefixes: tuple[str, ...], identifier: str) -> int:
        return max((len(p) for p in prefixes if identifier.startswith(p)), default=-1)

    by_default = -1 if selected else 0
    return tuple(
        RULES[identifier]
        for identifier in sorted(RULES)
        if max(length(selected, identifier), by_default) > length(ignored, identifier)
    )
