r"""Patterns that leave modules unquantised, as this tool reads them and as engines do.

A pattern means here: the module it names, every module below that, and `*`, `?`, `[…]` as a shell
has them, also across dots; `X.*` covers X itself. `re:…` is a regular expression that the name's
beginning must match (compressed-tensors). A pattern never matches a part of a component.

    vLLM 0.33          equal; else contained anywhere in the name; else fnmatch
    SGLang 0.5.10      `.` -> `\.`, `*` -> `.*`, then re.fullmatch on the name or any one component
    TensorRT-LLM       fnmatchcase on the name and its ancestors; `X.*` covers X; `re:…`

Patterns are untrusted. Globs take time linear in the name; a regular expression that could
backtrack without bound is not run, and matches nothing.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from enum import StrEnum
from fnmatch import translate
from functools import lru_cache

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


def _vllm(pattern: str, module: str) -> bool:
    return pattern in module or bool(_glob(pattern).match(module))


def _sglang(pattern: str, module: str) -> bool:
    match = _sglang_match(pattern)
    if match is None:
        return False
    return bool(match(module)) or any(match(part) for part in module.split("."))


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
    Reading.TENSORRT_LLM: _ours,
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
        self._parts: dict[str, set[str]] = {}
        for module in self.modules:
            for part in module.split("."):
                self._parts.setdefault(part, set()).add(module)

    def matched(self, pattern: str, reading: Reading = Reading.OURS) -> frozenset[str]:
        """Find the modules that a pattern covers, as `reading` has it."""
        if "\n" in pattern:
            return frozenset()
        if reading is Reading.VLLM:
            return self._containing(pattern) | self._globbed(pattern)
        if reading is Reading.SGLANG:
            return self._sglang(pattern)
        return self._below(pattern)

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
