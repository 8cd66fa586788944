"""Hostile checkpoints for fuzzing: a small sound one, and hypothesis strategies that damage it.

A case is a set of files, relative name to content. Most are the sound checkpoint with edits in one
place: a value of a JSON document replaced by any JSON value, a key renamed or repeated, bytes of a
header turned, a card rewritten. Edits say where by a number that is taken modulo what there is, so
that hypothesis can shrink them.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from nvfp4check.checkpoint.index import INDEX_FILE
from nvfp4check.checkpoint.quant_config import CONFIG, HF_QUANT_CONFIG
from nvfp4check.checkpoint.synth import synthesize
from nvfp4check.checkpoint.synth_config import SynthFormat, make_config
from nvfp4check.checkpoint.synth_values import Values
from nvfp4check.checkpoint.writing import frame_header
from nvfp4ref.conventions import Convention

Files = dict[str, bytes]

CARD = "README.md"
_TINY: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 64,
    "tie_word_embeddings": False, "attention_bias": False,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32,
        "beta_slow": 1, "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
}  # fmt: skip
_COMPRESSED_TENSORS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "group"},
            "input_activations": {"num_bits": 4, "type": "float", "dynamic": "local"},
        }
    },
}
_CARD_TEXT = """---
license: mit
base_model: [deepseek-ai/DeepSeek-V3.1]
tags: [nvidia, ModelOpt, DeepSeek-V3.1, quantized, FP4]
---
# Model Overview
The NVIDIA DeepSeek-V3.1-NVFP4 model is the quantized version, quantized with ModelOpt v0.39.0.
**Architecture Type:** Transformers **Network Architecture:** DeepSeek V3
Only the weights and activations of the linear operators within transformer blocks are quantized.
This reduces the size by approximately 1.6x. Sampling: temperature 0.6.

| Precision | MMLU Pro | AIME 2024 |
| --- | --- | --- |
| FP8 | 85 | 90 |
| FP4 | 84 | 89.5 |
"""

#: Numbers and texts at which readers stumble.
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 15, 16, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**40, 0.5,
    -0.0, 1e308, float("inf"), float("nan"), "", "0", "\x00", "\x1b[2J", "\u202e", "\ud800", "..",
    "../x", "/etc/passwd", "C:\\x", "a" * 300, "*", "re:(a+)+$", "re:[", "re:", "model.layers.*",
    [], {}, [[]], [None], {"": None}, "NVFP4", "FP8", "U8", "F8_E4M3", "BF16", "F4",
)  # fmt: skip


@cache
def sound() -> Mapping[str, bytes]:
    """Make the sound checkpoint: two layers, one expert, one layer of multi-token prediction."""
    return {**_synthetic(SynthFormat.NVFP4), CARD: _CARD_TEXT.encode()}


@cache
def sound_base() -> Mapping[str, bytes]:
    """Make what the sound checkpoint was quantised from."""
    return _synthetic(SynthFormat.FP8)


def _synthetic(format: SynthFormat) -> dict[str, bytes]:
    made = make_config(_TINY, None, format=format)
    with tempfile.TemporaryDirectory(prefix="nvfp4check-fuzz-") as directory:
        synthesize(
            made.config,
            made.hf_quant_config,
            made.quantization,
            directory,
            2,
            values=Values(0, Convention.MODELOPT),
            generation_config=made.generation_config,
        )
        return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def _shard() -> str:
    """Name the shard with the most quantised weights: the largest header."""
    shards = [name for name in sound() if name.endswith(".safetensors")]
    return max(shards, key=lambda name: sound()[name][:8][::-1])


# Values

texts = st.text(max_size=20) | st.sampled_from([odd for odd in _ODD if isinstance(odd, str)])
json_values = st.sampled_from(_ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
_places = st.integers(0, 10**6)
_edits = st.lists(
    st.tuples(_places, st.sampled_from(("replace", "drop", "rename", "copy")), json_values),
    min_size=1,
    max_size=4,
)


def _nodes(document: Any) -> Iterator[tuple[Any, Any]]:
    """Walk over the containers of a document, with each key or position in them."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield document, key
        if isinstance(value, dict | list):
            yield from _nodes(value)


def edit(document: Any, edits: list[tuple[int, str, Any]]) -> Any:
    """Apply edits to a copy of a JSON document."""
    document = json.loads(json.dumps(document))
    for place, how, drawn in edits:
        value = copy.deepcopy(drawn)  # a later edit may change it
        nodes = list(_nodes(document))
        if not nodes:
            return value
        container, key = nodes[place % len(nodes)]
        if how == "replace" or isinstance(container, list):
            container[key] = value
        elif how == "drop":
            del container[key]
        elif how == "rename":
            container[value if isinstance(value, str) else str(value)] = container.pop(key)
        else:
            container[f"{key}{value if isinstance(value, str) else ''}"] = container[key]
    return document


def _dump(document: Any) -> bytes:
    # As Python's json writes it: NaN and lone surrogates too.
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _replaced(name: str, content: bytes) -> Files:
    return {**sound(), name: content}


# Files


def edited_json(data: bytes) -> st.SearchStrategy[bytes]:
    """Edit a JSON document."""
    document = json.loads(data)
    return _edits.map(lambda edits: _dump(edit(document, edits)))


def turned_bytes(data: bytes, limit: int | None = None) -> st.SearchStrategy[bytes]:
    """Turn a few bytes, of the first `limit`."""
    return _turns.map(lambda turns: _turned(data, turns, limit))


def cut_bytes(data: bytes) -> st.SearchStrategy[bytes]:
    """Cut a file short."""
    return _places.map(lambda place: data[: place % (len(data) + 1)])


def edited_header(data: bytes) -> st.SearchStrategy[bytes]:
    """Edit the header of a safetensors file."""
    document, tensors = _split(data)
    return _edits.map(lambda edits: frame_header(_dump(edit(document, edits))) + tensors)


def _edited_json(name: str) -> st.SearchStrategy[Files]:
    return edited_json(sound()[name]).map(lambda data: _replaced(name, data))


def _turned(data: bytes, turns: list[tuple[int, int]], limit: int | None = None) -> bytes:
    """Turn bytes: each turn says where, modulo the length, and what is put there."""
    turned = bytearray(data)
    for place, byte in turns:
        if turned:
            turned[place % min(len(turned), limit or len(turned))] = byte
    return bytes(turned)


_turns = st.lists(st.tuples(_places, st.integers(0, 255)), min_size=1, max_size=8)


def _turned_file(name: str, limit: int | None = None) -> st.SearchStrategy[Files]:
    return turned_bytes(sound()[name], limit).map(lambda data: _replaced(name, data))


def _cut_file(name: str) -> st.SearchStrategy[Files]:
    return cut_bytes(sound()[name]).map(lambda data: _replaced(name, data))


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _headers() -> st.SearchStrategy[Files]:
    name = _shard()
    edited = edited_header(sound()[name]).map(lambda data: _replaced(name, data))
    lengths = st.integers(0, 2**64 - 1) | st.integers(0, 10**5)
    length = lengths.map(lambda n: _replaced(name, n.to_bytes(8, "little") + sound()[name][8:]))
    header_bytes = 8 + int.from_bytes(sound()[name][:8], "little")
    anything = st.binary(max_size=200).map(lambda raw: _replaced(name, frame_header(raw)))
    return edited | _turned_file(name, header_bytes) | _cut_file(name) | length | anything


def _names() -> st.SearchStrategy[Files]:
    """Rename tensors in header and index alike, so that the rules meet the names."""
    name = _shard()
    document, data = _split(sound()[name])
    tensors = [key for key in document if key != "__metadata__"]
    parts = st.sampled_from(
        ("model", "layers", "0", "1", "61", "experts", "mlp", "self_attn", "weight", "gate_proj",
         "weight_scale", "weight_scale_2", "input_scale", "weight_packed", "weight_global_scale",
         "weight_scale_inv", "k_scale", "bias", "99999999999999999999", "-1", "", "٣", "\x1b[2J")
    ) | texts  # fmt: skip
    new_names = st.lists(parts, min_size=1, max_size=7).map(".".join)

    def renamed(pairs: list[tuple[int, str]]) -> Files:
        mapping = {tensors[place % len(tensors)]: new for place, new in pairs}
        header = {mapping.get(key, key): value for key, value in document.items()}
        index = json.loads(sound()[INDEX_FILE])
        index["weight_map"] = {
            mapping.get(key, key): value for key, value in index["weight_map"].items()
        }
        raw = json.dumps(header).encode("utf-8", "surrogatepass")
        return {**sound(), name: frame_header(raw) + data, INDEX_FILE: _dump(index)}

    return st.lists(st.tuples(_places, new_names), min_size=1, max_size=6).map(renamed)


def _quantisations() -> st.SearchStrategy[Files]:
    config = json.loads(sound()[CONFIG])
    hf = json.loads(sound()[HF_QUANT_CONFIG])
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    modelopt = {"quant_method": "modelopt", **hf["quantization"]}
    choices = st.sampled_from((_COMPRESSED_TENSORS, fp8, modelopt))

    def built(value: tuple[dict[str, Any], list[tuple[int, str, Any]], bool]) -> Files:
        declared, edits, beside = value
        files = _replaced(CONFIG, _dump({**config, "quantization_config": edit(declared, edits)}))
        if not beside:
            files.pop(HF_QUANT_CONFIG)
        return files

    return st.tuples(choices, _edits, st.booleans()).map(built)


def _patterns() -> st.SearchStrategy[Files]:
    hf = json.loads(sound()[HF_QUANT_CONFIG])
    symbols = st.text("*?[]!.\\()|+^${}<=>amodel.layers0129re:-", max_size=40)

    def built(patterns: list[str]) -> Files:
        document = edit(hf, [])
        document["quantization"]["exclude_modules"] = patterns
        return _replaced(HF_QUANT_CONFIG, _dump(document))

    return st.lists(symbols | texts, max_size=6).map(built)


def _cards() -> st.SearchStrategy[Files]:
    card = sound()[CARD].decode()
    pieces = st.sampled_from(
        ("---\n", "| a | b |\n", "| --- | --- |\n", "| FP8 | 1e999 |\n", "| FP4 | -5 |\n",
         "&a [*a]",
         "approximately 0x", "approximately 99999999999999999999x", "temperature NaN", "[x](y)",
         "license: [", "base_model: {a: b}\n", "tags: 5\n", "\t- ", "!!python/object:os.system x\n",
         "? ", "<<: *a\n", "|" * 50, "v0.39.0", "1.6x", "2001-01-01\n", "0o7: 1\n", "\x85")
    ) | texts | st.text(max_size=60)  # fmt: skip

    def inserted(places: list[tuple[int, str]]) -> Files:
        text = card
        for place, piece in places:
            at = place % (len(text) + 1)
            text = text[:at] + piece + text[at:]
        return _replaced(CARD, text.encode("utf-8", "surrogatepass"))

    free = st.lists(pieces, max_size=30).map(
        lambda parts: _replaced(CARD, "".join(parts).encode("utf-8", "surrogatepass"))
    )
    fronted = st.lists(pieces, max_size=12).map(
        lambda parts: _replaced(
            CARD, ("---\n" + "".join(parts) + "\n---\n" + card).encode("utf-8", "surrogatepass")
        )
    )
    return (
        st.lists(st.tuples(_places, pieces), min_size=1, max_size=6).map(inserted)
        | free
        | fronted
        | _turned_file(CARD)
    )


def _data() -> st.SearchStrategy[Files]:
    """Turn bytes of the tensors themselves: scales NaN, negative, zero; codes of any kind."""
    name = _shard()
    document, data = _split(sound()[name])
    start = len(sound()[name]) - len(data)
    ranges = [
        (start + begin, start + end)
        for begin, end in (
            entry["data_offsets"]
            for entry in document.values()
            if entry.get("dtype") in ("U8", "F8_E4M3", "F32")
        )
    ]

    def turned(turns: list[tuple[int, int, int]]) -> Files:
        places = []
        for tensor, place, byte in turns:
            begin, end = ranges[tensor % len(ranges)]
            places.append((begin + place % (end - begin), byte))
        return _replaced(name, _turned(sound()[name], places))

    bytes_ = st.sampled_from((0, 0x7E, 0x7F, 0x80, 0xFF)) | st.integers(0, 255)
    return st.lists(st.tuples(_places, _places, bytes_), min_size=1, max_size=40).map(turned)


def _files() -> st.SearchStrategy[Files]:
    """Take files away, or add one of any name."""
    names = sorted(sound())
    extra = texts.filter(lambda name: 0 < len(name.encode("utf-8", "replace")) < 200)

    def changed(value: tuple[set[str], list[tuple[str, bytes]]]) -> Files:
        gone, added = value
        files = {name: data for name, data in sound().items() if name not in gone}
        files.update((name.replace("/", "_"), data) for name, data in added)
        return files

    return st.tuples(
        st.sets(st.sampled_from(names), max_size=3),
        st.lists(st.tuples(extra, st.binary(max_size=50)), max_size=2),
    ).map(changed)


#: What is damaged, and the strategy that does it.
TARGETS: dict[str, Callable[[], st.SearchStrategy[Files]]] = {
    "header": _headers,
    "index": lambda: _edited_json(INDEX_FILE) | _turned_file(INDEX_FILE) | _cut_file(INDEX_FILE),
    "config": lambda: _edited_json(CONFIG) | _turned_file(CONFIG) | _cut_file(CONFIG),
    "quantisation": lambda: _edited_json(HF_QUANT_CONFIG) | _quantisations(),
    "patterns": _patterns,
    "names": _names,
    "card": _cards,
    "data": _data,
    "files": _files,
}

#: Targets whose damage only shows when bytes are read.
BYTE_TARGETS = frozenset(("data", "names", "files"))
