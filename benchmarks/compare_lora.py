"""LoRA at GPT-2's size: memory and time of a step, compared with training all weights and with
mlx-lm on the same exported model and rows.

    python benchmarks/compare_lora.py [--rounds 5] [--folder DIR]

All take 4 rows of 257 tokens per step, without padding, in float32, with rank 8, alpha 16 and the
same initial adapters; mlx-lm uses the same BLAS as mlxgpt. They take turns, each time in a fresh
process. Medians are printed, and the range of the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlxgpt  # isort: skip  # noqa: F401  loads its BLAS before mlx.core is imported
import mlx.core as mx
import numpy as np

from mlxgpt.backend import device, execution
from mlxgpt.config import Config, LoRAConfig, OptimConfig, TrainConfig
from mlxgpt.config.toml import find_builtin_configs, load_config
from mlxgpt.convert.huggingface import write_gpt2_config, write_gpt2_parameters
from mlxgpt.data.token_array import Batch
from mlxgpt.model.gpt import GPT
from mlxgpt.model.lora import ADAPTED_LAYERS, add_lora
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training.step import TrainStep

MODEL = load_config(find_builtin_configs()["gpt2-124m"]).model
ROWS, TOKENS = 4, 256
STEPS, WARMUP_STEPS = 20, 3
LORA = LoRAConfig(lora_rank=8, lora_alpha=16.0)
OPTIM = OptimConfig(
    learning_rate=1e-3, warmup_steps=0, min_lr_ratio=1.0, weight_decay=0.0, grad_clip=0.0
)
KINDS = ("full", "lora", "mlx-lm")


def make_rows() -> np.ndarray:
    """Rows of every step, [STEPS, ROWS, TOKENS + 1]; the ids follow Zipf's law."""
    ids = np.random.default_rng(0).zipf(1.3, (STEPS, ROWS, TOKENS + 1)) - 1
    return np.minimum(ids, 50256)


def make_model() -> GPT:
    """GPT-2 with 124M parameters and random weights."""
    model = GPT(MODEL, seed=0)
    mx.eval(model.parameters())
    return model


def measure_mlxgpt(*, lora: bool) -> dict[str, Any]:
    """Losses of the steps, seconds of each, and peak memory."""
    train = TrainConfig(batch_size=ROWS, dtype="float32", max_steps=STEPS, seed=0)
    config = Config(MODEL, optim=OPTIM, train=train, lora=LORA if lora else LoRAConfig())
    model = make_model()
    if lora:
        add_lora(model, LORA)
        mx.eval(model.parameters())
    step = TrainStep(model, config)
    device.reset_peak_memory()
    losses, seconds = [], []
    for rows in make_rows():
        batch = Batch(mx.array(rows[None, :, :-1]), mx.array(rows[None, :, 1:]), None)
        start = time.perf_counter()
        loss, norm = step(batch, mx.array(OPTIM.learning_rate), mx.random.key(0))
        mx.eval(loss, norm, step.state)
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    return {"losses": losses, "seconds": seconds, "peak_bytes": device.peak_memory_bytes()}


def measure_mlx_lm(folder: Path) -> dict[str, Any]:
    """The same with mlx-lm's trainer, adapters and loss."""
    from mlx.optimizers import AdamW
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    class Recorder(TrainingCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.seconds: list[float] = []

        def on_train_loss_report(self, train_info: dict[str, float]) -> None:
            self.losses.append(train_info["train_loss"])
            self.seconds.append(1 / train_info["iterations_per_second"])

    execution.compile_failure()  # sets up the compiler as for mlxgpt
    model, _ = load_model(folder)
    model.freeze()
    parameters = {"rank": LORA.lora_rank, "scale": LORA.lora_scale, "dropout": 0.0}
    keys = list(ADAPTED_LAYERS)
    linear_to_lora_layers(model, MODEL.n_layer, {**parameters, "keys": keys})
    adapted = make_model()
    add_lora(adapted, LORA)
    adapters = flatten_params(adapted.trainable_parameters())
    model.load_weights([(f"model.{n}", value) for n, value in adapters.items()], strict=False)
    mx.eval(model.parameters())
    del adapted
    device.reset_peak_memory()
    rows, recorder = make_rows(), Recorder()

    def iterate_batches(**_: Any) -> Any:
        for batch in rows:
            yield mx.array(batch), mx.array([[0, TOKENS + 1]] * ROWS)

    optimizer = AdamW(
        OPTIM.learning_rate,
        [OPTIM.beta1, OPTIM.beta2],
        OPTIM.eps,
        OPTIM.weight_decay,
        bias_correction=True,
    )
    args = TrainingArgs(
        batch_size=ROWS,
        iters=STEPS,
        steps_per_report=1,
        steps_per_save=STEPS + 1,
        max_seq_length=TOKENS + 1,
        adapter_file=str(folder / "adapters.safetensors"),
    )
    train(
        model,
        optimizer,
        [None],
        None,
        args,
        iterate_batches=iterate_batches,
        training_callback=recorder,
    )
    return {
        "losses": recorder.losses,
        "seconds": recorder.seconds,
        "peak_bytes": device.peak_memory_bytes(),
    }


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """Measure one of KINDS in this process."""
    if kind == "mlx-lm":
        return measure_mlx_lm(folder)
    return measure_mlxgpt(lora=kind == "lora")


def compare(rounds: int, folder: Path) -> None:
    """Measure in turns, each in a fresh process, and print the medians."""
    write_gpt2_config(folder, MODEL, None)
    write_gpt2_parameters(folder, MODEL, flatten_params(make_model().parameters()))
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for n in range(rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, "--measure", kind, "--folder", str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[kind].append(json.loads(output.splitlines()[-1]))
            seconds = statistics.median(results[kind][-1]["seconds"][WARMUP_STEPS:])
            print(f"round {n + 1}, {kind}: {seconds:.3f} s per step", file=sys.stderr)
    step_seconds = {
        kind: [statistics.median(result["seconds"][WARMUP_STEPS:]) for result in results[kind]]
        for kind in KINDS
    }
    print("| | seconds per step | tokens/s | peak memory, GB |\n|---|---|---|---|")
    for kind in KINDS:
        median = statistics.median(step_seconds[kind])
        peak = statistics.median(result["peak_bytes"] for result in results[kind])
        speed = ROWS * TOKENS / median
        print(f"| {kind} | {median:.3f} | {speed:,.0f} | {peak / 1e9:.2f} |")
    peaks = {kind: results[kind][0]["peak_bytes"] for kind in KINDS}
    print(f"\nmemory, lora / full: {peaks['lora'] / peaks['full']:.3f}")
    for name, a, b in (
        ("step, lora / full", "lora", "full"),
        ("speed, lora / mlx-lm", "mlx-lm", "lora"),
    ):
        ratios = [x / y for x, y in zip(step_seconds[a], step_seconds[b], strict=True)]
        print(f"{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    ours, theirs = (np.array(results[kind][0]["losses"]) for kind in ("lora", "mlx-lm"))
    print(
        f"loss of {STEPS} steps: {ours[0]:.4f} to {ours[-1]:.4f}; differs from mlx-lm's by at most "
        f"{abs(ours - theirs).max():.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the exported model (default: temporary)")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(args.rounds, args.folder or Path(temporary))


if __name__ == "__main__":
    main()
