"""A validation document as `validate --format json` writes it, for the renderers to show."""

from typing import Any

import pytest

#: What a hostile checkpoint may call a tensor: an escape sequence, markup, a reversal, a new line.
HOSTILE = "model.layers.8.\x1b[2J<script>alert('x')</script>\u202e\n&\"|`.weight"


def finding(rule: str, name: str, severity: str, message: str, **known: Any) -> dict[str, Any]:
    places = dict.fromkeys(("tensor", "shard", "offset", "count", "observed", "expected"))
    return {"rule": rule, "name": name, "severity": severity, "message": message} | places | known


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def failed() -> dict[str, Any]:
    """A validation with findings of every severity, some of them the same of many tensors."""
    missing = [
        finding(
            "NV101",
            "tensor-missing",
            "error",
            "not in the checkpoint, and the architecture needs it",
            tensor=f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight_scale",
        )
        for layer in (3, 4)
        for expert in range(100)
    ]
    return {
        "schema": "nvfp4check/validate/1",
        "tool": {"name": "nvfp4check", "version": "1.2.3"},
        "checkpoint": {
            "location": "/models/tiny",
            "producer": "modelopt 0.39.0",
            "architecture": "DeepseekV3ForCausalLM",
            "formats": {"nvfp4": 1234, "bf16": 56},
            "bytes": 413_306_995_616,
        },
        "verdict": "fail",
        "findings": [
            *missing,
            finding(
                "NV203",
                "scale-lost",
                "error",
                "812 blocks have scale byte 0x00 over codes that are not zero",
                tensor="model.layers.5.mlp.experts.3.up_proj.weight",
                shard="model-00001-of-00002.safetensors",
                offset=123_456,
                count=812,
                observed=812,
                expected=0,
            ),
            finding("NV004", "tensor-not-indexed", "warning", f"{HOSTILE} is not indexed",
                    tensor=HOSTILE, shard="a b\u202e%<.safetensors"),
            finding("NV110", "tp-misaligned", "info", "a border falls inside a block",
                    tensor="lm_head.weight"),
        ],
        "coverage": {
            "tensors": 2000,
            "tensors_checked": 1990,
            "bytes_checked": 5_000_000,
            "rules": ["NV001", "NV004", "NV101", "NV110", "NV203"],
            "skipped": [{"what": "NV620", "why": "no model card"}],
        },
        "seconds": 12.34,
    }  # fmt: skip


@pytest.fixture
def passed(failed: dict[str, Any]) -> dict[str, Any]:
    coverage = failed["coverage"] | {"skipped": [], "tensors_checked": 2000}
    return failed | {"verdict": "pass", "findings": [], "coverage": coverage}


@pytest.fixture
def incomplete(failed: dict[str, Any]) -> dict[str, Any]:
    return failed | {"verdict": "incomplete", "findings": []}


@pytest.fixture
def rules() -> dict[str, dict[str, Any]]:
    return {
        "NV101": {
            "id": "NV101",
            "name": "tensor-missing",
            "severity": "error",
            "level": "headers",
            "fires_when": "the architecture needs a tensor that no shard holds",
            "why": "Engines leave what is missing uninitialised.",
            "repair": "Export the checkpoint again.",
            "incidents": ["https://example.org/thread/1", "javascript:alert(1)"],
        }
    }
