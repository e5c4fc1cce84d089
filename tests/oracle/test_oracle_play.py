"""What `mlxgpt play` answers, to OpenAI's own client; and what it shows, beside transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxgpt
from mlxgpt.loaded_model import load
from tests.helpers.play_server import KEY, Served, playing

openai = pytest.importorskip("openai", reason="openai is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def served(tmp_path: Path, trained: Path) -> Iterator[Served]:
    with playing(trained, tmp_path / "mine") as there:
        yield there


def client(served: Served, key: str = KEY) -> Any:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key=key, max_retries=0)


def test_models(served: Served) -> None:
    with client(served) as asks:
        assert [one.id for one in asks.models.list()] == ["mine"]
        assert asks.models.retrieve("mine").owned_by == "mlxgpt"
        with pytest.raises(openai.NotFoundError, match="no such model"):
            asks.models.retrieve("gpt-4")


def test_completions(served: Served) -> None:
    asked: dict[str, Any] = {"model": "mine", "prompt": "to be", "max_tokens": 9, "seed": 4}
    wanted = load(str(served.folder)).generate("to be", max_tokens=9, seed=4, temperature=1.0)
    with client(served) as asks:
        made = asks.completions.create(logprobs=2, **asked)
        assert ["to be" + made.choices[0].text] == wanted.texts
        assert made.choices[0].finish_reason == "length"
        assert made.usage.completion_tokens == 9
        assert len(made.choices[0].logprobs.token_logprobs) == 9
        stream = asks.completions.create(
            stream=True, stream_options={"include_usage": True}, **asked
        )
        parts = list(stream)
        assert "".join(c.text for part in parts for c in part.choices) == made.choices[0].text
        assert parts[-1].usage == made.usage
        echoed = asks.completions.create(logprobs=2, echo=True, **asked | {"max_tokens": 0})
        assert echoed.choices[0].text == "to be"
        assert echoed.choices[0].logprobs.token_logprobs[0] is None
        assert len(echoed.choices[0].logprobs.top_logprobs) == 5
        extra = asks.completions.create(extra_body={"top_k": 1}, n=2, **asked)
        assert extra.choices[0].text == extra.choices[1].text, "greedy, by another server's name"


def test_chats(served: Served) -> None:
    asked: dict[str, Any] = {"model": "mine", "max_tokens": 9, "seed": 4}
    messages = [{"role": "user", "content": "to be"}]
    with client(served) as asks:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            asks.chat.completions.create(messages=messages, **asked)
        template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        (served.folder / "chat_template.jinja").write_text(template)
        made = asks.chat.completions.create(messages=messages, **asked)
        same = asks.completions.create(prompt="to be", **asked)
        assert made.choices[0].message.content == same.choices[0].text
        assert made.choices[0].message.role == "assistant"
        text = same.choices[0].text
        parts = asks.chat.completions.create(messages=messages, stream=True, **asked)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == text
        # Its helper takes only what ends by itself, here before a text of our choice.
        with asks.chat.completions.stream(messages=messages, stop=text[6:], **asked) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == text[: text.index(text[6:])]


def test_refusals(served: Served) -> None:
    with client(served, "another") as asks, pytest.raises(openai.AuthenticationError):
        asks.models.list()
    with client(served) as asks:
        with pytest.raises(openai.BadRequestError, match="is not supported"):
            asks.completions.create(model="mine", prompt="to", suffix="x")
        with pytest.raises(openai.NotFoundError):
            asks.completions.create(model="gpt-4", prompt="to")
        with pytest.raises(openai.APIStatusError) as error:
            asks.completions.create(model="mine", prompt="to" * 5_000_000)
        assert error.value.status_code == 413


def test_the_inside_is_that_of_transformers(tmp_path: Path, trained: Path) -> None:
    """Attention of every head, and the residual stream read by the head at every layer."""
    runs = trained / "runs"
    folder = mlxgpt.export(to="hf", run="done", runs_dir=runs, out=tmp_path / "hf").folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    ours = load("done", runs_dir=runs)
    ids = ours.encode("to be or").tolist()
    with torch.no_grad():
        told = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    look = ours.trace_forward(ids)
    for weights, layer in zip(look.attention, told.attentions, strict=True):
        np.testing.assert_allclose(weights, layer[0].numpy(), atol=1e-5)
    # Their last one has been through ln_f already.
    *streams, last = told.hidden_states
    with torch.no_grad():
        read = [theirs.lm_head(theirs.transformer.ln_f(one))[0] for one in streams]
        read.append(theirs.lm_head(last)[0])
    for position in range(len(ids)):
        for likely, logits in zip(look.logit_lens(position, 3), read, strict=True):
            shares = torch.softmax(logits[position, : ours.tokenizer.vocab_size], dim=-1)
            for id, share in likely:
                assert share == pytest.approx(float(shares[id]), abs=1e-5)
