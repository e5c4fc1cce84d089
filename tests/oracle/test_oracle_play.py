"""The API of `mlxgpt play` with OpenAI's client, and its activations compared with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlxgpt
from mlxgpt.loaded_model import load
from tests.helpers.play_server import KEY, PlayServer, serve_run_copy

openai = pytest.importorskip("openai", reason="openai is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def served(tmp_path: Path, trained: Path) -> Iterator[PlayServer]:
    with serve_run_copy(trained, tmp_path / "mine") as server:
        yield server


def client(served: PlayServer, key: str = KEY) -> Any:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key=key, max_retries=0)


def test_models(served: PlayServer) -> None:
    with client(served) as api:
        assert [entry.id for entry in api.models.list()] == ["mine"]
        assert api.models.retrieve("mine").owned_by == "mlxgpt"
        with pytest.raises(openai.NotFoundError, match="model not found"):
            api.models.retrieve("gpt-4")


def test_completions(served: PlayServer) -> None:
    options: dict[str, Any] = {"model": "mine", "prompt": "to be", "max_tokens": 9, "seed": 4}
    expected = load(str(served.folder)).generate("to be", max_tokens=9, seed=4, temperature=1.0)
    with client(served) as api:
        result = api.completions.create(logprobs=2, **options)
        assert ["to be" + result.choices[0].text] == expected.texts
        assert result.choices[0].finish_reason == "length"
        assert result.usage.completion_tokens == 9
        assert len(result.choices[0].logprobs.token_logprobs) == 9
        stream = api.completions.create(
            stream=True, stream_options={"include_usage": True}, **options
        )
        parts = list(stream)
        assert "".join(c.text for part in parts for c in part.choices) == result.choices[0].text
        assert parts[-1].usage == result.usage
        echoed = api.completions.create(logprobs=2, echo=True, **options | {"max_tokens": 0})
        assert echoed.choices[0].text == "to be"
        assert echoed.choices[0].logprobs.token_logprobs[0] is None
        assert len(echoed.choices[0].logprobs.top_logprobs) == 5
        greedy = api.completions.create(extra_body={"top_k": 1}, n=2, **options)
        assert greedy.choices[0].text == greedy.choices[1].text, "greedy, by another server's name"


def test_chat_completions(served: PlayServer) -> None:
    options: dict[str, Any] = {"model": "mine", "max_tokens": 9, "seed": 4}
    messages = [{"role": "user", "content": "to be"}]
    with client(served) as api:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            api.chat.completions.create(messages=messages, **options)
        template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        (served.folder / "chat_template.jinja").write_text(template)
        result = api.chat.completions.create(messages=messages, **options)
        same = api.completions.create(prompt="to be", **options)
        assert result.choices[0].message.content == same.choices[0].text
        assert result.choices[0].message.role == "assistant"
        text = same.choices[0].text
        parts = api.chat.completions.create(messages=messages, stream=True, **options)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == text
        # The client's helper requires a finished answer, so end it with a stop string.
        with api.chat.completions.stream(messages=messages, stop=text[6:], **options) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == text[: text.index(text[6:])]


def test_errors(served: PlayServer) -> None:
    with client(served, "another") as api, pytest.raises(openai.AuthenticationError):
        api.models.list()
    with client(served) as api:
        with pytest.raises(openai.BadRequestError, match="is not supported"):
            api.completions.create(model="mine", prompt="to", suffix="x")
        with pytest.raises(openai.NotFoundError):
            api.completions.create(model="gpt-4", prompt="to")
        with pytest.raises(openai.APIStatusError) as error:
            api.completions.create(model="mine", prompt="to" * 5_000_000)
        assert error.value.status_code == 413


def test_activations_match_transformers(tmp_path: Path, trained: Path) -> None:
    """Attention of all heads, and the logit lens of all layers."""
    runs = trained / "runs"
    folder = mlxgpt.export(to="hf", run="done", runs_dir=runs, output=tmp_path / "hf").folder
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    model = load("done", runs_dir=runs)
    ids = model.encode("to be or").tolist()
    with torch.no_grad():
        expected = hf_model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    trace = model.trace_forward(ids)
    for weights, layer in zip(trace.attention, expected.attentions, strict=True):
        np.testing.assert_allclose(weights, layer[0].numpy(), atol=1e-5)
    # The last hidden state of transformers is after ln_f.
    *streams, last = expected.hidden_states
    with torch.no_grad():
        layer_logits = [
            hf_model.lm_head(hf_model.transformer.ln_f(hidden))[0] for hidden in streams
        ]
        layer_logits.append(hf_model.lm_head(last)[0])
    for position in range(len(ids)):
        for likely, logits in zip(trace.logit_lens(position, 3), layer_logits, strict=True):
            shares = torch.softmax(logits[position, : model.tokenizer.vocab_size], dim=-1)
            for id, share in likely:
                assert share == pytest.approx(float(shares[id]), abs=1e-5)
