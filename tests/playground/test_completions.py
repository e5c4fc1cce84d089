"""OpenAI's API, as its documentation has it; tests/oracle/ asks with OpenAI's own client."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlxgpt.loaded import Model, load
from mlxgpt.playground.completions import MOST_TEXTS
from tests.playground.serving import Served

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def model(served: Served) -> Model:
    return load(str(served.folder))


def test_the_models(served: Served) -> None:
    told = served.get("/v1/models").json()
    assert (told["object"], [one["id"] for one in told["data"]]) == ("list", ["done"])
    assert served.get("/v1/models/done").json() == told["data"][0]
    assert served.get("/v1/models/other").status_code == 404


def test_a_completion(served: Served, model: Model) -> None:
    told = served.asked(
        COMPLETIONS, model="done", prompt="to be", max_tokens=9, seed=4, temperature=0.7
    )
    (choice,) = told["choices"]
    wanted = model.generate("to be", max_tokens=9, seed=4, temperature=0.7)
    assert ["to be" + choice["text"]] == wanted.texts
    assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("length", 0, None)
    read = len(model.ids("to be"))
    assert told["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": 9,
        "total_tokens": read + 9,
    }
    assert told["object"] == "text_completion"
    assert told["id"].startswith("cmpl-")


def test_several_texts_of_several_prompts(served: Served, model: Model) -> None:
    def texts(**asked: Any) -> list[str]:
        told = served.asked(COMPLETIONS, model="done", max_tokens=8, seed=4, **asked)
        assert [one["index"] for one in told["choices"]] == list(range(len(told["choices"])))
        return [one["text"] for one in told["choices"]]

    found = texts(prompt=["to", "be"], n=2)
    assert found[::2] == [*texts(prompt="to"), *texts(prompt="be")]
    wanted = model.generate(["to", "be"], samples=2, max_tokens=8, seed=4, temperature=1.0)
    assert found == [text[2:] for text in wanted.texts]
    assert texts(prompt=[1, 2]) == texts(prompt=[[1, 2]])
    assert texts(prompt="to", echo=True) == ["to" + texts(prompt="to")[0]]


def test_a_stream_is_the_same_in_pieces(served: Served) -> None:
    asked: dict[str, Any] = {"model": "done", "prompt": "to", "max_tokens": 8, "seed": 4}
    whole = served.asked(COMPLETIONS, **asked)
    parts = served.events(COMPLETIONS, stream=True, **asked)
    assert "".join(one["choices"][0]["text"] for one in parts) == whole["choices"][0]["text"]
    assert [one["choices"][0]["finish_reason"] for one in parts][-2:] == [None, "length"]
    assert len({one["id"] for one in parts}) == 1
    parts = served.events(COMPLETIONS, stream=True, stream_options={"include_usage": True}, **asked)
    assert [one["usage"] for one in parts[:-1]] == [None] * (len(parts) - 1)
    assert (parts[-1]["choices"], parts[-1]["usage"]) == ([], whole["usage"])
    response = served.post(COMPLETIONS, {**asked, "stream": True})
    assert response.text.endswith("data: [DONE]\n\n")


def test_a_stop(served: Served) -> None:
    asked: dict[str, Any] = {"model": "done", "prompt": "to", "max_tokens": 50, "seed": 4}
    text = served.asked(COMPLETIONS, **asked)["choices"][0]["text"]
    stop = text[10:13]
    (choice,) = served.asked(COMPLETIONS, stop=stop, **asked)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_the_logarithms_of_probabilities(served: Served, model: Model) -> None:
    told = served.asked(COMPLETIONS, model="done", prompt="to", max_tokens=4, seed=4, logprobs=3)
    told = told["choices"][0]["logprobs"]
    wanted = list(model.tokens("to", max_tokens=4, seed=4, temperature=1.0, alternatives=3))
    assert told["tokens"] == [one.text for one in wanted]
    assert told["text_offset"] == [0, 1, 2, 3]
    for value, others, one in zip(
        told["token_logprobs"], told["top_logprobs"], wanted, strict=True
    ):
        assert value == pytest.approx(math.log(one.probability or 0), abs=1e-5)
        assert sorted(others.values(), reverse=True) == pytest.approx(
            [math.log(share) for _, share in one.alternatives], abs=1e-5
        )
    told = served.asked(COMPLETIONS, model="done", prompt="to", max_tokens=4, seed=4, logprobs=0)
    assert told["choices"][0]["logprobs"]["top_logprobs"] == [{}] * 4


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "model is no text"),
        ({"model": "other"}, "no such model"),
        ({"model": "done", "max_tokens": 10**6}, "max_tokens"),
        ({"model": "done", "n": MOST_TEXTS + 1}, "n cannot"),
        ({"model": "done", "n": 9, "prompt": ["a", "b"]}, "too many texts"),
        ({"model": "done", "prompt": {}}, "prompt cannot"),
        ({"model": "done", "prompt": "Ж"}, "never seen"),
        ({"model": "done", "suffix": "x"}, "suffix is not known"),
        ({"model": "done", "presence_penalty": 1}, "repetition_penalty"),
        ({"model": "done", "stop": [1]}, "stop cannot"),
        ({"model": "done", "stream": 1}, "stream is neither"),
        ({"model": "done", "logprobs": 99}, "logprobs"),
    ],
)
def test_what_is_not_here_is_refused(served: Served, asked: dict[str, Any], why: str) -> None:
    for stream in ({}, {"stream": True}):
        assert why in served.refused(COMPLETIONS, **(stream | asked))


def test_no_chat_without_a_template(served: Served) -> None:
    said = served.refused(
        "/v1/chat/completions", model="done", messages=[{"role": "user", "content": "to"}]
    )
    assert "no chat template" in said
    assert "/v1/completions" in said


def test_a_chat(own: Served) -> None:
    (own.folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    )
    messages = [{"role": "system", "content": "or"}, {"role": "user", "content": "not to"}]
    asked: dict[str, Any] = {"model": "mine", "max_tokens": 8, "seed": 4}
    told = own.asked(
        "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=2, **asked
    )
    (choice,) = told["choices"]
    (wanted,) = own.asked(COMPLETIONS, prompt="or\nnot to\n", **asked)["choices"]
    assert choice["message"]["content"] == wanted["text"]
    assert (choice["message"]["role"], told["object"]) == ("assistant", "chat.completion")
    assert [len(one["top_logprobs"]) for one in choice["logprobs"]["content"]] == [2] * 8
    parts = own.events("/v1/chat/completions", messages=messages, stream=True, **asked)
    deltas = [one["choices"][0]["delta"] for one in parts]
    assert "".join(one.get("content", "") for one in deltas) == wanted["text"]
    assert parts[0]["object"] == "chat.completion.chunk"
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    for wrong in ([], "a", [{"role": "king", "content": "to"}], [{"role": "user"}], [7]):
        assert own.refused("/v1/chat/completions", messages=wrong, **asked)


def test_line_ends_of_a_request_are_normalized(served: Served) -> None:
    asked: dict[str, Any] = {"model": "done", "max_tokens": 40, "seed": 4}
    plain = served.asked(COMPLETIONS, prompt="to\nbe", stop="\n", **asked)
    for prompt, stop in (("to\r\nbe", "\r\n"), ("\ufeffto\rbe", "\r")):
        other = served.asked(COMPLETIONS, prompt=prompt, stop=stop, **asked)
        assert (other["choices"], other["usage"]) == (plain["choices"], plain["usage"])
