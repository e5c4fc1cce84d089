"""Models that were fine-tuned on conversations answer and stop in other runtimes as in ours."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.data.chat_template import encode_chat
from mlxgpt.loaded_model import load
from tests.helpers.training_runs import QWEN3_PARTS, train_fox_model
from tests.oracle.test_oracle_gguf import LlamaServer

transformers = pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="the extra `oracle` is not installed")

QUESTIONS = {"Who sings?": "The lark sings.", "Who runs?": "A fox, and a hare.", "Why?": "Hunger."}
RECIPES: dict[str, dict[str, Any]] = {
    "classic": {"tied": True},
    "modern": {**QWEN3_PARTS, "bias": False},
}


class ChatRun:
    """A run that has memorized the answers."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        train_fox_model(folder, config)
        rows = [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
            for question, answer in QUESTIONS.items()
        ]
        (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        other = {"prompt": "a", "completion": "b"}  # so that all questions are for training
        (folder / "val.jsonl").write_text(json.dumps(other) + "\n")
        api.train(
            config=config,
            init_from="fox",
            run="chat",
            source=folder / "talk.jsonl",
            val_source=folder / "val.jsonl",
            template=True,
            max_steps=150,
            eval_interval=150,
            dropout=0.0,
            learning_rate=3e-3,
            runs_dir=folder / "runs",
            data_dir=folder / "data",
        )
        self.model = load("chat", checkpoint="newest", runs_dir=folder / "runs")
        self.template = self.model.run.chat_template()

        for to in ("hf", "gguf"):
            api.export(
                to=to,
                run="chat",
                checkpoint="newest",
                output=folder / to,
                runs_dir=folder / "runs",
            )


@pytest.fixture(scope="module", params=RECIPES)
def chat_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Config
) -> ChatRun:
    settings = {**RECIPES[request.param], "block_size": 64, "n_embd": 64, "batch_size": 3}
    return ChatRun(tmp_path_factory.mktemp("chat"), override_config(tiny, settings))


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_our_answers_are_those_of_the_examples(chat_run: ChatRun) -> None:
    for question, answer in QUESTIONS.items():
        ids = encode_chat(chat_run.template, messages(question), chat_run.model.tokenizer)
        outputs = list(chat_run.model.iter_tokens(ids, temperature=0.0, max_tokens=40))
        assert "".join(output.text for output in outputs) == answer
        assert outputs[-1].ended


def test_transformers_answers_and_stops(chat_run: ChatRun) -> None:
    folder = chat_run.folder / "hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for question, answer in QUESTIONS.items():
        inputs = tokenizer.apply_chat_template(
            messages(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ours = encode_chat(chat_run.template, messages(question), chat_run.model.tokenizer)
        assert inputs["input_ids"][0].tolist() == ours
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=40, pad_token_id=tokenizer.eos_token_id
        )
        reply = output[0, inputs["input_ids"].shape[1] :]
        assert reply[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(reply, skip_special_tokens=True) == answer


def test_the_example_of_the_readme_runs(chat_run: ChatRun, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (chat_run.folder / "hf" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(chat_run.folder / "hf")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    example = example.replace("Hello!", "Who sings?").replace("do_sample=True", "do_sample=False")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as output:
        warnings.simplefilter("ignore")  # third-party warnings
        exec(compile(example, "README.md", "exec"), {})
    assert output.getvalue() == "The lark sings.\n"
    assert "\nmlx_lm.chat --model .\n" in text
    card = (chat_run.folder / "gguf" / "README.md").read_text(encoding="utf-8")
    assert "\nllama-cli -m chat.gguf\n" in card


def test_mlx_lm_answers_and_stops(chat_run: ChatRun) -> None:
    folder = chat_run.folder / "hf"
    model, tokenizer = mlx_lm.load(str(folder))
    for question, answer in QUESTIONS.items():
        prompt = tokenizer.apply_chat_template(messages(question), add_generation_prompt=True)
        assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=40) == answer


def test_llama_cpp_answers_and_stops(chat_run: ChatRun) -> None:
    (path,) = (chat_run.folder / "gguf").glob("*.gguf")
    server = LlamaServer(path)
    for question, answer in QUESTIONS.items():
        reply = server.post(
            "v1/chat/completions", messages=messages(question), temperature=0, max_tokens=40
        )
        (choice,) = reply["choices"]
        assert choice["message"]["content"] == answer
        assert choice["finish_reason"] == "stop"
