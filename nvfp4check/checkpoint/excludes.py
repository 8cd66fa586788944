r"""Patterns that leave modules unquantised, as this tool reads them and as engines do.

A pattern means here: the module it names, every module below that, and `*`, `?`, `[…]` as a shell
has them, also across dots; `X.*` covers X itself. `re:…` is a regular expression that the name's
beginning must match (compressed-tensors). A pattern never matches a part of a component.

    vLLM 0.33          equal; else contained anywhere in the name; else fnmatch. One that names an
                       expert stands for all experts of its layer
    SGLang 0.5.10      equal; else `.` -> `\.`, `*` -> `.*`, then re.fullmatch on the name or any
                       one component. One that ends in a projection of latent attention stands for
                       that projection in every layer
    TensorRT-LLM       fnmatchcase on the name and its ancestors; `X.*` covers X; `re:…` must match
                       the whole name, or an ancestor's

The name is that of the module an engine builds: of linears that it fuses, the fused one's, and of
experts the layer's. A pattern for one of the linears then matches only where it is equal.

Patterns are untrusted. Globs take time linear in the name; a regular expression that could
backtrack without bound is not run, and matches nothing.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from enum import StrEnum
from fnmatch import translate
from functools import lru_cache

#: What engines build of linears that they fuse; the first name of attention's own is vLLM's.
_FUSED_ALIKE = {
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
}
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.")
#: Projections of latent attention that SGLang looks for in the last component of any name.
_LATENT = frozenset(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
_WILD = re.compile(r"[*?\[]")
_PLAIN_GLOB = re.compile(r"[\w.*\-]*")
_MAX_PATTERN = 1000
#: With four unbounded repeats a name of 256 characters takes 256**4 / 24 steps at worst.
_MAX_REPEATS = 4
_MAX_NAME = 256


class Reading(StrEnum):
    """Whose reading of a pattern."""

    OURS = "nvfp4check"
    VLLM = "vllm"
    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt-llm"


_FUSED: dict[Reading, dict[str, str]] = {
    Reading.VLLM: _FUSED_ALIKE
    | dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    Reading.SGLANG: _FUSED_ALIKE
    | dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj_with_mqa"),
}


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


@lru_cache(maxsize=4096)
def safe_regex(pattern: str) -> re.Pattern[str] | None:
    """Compile a regular expression, or None where it is invalid or could backtrack without bound.

    Refused are a repeated group, a back reference, and more than four unbounded repeats.
    """
    if len(pattern) > _MAX_PATTERN:
        return None
    bare = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]", "x", re.sub(r"\\[^\d]", "x", pattern))
    bare = re.sub(r"\\d", "x", bare)
    repeats = len(re.findall(r"[*+]|\{\d*,\}", bare))
    if re.search(r"\)(?:[*+]|\{)", bare) or re.search(r"\\\d|\(\?P=", bare):
        return None
    if repeats > _MAX_REPEATS:
        return None
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None


def ancestors(module: str) -> list[str]:
    """List the module's name and the names above it, the longest first."""
    names = [module]
    while (end := names[-1].rfind(".")) > 0:
        names.append(names[-1][:end])
    return names


def _ours(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        compiled = safe_regex(pattern[3:])
        return compiled is not None and len(module) <= _MAX_NAME and bool(compiled.match(module))
    names = ancestors(module)
    if not _WILD.search(pattern):
        return pattern in names
    if pattern.endswith(".*") and _ours(pattern[:-2], module):
        return True
    match = _glob(pattern).match
    return any(match(name) for name in names)


def built_name(module: str, reading: Reading) -> str:
    """Name the module that an engine builds for a stored one."""
    expert = _EXPERT.match(module)
    if expert is not None:
        return expert[1]
    parent, _, leaf = module.rpartition(".")
    fused = _FUSED[reading].get(leaf)
    return module if fused is None else f"{parent}.{fused}"


def _is_equal(pattern: str, module: str) -> bool:
    """Whether a pattern names a linear, fused or not: experts are no linears to engines."""
    return pattern == module and not _EXPERT.match(module)


def _vllm(pattern: str, module: str) -> bool:
    built = built_name(module, Reading.VLLM)
    if _is_equal(pattern, module) or pattern in built or bool(_glob(pattern).match(built)):
        return True
    return "experts" in pattern and built.endswith(".experts") and built in pattern


def _sglang(pattern: str, module: str) -> bool:
    built = built_name(module, Reading.SGLANG)
    leaf = pattern.rpartition(".")[2]
    if _is_equal(pattern, module) or (leaf in _LATENT and leaf in built.rpartition(".")[2]):
        return True
    match = _sglang_match(pattern)
    if match is None:
        return False
    return bool(match(built)) or any(match(part) for part in built.split("."))


def _tensorrt_llm(pattern: str, module: str) -> bool:
    if not pattern.startswith("re:"):
        return _ours(pattern, module)
    compiled = safe_regex(pattern[3:])
    if compiled is None or len(module) > _MAX_NAME:
        return False
    return any(compiled.fullmatch(name) for name in ancestors(module))


@lru_cache(maxsize=4096)
def _sglang_match(pattern: str) -> Callable[[str], object] | None:
    if _PLAIN_GLOB.fullmatch(pattern):  # the same language, matched without backtracking
        return _glob(pattern).match
    compiled = safe_regex(pattern.replace(".", r"\.").replace("*", ".*"))
    if compiled is None:
        return None
    fullmatch = compiled.fullmatch
    return lambda name: len(name) <= _MAX_NAME and fullmatch(name)


_READINGS: dict[Reading, Callable[[str, str], bool]] = {
    Reading.OURS: _ours,
    Reading.VLLM: _vllm,
    Reading.SGLANG: _sglang,
    Reading.TENSORRT_LLM: _tensorrt_llm,
}


def matches(pattern: str, module: str, reading: Reading = Reading.OURS) -> bool:
    """Say whether a pattern covers a module, as `reading` has it."""
    return _READINGS[reading](pattern, module)


class PatternSet:
    """Many patterns at once, in this tool's reading: one look at a module, not one a pattern."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        self._names: set[str] = set()
        self._prefixes: dict[int, set[str]] = {}
        self._others: list[str] = []
        for pattern in self.patterns:
            head, tail = (pattern[:-1], pattern[-1:]) if pattern else ("", "")
            if not pattern.startswith("re:") and not _WILD.search(pattern):
                self._names.add(pattern)
            elif tail == "*" and not pattern.startswith("re:") and not _WILD.search(head):
                self._prefixes.setdefault(len(head), set()).add(head)
                if head.endswith("."):
                    self._names.add(head[:-1])
            else:
                self._others.append(pattern)

    def covers(self, module: str) -> bool:
        """Say whether any of the patterns covers the module."""
        if not self.patterns:
            return False
        if any(module[:length] in heads for length, heads in self._prefixes.items()):
            return True
        if self._names and not self._names.isdisjoint(ancestors(module)):
            return True
        return any(_ours(pattern, module) for pattern in self._others)


class ModuleTable:
    """The modules of one model, indexed so that a pattern's matches are found without a scan."""

    def __init__(self, modules: Iterable[str]) -> None:
        self.modules = sorted(set(modules))
        self._text = "\n" + "\n".join(self.modules) + "\n"
        self._built: dict[Reading, tuple[ModuleTable, dict[str, list[str]]]] = {}
        self._parts: dict[str, set[str]] = {}
        for module in self.modules:
            for part in module.split("."):
                self._parts.setdefault(part, set()).add(module)

    def matched(self, pattern: str, reading: Reading = Reading.OURS) -> frozenset[str]:
        """Find the modules that a pattern covers, as `reading` has it."""
        if "\n" in pattern:
            return frozenset()
        if reading in _FUSED:
            return self._of_engine(pattern, reading)
        if reading is Reading.TENSORRT_LLM and pattern.startswith("re:"):
            return frozenset(m for m in self.modules if _tensorrt_llm(pattern, m))
        return self._below(pattern)

    def _of_engine(self, pattern: str, reading: Reading) -> frozenset[str]:
        """Match the names of what an engine builds, and give the stored modules of each."""
        if reading not in self._built:
            stored: dict[str, list[str]] = {}
            for module in self.modules:
                stored.setdefault(built_name(module, reading), []).append(module)
            self._built[reading] = ModuleTable(stored), stored
        table, stored = self._built[reading]
        if reading is Reading.VLLM:
            built = table._containing(pattern) | table._globbed(pattern)
            if "experts" in pattern:
                built |= {name for name in stored if name.endswith(".experts") and name in pattern}
        else:
            built = table._sglang(pattern)
            leaf = pattern.rpartition(".")[2]
            if leaf in _LATENT:
                parts = [part for part in table._parts if leaf in part]
                built |= {
                    name
                    for part in parts
                    for name in table._parts[part]
                    if name.rpartition(".")[2] == part
                }
        equal = [] if _EXPERT.match(pattern) else self._exactly(pattern)
        return frozenset(equal).union(*(stored[name] for name in built))

    def _below(self, pattern: str) -> frozenset[str]:
        if pattern.startswith("re:"):
            return frozenset(module for module in self.modules if _ours(pattern, module))
        if not _WILD.search(pattern):
            return frozenset((*self._exactly(pattern), *self._starting(pattern + ".")))
        head = pattern[:-1]
        if pattern.endswith("*") and not _WILD.search(head):
            found = self._starting(head)
            return frozenset((*found, *self._exactly(head[:-1])) if head.endswith(".") else found)
        return frozenset(module for module in self.modules if _ours(pattern, module))

    def _sglang(self, pattern: str) -> frozenset[str]:
        match = _sglang_match(pattern)
        if match is None:
            return frozenset()
        found: set[str] = set()
        if "." not in pattern or not _PLAIN_GLOB.fullmatch(pattern) or pattern.startswith("*"):
            for part, modules in self._parts.items():
                if match(part):
                    found |= modules
        if _PLAIN_GLOB.fullmatch(pattern):
            return frozenset(found | self._globbed(pattern))
        return frozenset(found.union(module for module in self.modules if match(module)))

    def _globbed(self, pattern: str) -> frozenset[str]:
        if not _WILD.search(pattern):
            return frozenset(self._exactly(pattern))
        if pattern.endswith("*") and not _WILD.search(pattern[:-1]):
            return frozenset(self._starting(pattern[:-1]))
        match = _glob(pattern).match
        return frozenset(module for module in self.modules if match(module))

    def _exactly(self, name: str) -> list[str]:
        place = bisect_left(self.modules, name)
        return self.modules[place : place + (self.modules[place : place + 1] == [name])]

    def _starting(self, prefix: str) -> list[str]:
        first = bisect_left(self.modules, prefix)
        last = bisect_left(self.modules, prefix + "\U0010ffff")
        return self.modules[first:last]

    def _containing(self, text: str) -> frozenset[str]:
        if not text:
            return frozenset(self.modules)
        found = set()
        place = self._text.find(text)
        while place >= 0:
            start = self._text.rfind("\n", 0, place + 1) + 1
            end = self._text.find("\n", start)
            found.add(self._text[start:end])
            place = self._text.find(text, end)
        return frozenset(found)
