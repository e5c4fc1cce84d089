"""DPO on a task with a known answer: how far does it raise the share of stories in which somebody
asks a question, and what does it cost?

    python benchmarks/preferences.py base FOLDER --seed 1
    python benchmarks/preferences.py tune FOLDER --seed 1 --beta 0.1 --rate 1e-4
    python benchmarks/preferences.py table FOLDER [--plots DIR]

`base` trains a small model on synthetic stories, SHARE of which have a question, lets it continue
the first sentences of other stories, and pairs continuations with and without a question. `tune`
takes STEPS steps of DPO on these pairs, and measures continuations of sentences that are in neither
of them. The rule, the steps and the numbers of texts are fixed here; rates were swept with seed 0.

With `--run RUN --source FILE --val-source FILE --rule REGEX`, `base` takes a trained model instead,
and the first sentences of the stories in these files, for pairs and for the test.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlxgpt  # isort: skip  # loads its BLAS before mlx.core is imported
import numpy as np

from mlxgpt.bench.markdown import render_markdown_table
from mlxgpt.data.example_array import PairArray, pack_examples
from mlxgpt.data.synthetic import generate_story
from mlxgpt.data.tokenizers.base import END_OF_TEXT, NUL
from mlxgpt.evaluation.preferences import compute_logprobs
from mlxgpt.experiments.statistics import confidence_interval
from mlxgpt.loaded_model import LoadedModel
from mlxgpt.storage.loading import load_run_model

QUESTION = r"\?"  # the rule
SHARE = 0.10  # of the stories that the base is trained on
TRAIN_STORIES, VAL_STORIES = 30_000, 600
BASE_STEPS = 1_500
PAIR_PROMPTS, SAMPLES = 1_500, 8  # continuations of each
TEST_PROMPTS = 400
MAX_TOKENS = 220
STEPS = 150  # of 16 pairs
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Task:
    """Folder of a seed's task, and of its datasets."""

    path: Path
    seed: int
    data_dir: Path

    def read(self) -> dict[str, Any]:
        """The rule and the prompts of the test."""
        tree: dict[str, Any] = json.loads((self.path / "task.json").read_text())
        return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("command", choices=("base", "tune", "table"))
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--run", help="trained run to make pairs with")
    parser.add_argument("--source", type=Path, metavar="FILE")
    parser.add_argument("--val-source", type=Path, metavar="FILE")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of its dataset")
    parser.add_argument("--rule", default=QUESTION, metavar="REGEX")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    args = parser.parse_args()
    path = args.folder / f"seed{args.seed}"
    task = Task(path, args.seed, args.data_dir or path / "data")
    if args.command == "base":
        task.path.mkdir(parents=True, exist_ok=True)
        make_pairs(task, *(copy_run(task, args) if args.run else train_base(task)), args.rule)
    elif args.command == "tune":
        tune(task, args.beta, args.rate)
    else:
        print_table(args.folder, args.plots)


def train_base(task: Task) -> tuple[list[str], list[str]]:
    """Train the base on stories with a controlled share of questions; returns the first sentences
    of other stories, for pairs and for the test.
    """
    stories = (generate_story(n, task.seed) for n in itertools.count())
    corpus = list(itertools.islice(_with_share(stories), TRAIN_STORIES + VAL_STORIES))
    for name, part in (("train", corpus[VAL_STORIES:]), ("val", corpus[:VAL_STORIES])):
        (task.path / f"{name}.txt").write_text(END_OF_TEXT.join(part))
    mlxgpt.train(
        2,
        recipe="modern",
        run="base",
        runs_dir=task.path,
        data_dir=task.data_dir,
        source=str(task.path / "train.txt"),
        val_source=str(task.path / "val.txt"),
        n_layer=2,
        n_head=2,
        n_embd=128,
        vocab_size=512,
        batch_size=8,
        block_size=256,
        max_steps=BASE_STEPS,
        eval_interval=BASE_STEPS // 3,
        seed=task.seed,
        snapshots=False,
    )
    others = [_first_sentence(story) for story in itertools.islice(stories, 20 * PAIR_PROMPTS)]
    return others, others


def _with_share(stories: Iterator[str]) -> Iterator[str]:
    """Omit stories with a question so that SHARE of the others have one."""
    total = asked = 0
    for story in stories:
        has_question = re.search(QUESTION, story) is not None
        if has_question and asked + 1 > SHARE * (total + 1):
            continue
        total, asked = total + 1, asked + has_question
        yield story


def copy_run(task: Task, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Copy a trained run and its validation text; returns the first sentences of its stories, and
    of the validation stories.
    """
    shutil.copytree(args.run, task.path / "base", dirs_exist_ok=True)
    shutil.copy(args.val_source, task.path / "val.txt")
    first, second = (
        [_first_sentence(text.strip()) for text in path.read_text().split(END_OF_TEXT)]
        for path in (args.source, args.val_source)
    )
    return first, second


def _first_sentence(story: str) -> str:
    return re.split(r"(?<=[.!?\"])\s", story, maxsplit=1)[0]


def make_pairs(
    task: Task, sentences: Sequence[str], test_sentences: Sequence[str], rule: str
) -> None:
    """Write pairs.jsonl and the prompts of the test."""
    pair_prompts, others = (
        [text for text in dict.fromkeys(texts) if text and not re.search(rule, text)]
        for texts in (sentences, test_sentences)
    )
    pair_prompts = pair_prompts[:PAIR_PROMPTS]
    test_prompts = [text for text in others if text not in set(pair_prompts)][:TEST_PROMPTS]
    output = mlxgpt.load("base", runs_dir=task.path).generate(
        pair_prompts, samples=SAMPLES, max_tokens=MAX_TOKENS, temperature=1.0, seed=task.seed
    )
    rows = []
    for n, prompt in enumerate(pair_prompts):
        texts = zip(output.texts[n * SAMPLES :], output.ended[n * SAMPLES :], strict=False)
        answers = [
            text[len(prompt) :]
            for text, ended in itertools.islice(texts, SAMPLES)
            if ended and NUL not in text
        ]
        groups = [[a for a in answers if bool(re.search(rule, a)) == has] for has in (True, False)]
        if all(groups):
            chosen, rejected = (group[0] for group in groups)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    (task.path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"rule": rule, "test_prompts": test_prompts, "pairs": len(rows)}
    (task.path / "task.json").write_text(json.dumps(tree))
    record = measure(task, "base") | {"beta": None, "rate": None}
    _add_result(task, record)
    print(f"{len(rows)} pairs; share in the base's texts {record['share']:.3f}")


def tune(task: Task, beta: float, rate: float) -> None:
    """Tune the base on the pairs, and add the measurements to the results."""
    name = f"beta{beta:g}-rate{rate:g}"
    mlxgpt.train(
        init_from="base",
        run=name,
        runs_dir=task.path,
        data_dir=task.data_dir,
        source=str(task.path / "pairs.jsonl"),
        beta=beta,
        learning_rate=rate,
        batch_size=16,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        eval_interval=STEPS // 5,
        seed=task.seed,
        snapshots=False,
        sample_tokens=0,
        keep_checkpoints=1,
    )
    record = measure(task, name) | {"beta": beta, "rate": rate}
    *_, last = (task.path / name / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(last)
    record |= {key: metrics[key] for key in ("val_loss", "val_margin", "val_accuracy", "val_kl")}
    _add_result(task, record)
    print(json.dumps({key: value for key, value in record.items() if key != "texts"}))


def measure(task: Task, run: str) -> dict[str, Any]:
    """Measure a run's texts after the test prompts, its divergence from the base, and its loss."""
    tree = task.read()
    model = mlxgpt.load(run, checkpoint="newest", runs_dir=task.path)
    prompts = tree["test_prompts"]
    output = model.generate(prompts, max_tokens=MAX_TOKENS, temperature=1.0, seed=task.seed + 1)
    answers = [text[len(prompt) :] for text, prompt in zip(output.texts, prompts, strict=True)]
    share = statistics.mean(bool(re.search(tree["rule"], answer)) for answer in answers)
    logprobs = [_answer_logprobs(model, task, name, prompts, answers) for name in (run, "base")]
    quality = mlxgpt.appraise(
        run=run, checkpoint="newest", runs_dir=task.path, data_dir=task.data_dir
    )
    loss = mlxgpt.evaluate(
        run=run, checkpoint="newest", runs_dir=task.path, source=task.path / "val.txt"
    ).loss
    return {
        "seed": task.seed,
        "share": share,
        "kl": float(np.mean(logprobs[0] - logprobs[1])),
        "tokens": output.tokens / len(prompts),
        "ended": statistics.mean(output.ended),
        "loss": loss,
        "quality": quality.columns["model"],
        "texts": output.texts[:10],
    }


def _answer_logprobs(
    model: LoadedModel, task: Task, run: str, prompts: Sequence[str], answers: Sequence[str]
) -> np.ndarray:
    """Log-probabilities of answers after their prompts, [n], under a run's model."""
    opened_run, gpt, _ = load_run_model(run, "newest", task.path)
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = np.concatenate([model.encode(prompt), model.tokenizer.encode(answer)])
        ids = ids[: gpt.config.block_size + 1]  # nonsense can have more tokens than were sampled
        examples.append((ids, np.arange(len(ids)) >= len(model.encode(prompt))))
    pairs = PairArray(pack_examples(examples), gpt.config.vocab_size)
    return compute_logprobs(gpt, pairs, opened_run.config).flatten()


def _add_result(task: Task, record: dict[str, Any]) -> None:
    with (task.path.parent / RESULTS).open("a") as file:
        file.write(json.dumps(record) + "\n")


COLUMNS = {"share": "share", "kl": "KL, nats per text", "tokens": "tokens", "loss": "loss"}
QUALITY = ("complete sentences", "grammar errors per 100 words", "distinct 3-grams", "ended")


def print_table(folder: Path, plots: Path | None) -> None:
    """Print means over the seeds with 95% intervals, and draw two plots. Seed 0, with which rates
    were swept, only counts where there is no other.
    """
    lines = (folder / RESULTS).read_text().splitlines()
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in map(json.loads, lines):
        groups.setdefault((record["beta"], record["rate"]), []).append(record)
    rows = [["beta", "rate", "seeds", *COLUMNS.values(), "val loss", *QUALITY]]
    curve = []
    for (beta, rate), group in sorted(groups.items(), key=lambda item: item[0][0] or 0):
        records = [record for record in group if record["seed"]] or group
        cells = ["base" if beta is None else f"{beta:g}", "" if rate is None else f"{rate:g}"]
        intervals = {key: _interval([r[key] for r in records]) for key in COLUMNS}
        cells += [
            str(len(records)),
            *(f"{mean:.3f} ± {half:.3f}" for mean, half in intervals.values()),
        ]
        cells.append(
            "" if beta is None else f"{statistics.mean(r['val_loss'] for r in records):.3f}"
        )
        cells += [f"{statistics.mean(r['quality'][name] for r in records):.3f}" for name in QUALITY]
        rows.append(cells)
        if beta is not None and len(records) > 1:
            curve.append((beta, intervals))
    print("\n".join(render_markdown_table(rows)))
    if plots and curve:
        _draw(curve, plots)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval over seeds."""
    low, high = confidence_interval(values, 0.05)
    half = float("nan") if low is None or high is None else (high - low) / 2
    return statistics.mean(values), half


def _draw(curve: Sequence[tuple[float, dict[str, tuple[float, float]]]], folder: Path) -> None:
    """Plot the share over beta, and over the KL divergence, with 95% intervals."""
    from matplotlib.figure import Figure

    share, share_half = np.array([row["share"] for _, row in curve]).T
    kl, kl_half = np.array([row["kl"] for _, row in curve]).T
    betas = [beta for beta, _ in curve]
    for name, x, x_half, label in (
        ("dpo-share-over-beta", betas, None, "beta"),
        ("dpo-share-over-kl", kl, kl_half, "KL divergence from the base, nats per text"),
    ):
        figure = Figure(figsize=(6, 3.2), layout="tight")
        axes = figure.subplots()
        axes.errorbar(x, share, share_half, x_half, fmt="o-", capsize=3)
        axes.set_xlabel(label)
        axes.set_ylabel("share with a question")
        axes.set_ylim(0, 1.05)
        if x_half is None:
            axes.set_xscale("log")
            axes.set_xticks(betas, [f"{beta:g}" for beta in betas], minor=False)
            axes.minorticks_off()
        else:
            for beta, x_value, y in zip(betas, x, share, strict=True):
                axes.annotate(f"beta {beta:g}", (x_value, y), (4, -14), textcoords="offset points")
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
