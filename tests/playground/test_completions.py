"""OpenAI-compatible API, tested against its documentation; tests/oracle uses OpenAI's client."""

from __future__ import annotations

import json
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.evaluation.hellaswag import HellaSwagExample, ending_losses
from mlxgpt.inference import engine
from mlxgpt.loaded_model import LoadedModel, load
from mlxgpt.playground.completions import MAX_WARNINGS, map_char_offsets
from mlxgpt.playground.request_body import MAX_CHOICES
from mlxgpt.storage.loading import load_run_model
from tests.helpers.play_server import PlayServer, serve_run

COMPLETIONS = "/v1/completions"
ECHO: dict[str, Any] = {"echo": True, "max_tokens": 0}


@pytest.fixture(scope="module")
def model(served: PlayServer) -> LoadedModel:
    return load(str(served.folder))


def test_models(served: PlayServer) -> None:
    result = served.get("/v1/models").json()
    assert (result["object"], [item["id"] for item in result["data"]]) == ("list", ["done"])
    assert served.get("/v1/models/done").json() == result["data"][0]
    assert served.get("/v1/models/other").status_code == 404


def test_completion(served: PlayServer, model: LoadedModel) -> None:
    result = served.post_ok(
        COMPLETIONS, model="done", prompt="to be", max_tokens=9, seed=4, temperature=0.7
    )
    (choice,) = result["choices"]
    expected = model.generate("to be", max_tokens=9, seed=4, temperature=0.7)
    assert ["to be" + choice["text"]] == expected.texts
    assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("length", 0, None)
    prompt_tokens = len(model.encode("to be"))
    assert result["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 9,
        "total_tokens": prompt_tokens + 9,
    }
    assert result["object"] == "text_completion"
    assert result["id"].startswith("cmpl-")


def test_several_choices_of_several_prompts(served: PlayServer, model: LoadedModel) -> None:
    def texts(**fields: Any) -> list[str]:
        result = served.post_ok(COMPLETIONS, model="done", max_tokens=8, seed=4, **fields)
        assert [item["index"] for item in result["choices"]] == list(range(len(result["choices"])))
        return [item["text"] for item in result["choices"]]

    sampled = texts(prompt=["to", "be"], n=2)
    assert sampled[::2] == [*texts(prompt="to"), *texts(prompt="be")]
    expected = model.generate(["to", "be"], samples=2, max_tokens=8, seed=4, temperature=1.0)
    assert sampled == [text[2:] for text in expected.texts]
    assert texts(prompt=[1, 2]) == texts(prompt=[[1, 2]])
    assert texts(prompt="to", echo=True) == ["to" + texts(prompt="to")[0]]


def test_stream_equals_the_complete_response(served: PlayServer) -> None:
    fields: dict[str, Any] = {"model": "done", "prompt": "to", "max_tokens": 8, "seed": 4}
    expected = served.post_ok(COMPLETIONS, **fields)
    parts = served.post_stream(COMPLETIONS, stream=True, **fields)
    assert "".join(item["choices"][0]["text"] for item in parts) == expected["choices"][0]["text"]
    assert [item["choices"][0]["finish_reason"] for item in parts][-2:] == [None, "length"]
    assert len({item["id"] for item in parts}) == 1
    parts = served.post_stream(
        COMPLETIONS, stream=True, stream_options={"include_usage": True}, **fields
    )
    assert [item["usage"] for item in parts[:-1]] == [None] * (len(parts) - 1)
    assert (parts[-1]["choices"], parts[-1]["usage"]) == ([], expected["usage"])
    response = served.post(COMPLETIONS, {**fields, "stream": True})
    assert response.text.endswith("data: [DONE]\n\n")


def test_stop_string(served: PlayServer) -> None:
    fields: dict[str, Any] = {"model": "done", "prompt": "to", "max_tokens": 50, "seed": 4}
    text = served.post_ok(COMPLETIONS, **fields)["choices"][0]["text"]
    stop = text[10:13]
    (choice,) = served.post_ok(COMPLETIONS, stop=stop, **fields)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_logprobs(served: PlayServer, model: LoadedModel) -> None:
    result = served.post_ok(
        COMPLETIONS, model="done", prompt="to", max_tokens=4, seed=4, logprobs=3
    )
    result = result["choices"][0]["logprobs"]
    expected = list(model.iter_tokens("to", max_tokens=4, seed=4, temperature=1.0, alternatives=3))
    assert result["tokens"] == [item.text for item in expected]
    assert result["text_offset"] == [0, 1, 2, 3]
    for value, top_values, item in zip(
        result["token_logprobs"], result["top_logprobs"], expected, strict=True
    ):
        assert value == pytest.approx(math.log(item.probability or 0), abs=1e-5)
        shares = [share for _, share in item.alternatives]
        if item.probability not in shares:  # the sampled token is always included
            assert top_values[item.text] == value
            shares.append(item.probability or 0)
        assert sorted(top_values.values(), reverse=True) == pytest.approx(
            [math.log(share) for share in shares], abs=1e-5
        )
    result = served.post_ok(
        COMPLETIONS, model="done", prompt="to", max_tokens=4, seed=4, logprobs=0
    )
    result = result["choices"][0]["logprobs"]
    pairs = zip(result["tokens"], result["token_logprobs"], strict=True)
    assert result["top_logprobs"] == [{token: value} for token, value in pairs]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "model is missing"),
        ({"model": 7}, "model = 7 is not valid"),
        ({"model": "other"}, "model not found"),
        ({"model": "done", "max_tokens": 10**6}, "max_tokens"),
        (
            {"model": "done", "n": MAX_CHOICES + 1},
            "n = 17 is not valid\n→ send an integer from 1 to 16",
        ),
        ({"model": "done", "n": 9, "prompt": ["a", "b"]}, "18 completions"),
        ({"model": "done", "n": 2, "best_of": 3}, "best_of = 3"),
        ({"model": "done", "prompt": {}}, "prompt = {} is not valid"),
        ({"model": "done", "prompt": []}, "prompt = [] is not valid"),
        ({"model": "done", "prompt": ["to", 7]}, 'prompt = ["to", 7] is not valid'),
        ({"model": "done", "prompt": [["to"]]}, 'prompt = [["to"]] is not valid'),
        ({"model": "done", "prompt": [1, -1]}, "prompt = [1, -1] is not valid"),
        ({"model": "done", "prompt": [1, True]}, "prompt = [1, true]"),
        ({"model": "done", "prompt": [10**6]}, "is not in 0 to"),
        ({"model": "done", "prompt": ["to"] * 17}, "up to 16 of these"),
        ({"model": "done", "prompt": "t" * 100_001}, "at most 100,000 characters"),
        ({"model": "done", "temperature": -1}, "temperature = -1"),
        ({"model": "done", "top_p": "1"}, 'top_p = "1" is not valid'),
        ({"model": "done", "prompt": "Ж"}, "does not know these characters"),
        ({"model": "done", "suffix": "x"}, 'suffix = "x" is not supported'),
        ({"model": "done", "presence_penalty": 1}, "repetition_penalty"),
        ({"model": "done", "stop": [1]}, "stop = [1] is not valid"),
        ({"model": "done", "stop": [""]}, 'stop = [""] is not valid'),
        ({"model": "done", "stop": list("abcde")}, "up to 4 of them"),
        ({"model": "done", "stream": 1}, "stream = 1 is not valid\n→ send true or false"),
        ({"model": "done", "stream_options": [1]}, "stream_options = [1] is not valid"),
        ({"model": "done", "logprobs": 99}, "logprobs = 99 is not valid"),
        ({"model": "done", "logprobs": 1, "top_logprobs": 2}, "top_logprobs needs logprobs"),
    ],
)
def test_invalid_fields_are_refused(served: PlayServer, fields: dict[str, Any], why: str) -> None:
    for stream in ({}, {"stream": True}):
        assert why in served.post_error(COMPLETIONS, **(stream | fields))


def test_echo_is_the_prompt_as_it_was_sent(served: PlayServer, tales_server: PlayServer) -> None:
    """The echo of a text omits the prepended end-of-text; that of token ids has all tokens."""
    for prompt in ("Once", "", "hé 日本!\r\n", "a <|endoftext|> b"):
        (choice,) = tales_server.post_ok(COMPLETIONS, model="tales", prompt=prompt, **ECHO)[
            "choices"
        ]
        assert choice["text"] == prompt
        assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    model = load(str(tales_server.folder))
    ids = model.encode("Once").tolist()
    assert ids[0] == model.tokenizer.end_of_text
    (choice,) = tales_server.post_ok(COMPLETIONS, model="tales", prompt=ids, **ECHO)["choices"]
    assert choice["text"] == "<|endoftext|>Once"
    (choice,) = served.post_ok(COMPLETIONS, model="done", prompt="", **ECHO)["choices"]
    assert choice["text"] == "", "without the newline that replaces an empty prompt"


def test_zero_max_tokens_generates_nothing(tales_server: PlayServer) -> None:
    answer = tales_server.post_ok(COMPLETIONS, model="tales", prompt="Once", max_tokens=0)
    assert answer["choices"][0]["text"] == ""
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_of_an_incomplete_character(tales_server: PlayServer) -> None:
    """It is output when it is complete; U+FFFD replaces it if it never is."""
    model = load(str(tales_server.folder))
    partial_ids = model.tokenizer.encode("日")[:1].tolist()
    assert len(model.tokenizer.token_bytes(partial_ids[0])) < 3
    generated = model.generate("", max_tokens=1).texts  # any text
    assert generated
    (choice,) = tales_server.post_ok(COMPLETIONS, model="tales", prompt=partial_ids, **ECHO)[
        "choices"
    ]
    assert choice["text"] == "\ufffd"
    fields: dict[str, Any] = {"model": "tales", "prompt": partial_ids, "max_tokens": 6, "seed": 1}
    (plain,) = tales_server.post_ok(COMPLETIONS, **fields)["choices"]
    (echoed,) = tales_server.post_ok(COMPLETIONS, echo=True, logprobs=2, **fields)["choices"]
    assert echoed["text"] == plain["text"]
    assert echoed["logprobs"]["tokens"][0].startswith("bytes:\\xe6")
    assert echoed["logprobs"]["text_offset"][:2] == [0, 0]


@pytest.mark.parametrize("prompt", ["Once upon", "hé 日本! and then a much longer text", [3, 9, 3]])
def test_logprobs_of_an_echo(tales_server: PlayServer, prompt: str | list[int]) -> None:
    """They match the model's logits for every token but the first."""
    model = load(str(tales_server.folder))
    answer = tales_server.post_ok(COMPLETIONS, model="tales", prompt=prompt, logprobs=3, **ECHO)
    answer = answer["choices"][0]["logprobs"]
    ids = model.encode(prompt).tolist() if isinstance(prompt, str) else prompt
    bos_count = int(isinstance(prompt, str))  # the prepended end-of-text is omitted
    contents = [model.tokenizer.token_bytes(id) for id in ids]
    assert [len(value) for value in answer.values()] == [len(ids) - bos_count] * 4
    assert (answer["token_logprobs"][0], answer["top_logprobs"][0]) == (None, None)
    for n in range(bos_count + 1, len(ids)):
        logprob, top = (
            answer["token_logprobs"][n - bos_count],
            answer["top_logprobs"][n - bos_count],
        )
        expected = logprobs_after(model, ids[:n], len(ids))
        assert logprob == pytest.approx(expected[ids[n]], abs=1e-4)
        assert top[answer["tokens"][n - bos_count]] == logprob
        assert 3 <= len(top) <= 4
        assert sorted(top.values())[-3:] == pytest.approx(sorted(expected)[-3:], abs=1e-4)
        offset = len(b"".join(contents[bos_count:n]).decode(errors="ignore"))
        assert answer["text_offset"][n - bos_count] == offset


def logprobs_after(model: LoadedModel, ids: list[int], length: int) -> np.ndarray:
    """Log-probabilities of the token after `ids` in a text of `length` tokens.

    Windows start half a block apart; the last one ends with the text.
    """
    block = model.run.config.model.block_size
    starts = [0, *sorted(range(max(0, length - 1 - block), 0, -(block // 2)))]
    start = next(start for start in starts if len(ids) <= start + block)
    logits = model.logits(ids[start:])[-1, : model.tokenizer.vocab_size].astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


def test_echo_of_several_choices_and_streamed(tales_server: PlayServer) -> None:
    fields: dict[str, Any] = {
        "model": "tales",
        "prompt": ["Once", "hé 日本"],
        "n": 2,
        "max_tokens": 5,
        "seed": 3,
        "logprobs": 2,
    }
    plain = tales_server.post_ok(COMPLETIONS, **fields)["choices"]
    echoed = tales_server.post_ok(COMPLETIONS, echo=True, **fields)["choices"]
    assert [choice["text"] for choice in echoed] == [
        prompt + choice["text"]
        for prompt, choice in zip(np.repeat(fields["prompt"], 2), plain, strict=True)
    ]
    for n, (choice, plain_choice) in enumerate(zip(echoed, plain, strict=True)):
        length, prompt = len(plain_choice["logprobs"]["tokens"]), fields["prompt"][n // 2]
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert choice["logprobs"][name][-length:] == plain_choice["logprobs"][name]
        shifted = [offset + len(prompt) for offset in plain_choice["logprobs"]["text_offset"]]
        assert choice["logprobs"]["text_offset"][-length:] == shifted
    parts = tales_server.post_stream(COMPLETIONS, echo=True, stream=True, **fields)
    for n, choice in enumerate(echoed):
        own_parts = [part["choices"][0] for part in parts if part["choices"][0]["index"] == n]
        assert "".join(part["text"] for part in own_parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in own_parts for value in part["logprobs"][name]] == values


def test_text_offsets_while_a_stop_string_may_follow(served: PlayServer) -> None:
    fields: dict[str, Any] = {"model": "done", "prompt": "to", "max_tokens": 8, "seed": 4}
    text = served.post_ok(COMPLETIONS, **fields)["choices"][0]["text"]
    (choice,) = served.post_ok(COMPLETIONS, logprobs=0, stop=text[2:5] + "no", **fields)["choices"]
    assert choice["text"] == text
    assert choice["logprobs"]["text_offset"] == list(range(8))


@pytest.mark.parametrize(
    ("normalized", "original", "offsets"),
    [
        ("a\nb", "a\r\nb", [0, 1, 3, 4]),
        ("a\n\nb", "\ufeffa\r\r\nb", [0, 2, 3, 5, 6]),
        ("a\nb", "a\rb", [0, 1, 2, 3]),
        ("é!", "e\u0301!", [0, 1, 3]),
        ("", "\ufeff", [1]),
    ],
)
def test_map_char_offsets(normalized: str, original: str, offsets: list[int]) -> None:
    assert map_char_offsets(normalized, original) == offsets


def test_requests_of_lm_evaluation_harness(tales_server: PlayServer) -> None:
    """Its `local-completions` model sends batches of token ids, samples one token and sums the
    log-probabilities of the ending; the sums match the losses of `mlxgpt eval --hellaswag`.
    """
    run, model, _ = load_run_model(str(tales_server.folder), "best", None)
    examples = [
        HellaSwagExample("Once upon a time", ("3 foxes said", "they slept.", "日本", "then"), 0),
        HellaSwagExample("Then they", ("slept.", "foxes", "said: hé", "upon a time there were"), 3),
    ]
    scored = sorted(
        ending_losses(model, run.tokenizer, examples), key=lambda score: score.example_index
    )
    for example, expected in zip(examples, scored, strict=True):
        context = run.tokenizer.encode(example.context).tolist()
        endings = [run.tokenizer.encode(f" {ending}").tolist() for ending in example.endings]
        block = run.config.model.block_size
        inputs = [(context + ending)[-(block + 1) :] for ending in endings]  # its max_length
        answer = tales_server.post_ok(
            COMPLETIONS,
            model="tales",
            prompt=inputs,
            temperature=0,
            max_tokens=1,
            logprobs=1,
            seed=1234,
            echo=True,
        )
        for choice, ids, ending, loss in zip(
            answer["choices"], inputs, endings, expected.losses, strict=True
        ):
            start = max(1, len(ids) - len(ending))
            logprobs = choice["logprobs"]["token_logprobs"][start:-1]
            top = choice["logprobs"]["top_logprobs"][start:-1]
            assert sum(logprobs) == pytest.approx(-loss, abs=1e-4)
            assert all(
                value <= max(top_values.values())
                for value, top_values in zip(logprobs, top, strict=True)
            )


def test_misspelled_and_unsupported_fields_are_refused(served: PlayServer) -> None:
    for name, value, why in (
        ("temprature", 0.5, "did you mean temperature?"),
        ("Temperature", 0.5, "did you mean temperature?"),
        ("maxTokens", 5, "did you mean max_tokens?"),
        ("top-p", 0.5, "did you mean top_p?"),
        ("stpo", "x", "did you mean stop?"),
        ("logprob", 3, "did you mean logprobs?"),
        (
            "repeat_penalty",
            1.2,
            "repeat_penalty = 1.2 is not supported\n→ use repetition_penalty",
        ),
        ("n_predict", 9, "use max_tokens"),
        ("num_predict", 9, "use max_tokens"),
        ("typical_p", 0.9, "not supported"),
        ("mirostat", 2, "not supported"),
        ("grammar", "root ::= x", "not supported"),
        ("response_format", {"type": "json_object"}, "not supported"),
        ("tools", [{"type": "function"}], "not supported"),
        ("frequency_penalty", 0.5, "use repetition_penalty"),
        ("logit_bias", {"5": 1}, "not supported"),
        ("options", {"temperature": 0}, "not supported"),
        ("min_tokens", 5, "not supported"),
        ("add_special_tokens", False, "not supported"),
        ("messages", [1], "not supported"),
    ):
        message = served.post_error(COMPLETIONS, model="done", prompt="to", **{name: value})
        assert why in message, message
        assert "→" in message


def test_neutral_fields_are_accepted(served: PlayServer) -> None:
    fields: dict[str, Any] = {"model": "done", "prompt": "to", "max_tokens": 4, "seed": 4}
    plain = served.post_ok(COMPLETIONS, **fields)["choices"]
    neutral_fields: dict[str, Any] = {
        "best_of": 1,
        "suffix": None,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
        "stop": "",
        "stream_options": None,
        "repeat_penalty": 1.0,
        "repeat_last_n": 64,
        "typical_p": 1,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "grammar": "",
        "options": {},
        "min_tokens": 0,
        "ignore_eos": False,
        "add_special_tokens": True,
        "temprature": None,
        "messages": [],
        "user": "someone",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "keep_alive": "5m",
        "cache_prompt": True,
    }
    assert served.post_ok(COMPLETIONS, **fields, **neutral_fields)["choices"] == plain
    for name, value in neutral_fields.items():
        assert served.post_ok(COMPLETIONS, **fields | {name: value})["choices"] == plain, name


def test_unknown_fields_are_logged_once(served: PlayServer, notes: list[str]) -> None:
    with serve_run(served.folder) as server:
        for _ in range(2):
            server.post_ok(COMPLETIONS, model="done", max_tokens=1, colour="blue", **{"a\nb": 1})
        server.post_ok(COMPLETIONS, model="done", max_tokens=1, shape="round")
        for n in range(200):
            server.post_ok(COMPLETIONS, model="done", max_tokens=0, **{f"field {n}": 1})
    lines = [line for line in notes if "unknown request field" in line]
    assert lines[:3] == [
        f"ignoring unknown request field {name}" for name in ('"colour"', '"a\\nb"', '"shape"')
    ]
    assert len(lines) == MAX_WARNINGS


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
def test_unpaired_surrogates_are_refused(served: PlayServer, path: str) -> None:
    for body, why in (
        ({"prompt": "ab\ud800c"}, "prompt has an unpaired surrogate, U+D800, at character 3"),
        ({"prompt": ["a", "\udfff"]}, "prompt[1] has an unpaired surrogate, U+DFFF"),
        ({"stop": ["\ud800"]}, "stop[0] has an unpaired surrogate"),
        (
            {"messages": [{"role": "user", "content": "\udc00"}]},
            "messages[0].content has an unpaired",
        ),
        ({"messages": [{"name": {"a\ud800": 1}}]}, "a field name has an unpaired"),
    ):
        content = json.dumps({"model": "done"} | body)  # json.dumps escapes it
        with served.client() as client:
            response = client.post(path, content=content)
        assert response.status_code == 400
        assert why in response.json()["error"]["message"]
    answer = served.post_error(COMPLETIONS, model="done", prompt="\U0001f98a")
    assert "does not know these characters: '\U0001f98a'" in answer, "a complete pair is valid"


def test_nesting_and_number_of_fields_are_limited(served: PlayServer) -> None:
    nested: Any = 1
    for _ in range(100):
        nested = [nested]
    assert "nested too deeply" in served.post_error(COMPLETIONS, model="done", prompt=nested)
    many_fields = {f"field {n}": 1 for n in range(300)}
    assert "301 fields" in served.post_error(COMPLETIONS, model="done", **many_fields)


def test_nonfinite_output_is_an_error(served: PlayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN."""
    fields: dict[str, Any] = {"model": "done", "prompt": "to", "max_tokens": 2, "logprobs": 1}

    def nan_probabilities(logits: mx.array, *_: Any) -> tuple[mx.array, ...]:
        return mx.full((len(logits),), float("nan")), mx.zeros((1, 1), mx.int32), mx.zeros((1, 1))

    monkeypatch.setattr(engine, "top_probabilities", nan_probabilities)
    with serve_run(served.folder) as server:
        assert "not finite" in server.post_error(COMPLETIONS, **fields)
        (event,) = server.post_stream(COMPLETIONS, stream=True, **fields)
        assert "not finite" in event["error"]["message"]
        *_, event = server.post_stream("/api/generate", text="to", max_tokens=2)
        assert "not finite" in event["error"]["message"]


def test_chat_needs_a_template(served: PlayServer) -> None:
    message = served.post_error(
        "/v1/chat/completions", model="done", messages=[{"role": "user", "content": "to"}]
    )
    assert "no chat template" in message
    assert "/v1/completions" in message


def test_chat(own_server: PlayServer) -> None:
    (own_server.folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    )
    messages = [{"role": "system", "content": "or"}, {"role": "user", "content": "not to"}]
    fields: dict[str, Any] = {"model": "mine", "max_tokens": 8, "seed": 4}
    result = own_server.post_ok(
        "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=2, **fields
    )
    (choice,) = result["choices"]
    (expected,) = own_server.post_ok(COMPLETIONS, prompt="or\nnot to\n", **fields)["choices"]
    assert choice["message"]["content"] == expected["text"]
    assert (choice["message"]["role"], result["object"]) == ("assistant", "chat.completion")
    assert [len(item["top_logprobs"]) for item in choice["logprobs"]["content"]] == [2] * 8
    parts = own_server.post_stream("/v1/chat/completions", messages=messages, stream=True, **fields)
    deltas = [item["choices"][0]["delta"] for item in parts]
    assert "".join(item.get("content", "") for item in deltas) == expected["text"]
    assert parts[0]["object"] == "chat.completion.chunk"
    assert parts[-1]["choices"][0]["finish_reason"] == "length"

    for invalid, why in (
        ([], "messages = [] is not valid"),
        ("a", 'messages = "a" is not valid'),
        ([{"role": "king", "content": "to"}], 'messages[0].role = "king" is not valid'),
        ([{"role": "user"}], "messages[0].content is missing"),
        ([messages[0], {"role": "user", "content": [{"type": "image_url"}]}], "text-only content"),
        ([7], "messages[0] = 7 is not valid"),
        ([messages[0]] * 201, "1 to 200 messages"),
        ([messages[0] | {"content": "t" * 60_000}] * 2, "the messages are too long"),
    ):
        assert why in own_server.post_error("/v1/chat/completions", messages=invalid, **fields)
    assert "messages is missing" in own_server.post_error("/v1/chat/completions", **fields)
    for name, value in (("echo", True), ("prompt", "to"), ("max_tokens", 0)):
        message = own_server.post_error(
            "/v1/chat/completions", messages=messages, **fields | {name: value}
        )
        assert name in message


def test_line_endings_of_a_request_are_normalized(served: PlayServer) -> None:
    fields: dict[str, Any] = {"model": "done", "max_tokens": 40, "seed": 4}
    expected = served.post_ok(COMPLETIONS, prompt="to\nbe", stop="\n", **fields)
    for prompt, stop in (("to\r\nbe", "\r\n"), ("\ufeffto\rbe", "\r")):
        actual = served.post_ok(COMPLETIONS, prompt=prompt, stop=stop, **fields)
        assert (actual["choices"], actual["usage"]) == (expected["choices"], expected["usage"])
