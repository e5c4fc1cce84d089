"""Each fault of docs/learn/faults.py, made in a copy of mlxgpt, is found by a test of mlxgpt."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import faults
import pytest

from tests.helpers.commands import ROOT

# By the fault's name: file, its text, what replaces it, and the test that finds it.
MUTANTS = {
    "top-k keeps the least likely tokens": (
        "inference/sampling.py",
        "logits >= partitioned[",
        "logits <= partitioned[",
        "tests/inference/test_sampling.py::test_top_k_keeps_the_k_likeliest_and_ties",
    ),
    "the causal mask is off by one": (
        "backend/ops.py",
        'mask="causal")',
        "mask=mx.tri(q.shape[2], k=1).astype(mx.bool_))",
        "tests/model/test_gpt.py::test_logits_match_transformers_gpt2",
    ),
    "the tied head is not tied: the embedding gets no gradient from it": (
        "model/gpt.py",
        "return ops.linear(x, self.weight)\n",
        "return ops.linear(x, mx.stop_gradient(self.weight))\n",
        "tests/model/test_gpt.py::test_loss_and_gradients_match_transformers_gpt2",
    ),
    "the validation text is also trained on": (
        "data/splits.py",
        'else "" if key in val_keys else "train"',
        'else "train"',
        "tests/data/test_splits.py::test_validation_documents_are_not_trained_on",
    ),
    "dropout is on at evaluation": (
        "model/losses.py",
        "token_losses(model(inputs), targets) * mask",
        "token_losses(model(inputs, key=mx.random.key(0)), targets) * mask",
        "tests/training/test_step.py::test_the_evaluation_step_uses_the_mask_and_new_weights",
    ),
    "every token of the cache has position 0": (
        "model/gpt.py",
        "position = cache.position if cache is not None else None\n            # A slice",
        "position = 0 * cache.position if cache and cache.position is not None else None\n"
        "            # A slice",
        "tests/model/test_gpt.py::test_cached_and_padded_logits_match_the_full_pass",
    ),
    "heads are cut out of the wrong axis, which mixes tokens": (
        "model/gpt.py",
        ".reshape(B, T, 3, H, D).transpose(2, 0, 3, 1, 4)",
        ".reshape(B, H, T, 3, D).transpose(3, 0, 1, 2, 4)",
        "tests/model/test_gpt.py::test_logits_match_transformers_gpt2",
    ),
    "padding has a part in the loss": (
        "data/example_array.py",
        "mask = np.zeros((len(rows), length)",
        "mask = np.ones((len(rows), length)",
        "tests/data/test_example_array.py"
        "::test_a_batch_contains_whole_examples_and_weights_only_trained_targets",
    ),
    "the schedule is one step late": (
        "training/schedule.py",
        "optim.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)",
        "optim.linear_schedule(0.0, peak, warmup_steps + 1)",
        "tests/training/test_schedule.py::test_the_first_rate_is_not_zero_and_the_peak_is_reached",
    ),
    "targets are not shifted": (
        "data/token_array.py",
        "sequences[:, 1:].reshape(shape)",
        "sequences[:, :-1].reshape(shape)",
        "tests/data/test_token_array.py::test_targets_are_the_inputs_shifted_by_one",
    ),
    "AdamW without bias correction": (
        "training/optimizer.py",
        "learning_rates / (1 - c.beta1**n)",
        "learning_rates",
        "tests/training/test_optimizer.py::test_adamw_matches_mlx_bit_for_bit",
    ),
    "the first micro-batch is used again instead of the others": (
        "training/step.py",
        "self._add_gradients(parameters, *micro_batch, total)",
        "self._add_gradients(parameters, *first, total)",
        "tests/training/test_step.py::test_gradient_accumulation_matches_a_large_batch",
    ),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of mlxgpt and its tests."""
    for name in ("mlxgpt", "tests", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run_tests(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )


def test_every_fault_of_the_course_has_a_mutant() -> None:
    assert [*MUTANTS] == [fault.name for fault in faults.FAULTS]


@pytest.mark.slow
def test_the_copy_without_a_fault_passes(copy: Path) -> None:
    result = run_tests(copy, *{test for *_, test in MUTANTS.values()})
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_each_fault_is_found_by_a_test_of_mlxgpt(name: str, copy: Path) -> None:
    file, old, new, test = MUTANTS[name]
    path = copy / "mlxgpt" / file
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{file}: {source.count(old)} places"
    path.write_text(source.replace(old, new), encoding="utf-8")
    result = run_tests(copy, test)
    assert result.returncode == 1, result.stdout  # 1: tests failed
    assert "AssertionError" in result.stdout or "assert " in result.stdout
