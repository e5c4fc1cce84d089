"""GPT-2's size as its users train it: some steps of many micro-batches on this machine, killed once
after a checkpoint and resumed; where the time goes, and whether memory stays flat.

    python benchmarks/gpt2.py TEXT --val-source TEXT [--steps 10] [--micro-batches 40]

TEXT is encoded by GPT-2's own tokenizer. A step of 40 micro-batches takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

FLAGS = "--config gpt2-124m --batch-size 1 --warmup-steps 2 --log-interval 1 --sample-tokens 0"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("--val-source", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro-batches", type=int, default=40)
    given = parser.parse_args()
    half = max(1, given.steps // 2)
    line = [*FLAGS.split(), "--source", given.text, "--val-source", given.val_source]
    line += ["--max-steps", str(given.steps), "--save-interval", str(half), "--run", "gpt2"]
    line += ["--gradient-accumulation-steps", str(given.micro_batches)]
    with tempfile.TemporaryDirectory() as home:
        prepare = [sys.executable, "-m", "mlxgpt", "prepare", given.text, "--tokenizer", "gpt2"]
        prepare += ["--val-source", given.val_source]
        subprocess.run(prepare, check=True, env={**os.environ, "MLXGPT_HOME": home})
        first = watched(line, home, kill_at=half + 1)
        second = watched(line, home)
    for name, events in (("begun, and killed", first), ("resumed, to the end", second)):
        print(f"\n{name}:\n")
        show(events)


def watched(line: list[str], home: str, kill_at: int | None = None) -> list[dict[str, Any]]:
    """What a training tells, each with its second since the process was started."""
    command = [sys.executable, __file__, "child", *line]
    environment = {**os.environ, "MLXGPT_HOME": home}
    events, began = [], time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        for told in process.stdout:
            events.append({"at": time.monotonic() - began, **json.loads(told)})
            print(f"{events[-1]['at']:8.1f} s  {told.strip()}", file=sys.stderr)
            if kill_at and events[-1].get("step") == kill_at:
                process.send_signal(signal.SIGKILL)
    events.append({"at": time.monotonic() - began, "event": "end"})
    return events


def show(events: list[dict[str, Any]]) -> None:
    """A table of where the time went, and of memory after each step."""
    at = {event["event"]: event["at"] for event in reversed(events)}  # the first of each kind
    checks = [event["at"] for event in events if event["event"] == "check"]
    took: dict[str, float] = defaultdict(float)
    took["opening the data, and imports"] = checks[0]
    took["self-check"] = checks[-1] - checks[0]
    took["forecast"] = at["begin"] - checks[-1]
    for event in events:  # the forecast's own evaluations are in it
        if event["at"] > at["begin"] and event["event"] in ("evaluation", "saving"):
            took[event["event"]] += event["seconds"]
    whole = events[-1]["at"]
    # A checkpoint is written beside the steps, so what it takes is no share of the whole.
    saving = took.pop("saving", 0.0)
    took["steps"] = whole - sum(took.values())
    print("| | s | share |\n|---|---|---|")
    for name, seconds in took.items():
        print(f"| {name} | {seconds:,.1f} | {seconds / whole:.1%} |")
    print(f"| the whole | {whole:,.1f} | |")
    print(f"\nsaving, beside the steps: {saving:.1f} s")
    steps = [event for event in events if event["event"] == "step"]
    print("step: GB: " + ", ".join(f"{e['step']}: {e['memory'] / 1e9:.2f}" for e in steps))
    print("tokens/s: " + ", ".join(f"{e['rate']:.0f}" for e in steps))


def child(line: list[str]) -> int:
    """`mlxgpt train`, telling what happens, an event a line."""
    import mlxgpt  # noqa: F401 - before mlx
    from mlxgpt import cli, display
    from mlxgpt.evaluation.loss import Evaluation, Evaluator
    from mlxgpt.training.callbacks import Callback

    def tell(event: str, **more: Any) -> None:
        print(json.dumps({"event": event, **more}), flush=True)

    class Watcher(Callback):
        def on_note(self, line: str) -> None:
            tell("note", line=line)

        def on_check(self, check: Any) -> None:
            tell("check", name=check.name)

        def on_train_begin(self, run: Any, dataset: Any, start: int, forecast: Any) -> None:
            tell("begin", start=start, seconds=forecast.seconds, peak=forecast.peak_bytes)

        def on_log(self, record: dict[str, Any]) -> None:
            numbers = {"rate": record["tokens_per_second"], "memory": record["memory_bytes"]}
            tell("step", step=record["step"], loss=record["loss"], **numbers)

        def on_save(self, step: int, size: int, seconds: float) -> None:
            tell("saving", of=step, bytes=size, seconds=seconds)

        def close(self) -> None:
            pass

    real = Evaluator.__call__

    def evaluate(self: Evaluator) -> Evaluation:
        began = time.monotonic()
        result = real(self)
        tell("evaluation", tokens=result.tokens, seconds=time.monotonic() - began)
        return result

    Evaluator.__call__ = evaluate  # type: ignore[method-assign]
    display.TrainingDisplay = Watcher  # type: ignore[assignment, misc]
    return cli.main(["train", *line])


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        sys.exit(child(sys.argv[2:]))
    main()
