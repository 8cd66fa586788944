import json
import time
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nvfp4check.checkpoint.excludes import (
    ModuleTable,
    PatternSet,
    Reading,
    ancestors,
    built_name,
    matches,
    safe_regex,
)
from nvfp4check.checkpoint.expected import expected_tensors
from nvfp4check.checkpoint.quant_config import from_hf_quant_config

GATE = "model.layers.1.mlp.gate"
GATE_PROJ = "model.layers.1.mlp.gate_proj"
EXPERTS = "model.layers.3.mlp.experts"
EXPERT = f"{EXPERTS}.5.down_proj"
LATENT = "model.layers.0.self_attn.q_b_proj"

#: Pattern, module, and whether nvfp4check, vLLM, SGLang and TensorRT-LLM take it as covered.
READINGS = [
    ("lm_head", "lm_head", True, True, True, True),
    ("lm_head", "model.lm_head", False, True, True, False),
    ("lm_head", "lm_head2", False, True, False, False),
    (GATE, GATE_PROJ, False, True, False, False),
    (GATE, f"{GATE}.inner", True, True, False, True),
    ("model.layers.6*", "model.layers.61.eh_proj", True, True, True, True),
    ("model.layers.1.*", "model.layers.1", True, False, False, True),
    ("model.layers.1.*", "model.layers.11.mlp", False, False, False, False),
    ("*gate*", GATE_PROJ, True, True, True, True),
    ("gate*", GATE_PROJ, False, False, True, False),
    ("*.self_attn.*", "model.layers.0.self_attn.o_proj", True, True, True, True),
    ("*.self_attn.*", "model.layers.0.self_attn", True, False, False, True),
    ("model.layers.?.mlp", "model.layers.3.mlp", True, True, False, True),
    ("model.layers.[0-3].mlp", "model.layers.2.mlp.up_proj", True, False, False, True),
    ("LM_HEAD", "lm_head", False, False, False, False),
    (r"re:.*self_attn\..*", "model.layers.0.self_attn.o_proj", True, False, False, True),
    (r"re:self_attn", "model.layers.0.self_attn.o_proj", False, False, False, False),
    (r"re:.*self_attn", "model.layers.0.self_attn.o_proj", True, False, False, True),
    (r"re:.*mlp\.gate", GATE_PROJ, True, False, False, False),
    # What is fused bears another name in an engine.
    (GATE_PROJ, GATE_PROJ, True, True, True, True),
    ("*.gate_proj", GATE_PROJ, True, False, False, True),
    ("*.gate_up_proj", GATE_PROJ, False, True, True, False),
    ("*.q_proj", "model.layers.0.self_attn.q_proj", True, False, False, True),
    # Experts are one module of their layer.
    (EXPERT, EXPERT, True, True, False, True),
    (EXPERT, f"{EXPERTS}.7.up_proj", False, True, False, False),
    (f"{EXPERTS}*", EXPERT, True, True, True, True),
    (f"{EXPERTS}.*", EXPERT, True, True, False, True),
    (f"{EXPERTS}.5.*", f"{EXPERTS}.7.up_proj", False, True, False, False),
    ("*.mlp.experts.*", EXPERT, True, False, False, True),
    # SGLang's own exemption: a projection of latent attention, in whatever layer.
    (LATENT, "model.layers.1.self_attn.q_b_proj", False, False, True, False),
    (LATENT, "model.layers.0.self_attn.q_b_proj", True, True, True, True),
    ("*.kv_a_proj_with_mqa", "model.layers.4.self_attn.q_a_proj", False, False, True, False),
]


@pytest.mark.parametrize(("pattern", "module", "ours", "vllm", "sglang", "tensorrt"), READINGS)
def test_each_engine_has_its_reading(
    pattern: str, module: str, ours: bool, vllm: bool, sglang: bool, tensorrt: bool
) -> None:
    found = [matches(pattern, module, reading) for reading in Reading]
    assert found == [ours, vllm, sglang, tensorrt]


def test_ancestors_are_the_names_above_by_dots() -> None:
    assert ancestors("a.b.c") == ["a.b.c", "a.b", "a"]
    assert ancestors("a") == ["a"]


names = st.lists(
    st.sampled_from(["a", "ab", "0", "10", "experts", "gate_proj", "q_a_proj", "kv_b_proj"]),
    min_size=1,
    max_size=5,
).map(".".join)
globs = st.lists(
    st.sampled_from(["a", "b", "0", "1", ".", "*", "?", ".*", "[ab]", "experts", "q_a_proj"]),
    max_size=5,
).map("".join)


@given(st.lists(globs, max_size=4), names)
@example(["a.*"], "a")
@example(["*"], "a")
@example([""], "a")
def test_a_set_of_patterns_covers_what_one_of_them_covers(patterns: list[str], name: str) -> None:
    assert PatternSet(patterns).covers(name) == any(matches(p, name) for p in patterns)


@given(globs | names | st.just("re:.*b"), st.lists(names, max_size=8))
@example("a.*", ["a", "a.b", "ab"])
@example("", ["a"])
@example("*.a", ["a.a", "b"])
def test_a_table_of_modules_finds_what_each_reading_matches(
    pattern: str, modules: list[str]
) -> None:
    table = ModuleTable(modules)
    for reading in Reading:
        found = table.matched(pattern, reading)
        assert found == {m for m in modules if matches(pattern, m, reading)}, reading


@given(globs, names)
def test_our_globs_are_the_standard_librarys_on_a_name_and_its_ancestors(
    pattern: str, name: str
) -> None:
    stem = pattern.removesuffix(".*")
    want = any(fnmatchcase(a, pattern) for a in ancestors(name))
    if stem != pattern:
        want = want or matches(stem, name)
    assert matches(pattern, name) == want
    built = built_name(name, Reading.VLLM)
    if built == name and not name.endswith(".experts"):
        assert matches(pattern, name, Reading.VLLM) == (pattern in name or fnmatch(name, pattern))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(?:a*){30}b",
        r"(a)\1*",
        ".*" * 5 + "b",
        "a+" * 40 + "b",
        "x" * 2000,
        "(",
        "[",
        "a{1,99999999999}",
    ],
)
def test_a_regular_expression_that_could_run_for_ever_is_not_run(pattern: str) -> None:
    begin = time.thread_time()
    assert safe_regex(pattern) is None
    assert not matches(f"re:{pattern}", "a" * 200)
    assert not matches(pattern, "a" * 200, Reading.SGLANG)
    assert time.thread_time() - begin < 1


@pytest.mark.parametrize(
    "pattern",
    [
        r".*mlp\.(gate|up|gate_up|down)_proj.*",
        r".*attn.*(fused_wqa_wkv|wq_b|wo_a|wo_b)$",
        r"model\.layers\.\d+\.mlp\.gate$",
        r".*lm_head.*",
        r"[a-z_]+\.[0-9]+",
    ],
)
def test_regular_expressions_of_published_configs_are_run(pattern: str) -> None:
    assert safe_regex(pattern) is not None


def test_a_glob_of_many_stars_takes_no_time() -> None:
    begin = time.thread_time()
    for reading in Reading:
        assert not matches("*a" * 100 + "c", "a" * 5000 + "b", reading)
    assert time.thread_time() - begin < 5


def test_a_line_break_in_a_pattern_matches_no_two_modules() -> None:
    assert ModuleTable(["a", "b"]).matched("a\nb", Reading.VLLM) == frozenset()


def test_the_published_patterns_of_deepseek_v3_1_are_read_alike_by_every_engine(
    goldens: Path,
) -> None:
    configs = goldens / "configs"
    name = "nvidia--DeepSeek-V3.1-NVFP4"
    config = json.loads((configs / f"{name}_config.json").read_text())
    declared = from_hf_quant_config(
        json.loads((configs / f"{name}_hf_quant_config.json").read_text())
    )
    linears = expected_tensors(config, declared).linears
    table = ModuleTable(linears)
    covered: dict[Reading, set[str]] = {reading: set() for reading in Reading}
    for pattern in declared.exclude:
        for reading in Reading:
            found = table.matched(pattern, reading)
            assert found, (pattern, reading)
            covered[reading] |= found
    assert covered[Reading.OURS] == {m for m in linears if declared.excludes(m)}
    assert all(found == covered[Reading.OURS] for found in covered.values())
