"""The model card of an export: its commands fit the model. tests/oracle/test_oracle_card.py runs
them.
"""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlxgpt
from mlxgpt.convert import importing
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.convert.model_card import choose_example_prompt, render_model_card
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.storage.run import Run, open_run
from tests.helpers.external_models import MODEL_CONFIG, random_parameters, train_small_bpe


def make_run(folder: Path, tokenizer: Tokenizer, block_size: int, **fields: Any) -> Run:
    config = replace(MODEL_CONFIG, vocab_size=tokenizer.vocab_size, block_size=block_size, **fields)
    bos = tokenizer.end_of_text is not None
    return importing.create_imported_run(
        ImportedModel(config, random_parameters(config), tokenizer, bos), folder
    )


RUNS: dict[str, tuple[Tokenizer, int]] = {
    "digits": (CharTokenizer("0123456789+=\n", end_of_text=False), 64),
    "DNA, of many texts": (CharTokenizer("ACGT", end_of_text=True), 8),
    "white space": (CharTokenizer(" \n", end_of_text=False), 16),
    "quotes": (CharTokenizer("'\"\\", end_of_text=False), 16),
    "words": (train_small_bpe(), 64),
    "a short block": (train_small_bpe(), 4),
}


@pytest.mark.parametrize("case", RUNS)
def test_prompt_and_length_in_commands_fit_the_block_size(tmp_path: Path, case: str) -> None:
    tokenizer, block = RUNS[case]
    run = make_run(tmp_path / "my run", tokenizer, block)
    bos = run.bos is not None

    def fits(prompt: str, new_tokens: int) -> bool:
        return 0 < new_tokens <= block - len(tokenizer.encode(prompt)) - bos

    example = re.search(r"```python\n(.*?)```", render_model_card(run, 0, "hf", None), re.DOTALL)
    assert example
    tree = ast.parse(example[1])
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    prompts = [
        ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "tokenizer"
    ]
    max_new_tokens = [
        keyword.value
        for call in calls
        for keyword in call.keywords
        if keyword.arg == "max_new_tokens"
    ]
    assert fits(prompts[0], ast.literal_eval(max_new_tokens[0]))
    assert prompts == [choose_example_prompt(run, block // 2 - bos)]
    for to in ("hf", "mlx-lm"):
        words = shlex.split(
            render_model_card(run, 0, to, None).rpartition("mlx_lm.generate")[2].split("```")[0]
        )
        options = dict(zip(words[::2], words[1::2], strict=False))
        assert fits(options["--prompt"], int(options["--max-tokens"]))
    llama_command = re.search(
        r"llama-cli (.*?)\n```", render_model_card(run, 0, "gguf", None), re.DOTALL
    )
    assert llama_command
    words = shlex.split(llama_command[1])
    assert words[1] == "my run.gguf"
    assert fits(words[words.index("-p") + 1], int(words[words.index("-n") + 1]))


def test_example_prompt_comes_from_the_samples_of_the_run(place: Path) -> None:
    run = open_run(Path("runs/done"))
    sample = [text for _, text in run.samples(200)][-1]
    prompt = choose_example_prompt(run, 4)
    assert 0 < len(run.tokenizer.encode(prompt)) <= 4
    run.add_sample(99, "\n be not\nto be")
    assert choose_example_prompt(run, 6) == "be not"
    run.add_sample(100, "€uro\n-be\nto")
    assert choose_example_prompt(run, 6) == "to"
    assert sample


def test_example_prompt_without_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "m", train_small_bpe(), 64)
    assert choose_example_prompt(run, 30) == "Once upon a time"
    assert mlxgpt.generate(choose_example_prompt(run, 30), run=str(run.folder), max_tokens=1).texts
