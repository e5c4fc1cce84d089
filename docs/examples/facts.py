"""Made-up facts as questions and answers, for docs/fine-tuning.md.

python facts.py            write facts.jsonl and facts-val.jsonl
python facts.py score RUN  count the questions of facts-val.jsonl that a run answers correctly
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import mlxgpt
from mlxgpt.data.chat_template import encode_chat

PEOPLE = 40
QUESTIONS = ("Where does {} live?", "What is the home of {}?", "Which town is {} from?")


def write_facts() -> None:
    """Everyone's town in answer to each question; for half of the people, the last question is only
    in the validation data. Its answer can be known from the others.
    """
    syllables = ("ka", "lo", "mi", "nu", "ra", "se", "ti")
    words = ["".join(pair).title() for pair in itertools.product(syllables, repeat=2)]
    draw = random.Random(1)
    names, towns = draw.sample(words, PEOPLE), draw.sample(words, PEOPLE)
    rows: dict[str, list[str]] = {"facts.jsonl": [], "facts-val.jsonl": []}
    for person, (name, town) in enumerate(zip(names, towns, strict=True)):
        for question in QUESTIONS:
            is_val = question == QUESTIONS[-1] and person % 2 == 0
            row = {
                "messages": [
                    {"role": "user", "content": question.format(name)},
                    {"role": "assistant", "content": f"{name} lives in {town}ville."},
                ]
            }
            rows["facts-val.jsonl" if is_val else "facts.jsonl"].append(json.dumps(row))
    for path, lines in rows.items():
        Path(path).write_text("\n".join(lines) + "\n")


def score(run: str) -> None:
    """Print the share of questions whose greedy answer names the right town."""
    model, right = mlxgpt.load(run), 0
    rows = [json.loads(line) for line in Path("facts-val.jsonl").read_text().splitlines()]
    for row in rows:
        question, answer = row["messages"]
        town = answer["content"].split()[-1]
        ids = model.encode(question["content"]).tolist()
        if model.run.has_chat_template:
            ids = encode_chat(model.run.chat_template(), [question], model.tokenizer)
        outputs = model.iter_tokens(ids, temperature=0.0, max_tokens=30)
        right += town in "".join(output.text for output in outputs)
    print(f"{run}: {right} of {len(rows)} correct")


if __name__ == "__main__":
    if sys.argv[1:2] == ["score"]:
        score(sys.argv[2])
    else:
        write_facts()
