"""What SGLang, llama.cpp's server and trtllm-serve answer, and what of it can be used.

SGLang 0.5.23 and llama.cpp were run on a CPU and their answers recorded. trtllm-serve needs a GPU:
its answers are written here as its source makes them (tensorrt_llm/serve, openai_protocol.py at
0076e939 and postprocess_handlers.py at 01bf1923).
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE, WordLevel

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, agree
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import ForwardOptions
from nvfp4check.forward.streaming import run_forward
from nvfp4check.logprobs.capture import CaptureOptions, capture_logprobs, ids_by_text
from nvfp4check.logprobs.client import Client
from nvfp4check.logprobs.dialects import (
    LlamaCpp,
    OpenAi,
    Server,
    Sglang,
    Stepwise,
    detect,
    read_answers,
)
from nvfp4check.tokens import Prompt

GOLDENS = Path(__file__).parents[2] / "goldens"


def recorded(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((GOLDENS / "servers" / name).read_text())
    return document


SGLANG = recorded("sglang-0.5.23.json")
LLAMA = recorded("llama.cpp-xllamacpp-2026.10.json")


def no_text(text: str) -> int | None:
    return None


def bodies(*documents: Any) -> list[dict[str, bytes]]:
    return [{"body": json.dumps(document).encode()} for document in documents]


# SGLang


def sglang_run(scripted: Any, out: Path) -> Run:
    prompts = [
        Prompt(id=entry["id"], tokens=tuple(entry["request"]["input_ids"]))
        for entry in SGLANG["exchange"]
    ]
    scripted.answer(*bodies(SGLANG["models"], *(entry["answer"] for entry in SGLANG["exchange"])))
    options = CaptureOptions(model="tiny")
    result = capture_logprobs(Client(base_url=scripted.url), prompts, out, options)
    assert result.server is Server.SGLANG
    return result.run


def test_what_sglang_served_agrees_with_the_reference(scripted: Any, tmp_path: Path) -> None:
    run = sglang_run(scripted, tmp_path / "served")
    prompts = [Prompt(id=p, tokens=tuple(run.tokens(p).tolist())) for p in run.prompts]
    bf16 = GOLDENS / "tiny-deepseek-v3" / "bf16"
    reference = run_forward(bf16, prompts, tmp_path / "reference", ForwardOptions()).run

    found = agree(reference, run, AgreeOptions(max_kl=1e-6)).logits

    assert found is not None
    assert found.positions == 46
    assert found.mean("top1") == 1
    assert found.kl.mean < 1e-6
    before, after = found.perplexities
    assert after == pytest.approx(before, rel=1e-6)


def test_sglang_is_asked_as_it_was_when_recorded() -> None:
    dialect = Sglang(model="tiny", top=20, token_of_text=no_text)

    for entry in (*SGLANG["exchange"], SGLANG["one_token"]):
        tokens = entry["request"]["input_ids"]
        assert dialect.requests(tokens) == [("/generate", entry["request"])]


def test_sglang_s_prompt_of_one_token_has_the_row_of_its_answer() -> None:
    dialect = Sglang(model="tiny", top=20, token_of_text=no_text)
    entry = SGLANG["one_token"]

    (row,) = dialect.read(entry["request"]["input_ids"], [entry["answer"]])

    best = entry["answer"]["meta_info"]["output_top_logprobs"][0]
    assert row == {token: value for value, token, _ in best}


# llama.cpp


def test_llama_cpp_s_rows_are_its_ids_and_numbers() -> None:
    dialect = LlamaCpp(model="tiny", top=5, token_of_text=no_text)

    for entry in LLAMA["exchange"]:
        rows = dialect.read(entry["tokens"], entry["answers"])

        assert len(rows) == len(entry["tokens"])
        for row, answer in zip(rows, entry["answers"], strict=True):
            (generated,) = answer["choices"][0]["logprobs"]["content"]
            assert row == {e["id"]: e["logprob"] for e in generated["top_logprobs"]}
            assert len(row) == 5


def test_llama_cpp_is_asked_as_it_was_when_recorded() -> None:
    dialect = LlamaCpp(model="tiny", top=5, token_of_text=no_text)

    for entry in LLAMA["exchange"]:
        asked = dialect.requests(entry["tokens"])
        assert asked == [("/v1/completions", request) for request in entry["requests"]]


def test_llama_cpp_is_silent_amid_a_character_unless_a_letter_is_forced() -> None:
    silent, forced = LLAMA["amid_a_character"]
    dialect = LlamaCpp(model="tiny", top=3, token_of_text=no_text)

    with pytest.raises(ValueError, match="gives no log-probabilities"):
        dialect.read((5,), [silent["answer"]])
    (row,) = dialect.read((5,), [forced["answer"]])
    assert next(iter(row)) == 172  # the byte 0xEE, the first of three of a character
    assert forced["request"]["logit_bias"] == dialect.requests((5,))[0][1]["logit_bias"]


def test_a_probability_of_zero_as_llama_cpp_writes_it_is_kept() -> None:
    lowest = -3.4028234663852886e38  # its logarithm of 0, for JSON has no infinity
    top = [{"id": 1, "logprob": 0.0}, {"id": 2, "logprob": lowest}]
    answer = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}

    rows = LlamaCpp(model="m", top=2, token_of_text=no_text).read((5,), [answer])

    assert rows == [{1: 0.0, 2: lowest}]


# trtllm-serve

TEXTS = {"the": 1, " cat": 2, "�": None, " sat": 4}


def trtllm(entries: list[tuple[str, float]]) -> dict[str, Any]:
    """An answer as create_completion_logprobs makes it: a dictionary by text, best first."""
    text, value = entries[0]
    return {
        "object": "text_completion",
        "choices": [
            {
                "index": 0,
                "text": text,
                "token_ids": None,
                "logprobs": {
                    "text_offset": [0],
                    "token_logprobs": [max(value, -9999.0)],
                    "tokens": [text],
                    "top_logprobs": [{t: max(v, -9999.0) for t, v in entries}],
                },
                "context_logits": None,
                "finish_reason": "length",
            }
        ],
        "prompt_token_ids": None,
    }


def test_a_vocabulary_with_holes_gives_each_text_its_token_and_holes_none() -> None:
    tokenizer = Tokenizer(WordLevel({"the": 0, "cat": 5, "sat": 900}, unk_token="the"))
    tokenizer.add_tokens(["odd"])
    tokenizer.add_special_tokens(["<s>"])

    ids = ids_by_text(tokenizer)

    added = {word: tokenizer.token_to_id(word) for word in ("odd", "<s>")}
    assert ids == {"the": 0, "cat": 5, "sat": 900, **added}


def test_a_text_of_several_tokens_is_that_of_none() -> None:
    tokenizer = Tokenizer(BPE({"a": 0, "Ġa": 1, "é": 7, "¼": 8}, []))  # two bytes, no characters
    tokenizer.decoder = ByteLevel()

    assert ids_by_text(tokenizer) == {"a": 0, " a": 1, "\ufffd": None}


def stepwise() -> Stepwise:
    return Stepwise(model="m", top=3, token_of_text=TEXTS.get)


def test_trtllm_s_texts_become_ids_and_its_lowest_value_is_kept() -> None:
    answer = trtllm([("the", -0.1), (" cat", -3.0), (" sat", float("-inf"))])

    assert stepwise().read((7,), [answer]) == [{1: -0.1, 2: -3.0, 4: -9999.0}]


def test_trtllm_s_requests_hold_only_fields_that_it_knows() -> None:
    # CompletionRequest forbids others.
    known = {"model", "prompt", "max_tokens", "temperature", "logprobs"}

    for path, body in stepwise().requests((7, 8)):
        assert (path, set(body)) == ("/v1/completions", known)


def test_a_lesser_token_without_a_text_of_its_own_is_left_out() -> None:
    answer = trtllm([("the", -0.1), ("�", -3.0)])

    assert stepwise().read((7,), [answer]) == [{1: -0.1}]


def test_a_best_token_without_a_text_of_its_own_is_refused() -> None:
    answer = trtllm([("�", -0.1), ("the", -3.0)])

    with pytest.raises(ValueError, match="the best token is given as the text '�'"):
        stepwise().read((7,), [answer])


def test_a_best_token_that_a_lesser_one_with_its_text_has_overwritten_is_noticed() -> None:
    answer = trtllm([("�", -0.2), (" cat", -2.0), ("�", -5.0)])

    with pytest.raises(ValueError, match="the best token, with the text '�', is not among"):
        stepwise().read((7,), [answer])


def test_a_backend_that_gives_the_sampled_token_alone_is_named() -> None:
    answer = trtllm([("the", -0.1)])
    answer["choices"][0]["logprobs"]["top_logprobs"] = []

    with pytest.raises(CheckError, match=r"'p': .* not of the best 3; does it allow so many"):
        read_answers(stepwise(), (7,), [answer], "prompt 'p'")


def test_a_server_that_takes_log_probabilities_for_unused_is_named() -> None:
    # transformers serve 5.23: logprobs is among the fields it does not use, and null in its answer.
    answer = {"choices": [{"text": "a", "index": 0, "logprobs": None, "finish_reason": "length"}]}

    with pytest.raises(CheckError, match="try --server stepwise"):
        read_answers(OpenAi(model="m", top=3, token_of_text=no_text), (7,), [answer], "prompt 'p'")
    with pytest.raises(CheckError, match="gives no log-probabilities; start it with them"):
        read_answers(stepwise(), (7,), [answer], "prompt 'p'")


# What a server is


@pytest.mark.parametrize(
    ("owner", "server"),
    [
        ("vllm", Server.VLLM),
        ("sglang", Server.SGLANG),
        ("tensorrt_llm", Server.TRTLLM),
        ("llamacpp", Server.LLAMACPP),
        ("somebody", Server.OPENAI),
    ],
)
def test_a_server_is_known_by_the_owner_of_its_models(
    scripted: Any, owner: str, server: Server
) -> None:
    scripted.answer(*bodies({"object": "list", "data": [{"id": "m", "owned_by": owner}]}))

    assert detect(Client(base_url=scripted.url), "m") is server


@pytest.mark.parametrize("name", ["m", "m:adapter", "also", "/path/m"])
def test_a_model_is_found_by_each_of_its_names(scripted: Any, name: str) -> None:
    entry = {"id": "m", "root": "/path/m", "aliases": ["also"], "owned_by": "llamacpp"}
    scripted.answer(*bodies({"data": [entry]}))

    assert detect(Client(base_url=scripted.url), name) is Server.LLAMACPP


def test_a_model_that_is_not_served_is_an_error_that_names_those_that_are(scripted: Any) -> None:
    scripted.answer(*bodies(SGLANG["models"]))

    with pytest.raises(CheckError, match="serves tiny, not tinny; give one of these"):
        detect(Client(base_url=scripted.url), "tinny")


@pytest.mark.parametrize(
    "document", [[], {}, {"data": None}, {"data": [3]}, {"data": []}, {"data": 5}]
)
def test_a_list_of_no_models_says_nothing(scripted: Any, document: Any) -> None:
    scripted.answer(*bodies(document))

    assert detect(Client(base_url=scripted.url), "m") is Server.OPENAI


def test_a_model_described_in_another_form_is_found_by_its_id(scripted: Any) -> None:
    scripted.answer(*bodies({"data": [{"id": "m", "root": ["x"], "aliases": [{}]}]}))

    assert detect(Client(base_url=scripted.url), "m") is Server.OPENAI
